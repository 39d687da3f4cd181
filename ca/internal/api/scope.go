// What of others a registrar may touch and see: nothing. Its calls are judged by
// the SPIFFE IDs that they are about (SECURITY.md T45). What it names itself and
// may not touch is PERMISSION_DENIED; what only the CA can know, such as whose
// an entry ID is, is NOT_FOUND, as if it were not there.

package api

import (
	"reflect"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/role"
	"merlon.dev/sdk/svid"
)

// everywhere says whether what opened the call to c holds for the whole trust
// domain.
func (c *Caller) everywhere() bool { return slices.ContainsFunc(c.Using, role.Role.Everywhere) }

// covers says whether the call of c may be about id.
func (c *Caller) covers(id spiffeid.ID) bool {
	return slices.ContainsFunc(c.Using, func(r role.Role) bool { return r.Covers(id.Path()) })
}

// outside is the refusal of what lies beyond the prefix of c.
func (c *Caller) outside(what string) error {
	return status.Errorf(codes.PermissionDenied, "%s is %s: %s is not its own; it takes an operator, or a registrar of it", c.Name, role.List(c.Using), what)
}

// mayTouch says why c may not change who id is. The CA and its agents are nobody's
// but the CA's, whatever the prefix. An ID that an entry gives a role
// is for operators: who may register it would hold that role, and who may revoke
// it could lock them out.
func (s *Service) mayTouch(c *Caller, id spiffeid.ID) error {
	if c.everywhere() {
		return nil
	}
	if !c.covers(id) || entry.Reserved(id) {
		return c.outside(id.String())
	}
	if s.registry.HasRole(id, time.Now()) {
		return status.Errorf(codes.PermissionDenied, "%s is %s: %s holds a role, which takes an operator", c.Name, role.List(c.Using), id)
	}
	return nil
}

// mayRegister says why c may not create e, which is new.
func (s *Service) mayRegister(c *Caller, e *entry.Entry) error {
	if err := s.mayTouch(c, e.SPIFFEID); err != nil || c.everywhere() {
		return err
	}
	beyond := ""
	switch {
	case e.Role != (role.Role{}):
		beyond = "role"
	case len(e.DNSNames) > 0:
		beyond = "dns_names"
	case e.CommonName != "":
		beyond = "common_name"
	case !reflect.DeepEqual(e, registrars(e)):
		beyond = "what it says beside SPIFFE ID, parent, selectors, TTLs, hint and end"
	}
	if beyond != "" {
		return status.Errorf(codes.PermissionDenied, "%s is %s: %s can be given by an operator only, because it counts outside of that path", c.Name, role.List(c.Using), beyond)
	}
	return nil
}

// registrars is e with nothing but what a registrar may say. What entries learn
// to say later is not among it until somebody has thought of it.
func registrars(e *entry.Entry) *entry.Entry {
	return &entry.Entry{
		SPIFFEID: e.SPIFFEID, ParentID: e.ParentID, Selectors: e.Selectors,
		X509SVIDTTL: e.X509SVIDTTL, JWTSVIDTTL: e.JWTSVIDTTL, Hint: e.Hint, KeyDelivery: e.KeyDelivery, ExpiresAt: e.ExpiresAt,
	}
}

// mayDelete says why c may not delete e.
func (s *Service) mayDelete(c *Caller, e *entry.Entry) error {
	if !c.covers(e.SPIFFEID) {
		return registry.ErrNoEntry
	}
	return s.mayTouch(c, e.SPIFFEID)
}

// sees says whether c may see r.
func (c *Caller) sees(r *revocation.Record) bool {
	id, err := spiffeid.FromString(r.SPIFFEID)
	return c.everywhere() || err == nil && c.covers(id)
}

// mayRevoke says why c may not make r.
func (s *Service) mayRevoke(c *Caller, r svid.Revocation) error {
	if c.everywhere() {
		return nil
	}
	id, err := spiffeid.FromString(r.SPIFFEID)
	if err != nil { // an agent, an authority or a serial: whose SVIDs those are is not in the record
		return c.outside(subjectOf(r))
	}
	return s.mayTouch(c, id)
}
