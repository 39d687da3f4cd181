// Between the wire and the core's own types. What comes in is checked here;
// the core's errors name the field.

package api

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

func entryFromProto(p *capb.Entry) (*entry.Entry, error) {
	if p == nil {
		return nil, &entry.InvalidError{Field: "entry", Reason: "is missing"}
	}
	e := &entry.Entry{DNSNames: p.GetDnsNames(), CommonName: p.GetCommonName(), Hint: p.GetHint(), FederatesWith: p.GetFederatesWith()}
	var err error
	if e.Role, err = roleFromProto(p); err != nil {
		return nil, err
	}
	if e.KeyDelivery, err = deliveryFromProto(p.GetKeyDelivery()); err != nil {
		return nil, err
	}
	if e.SPIFFEID, err = entry.ParseID("spiffe_id", p.GetSpiffeId()); err != nil {
		return nil, err
	}
	if e.ParentID, err = entry.ParseID("parent_id", p.GetParentId()); err != nil {
		return nil, err
	}
	for _, sel := range p.GetSelectors() {
		e.Selectors = append(e.Selectors, entry.Selector{Type: sel.GetType(), Value: sel.GetValue()})
	}
	if e.X509SVIDTTL, err = entry.TTLFromSeconds("x509_svid_ttl_seconds", p.GetX509SvidTtlSeconds()); err != nil {
		return nil, err
	}
	if e.JWTSVIDTTL, err = entry.TTLFromSeconds("jwt_svid_ttl_seconds", p.GetJwtSvidTtlSeconds()); err != nil {
		return nil, err
	}
	if p.GetExpiresAt() != nil {
		if err := p.GetExpiresAt().CheckValid(); err != nil {
			return nil, &entry.InvalidError{Field: "expires_at", Reason: err.Error()}
		}
		e.ExpiresAt = p.GetExpiresAt().AsTime()
	}
	return e, nil
}

// rolePrefix begins the names of roles in the protos.
const rolePrefix = "ROLE_"

// roleName is a role as it is spelled outside of the protos.
func roleName(r capb.Role) role.Name {
	return role.Name(strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(r.String(), rolePrefix)), "_", "-"))
}

// roleToProto is ROLE_UNSPECIFIED where there is none.
func roleToProto(n role.Name) capb.Role {
	return capb.Role(capb.Role_value[rolePrefix+strings.ReplaceAll(strings.ToUpper(string(n)), "-", "_")])
}

// roleFromProto also takes what a client that knows no roles says.
func roleFromProto(p *capb.Entry) (role.Role, error) {
	r := role.Role{Prefix: p.GetRolePrefix()}
	switch {
	case p.GetRole() != capb.Role_ROLE_UNSPECIFIED:
		r.Name = roleName(p.GetRole())
	case p.GetAdmin():
		r.Name = role.Operator
	}
	if p.GetAdmin() && r.Name != role.Operator {
		return r, &entry.InvalidError{Field: "admin", Reason: fmt.Sprintf("means the role operator, and the role is %s: give one of them", r.Name)}
	}
	return r, nil
}

// deliveries are the ways of a key as the protos have them.
var deliveries = map[capb.KeyDelivery]entry.KeyDelivery{
	capb.KeyDelivery_KEY_DELIVERY_UNSPECIFIED: entry.ByAgent,
	capb.KeyDelivery_KEY_DELIVERY_AGENT:       entry.ByAgent,
	capb.KeyDelivery_KEY_DELIVERY_WORKLOAD:    entry.ByWorkload,
	capb.KeyDelivery_KEY_DELIVERY_BOTH:        entry.ByEither,
}

func deliveryFromProto(d capb.KeyDelivery) (entry.KeyDelivery, error) {
	known, ok := deliveries[d]
	if !ok {
		return "", &entry.InvalidError{Field: "key_delivery", Reason: fmt.Sprintf("%s is not known", d)}
	}
	return known, nil
}

func deliveryToProto(d entry.KeyDelivery) capb.KeyDelivery {
	switch d {
	case entry.ByWorkload:
		return capb.KeyDelivery_KEY_DELIVERY_WORKLOAD
	case entry.ByEither:
		return capb.KeyDelivery_KEY_DELIVERY_BOTH
	default:
		return capb.KeyDelivery_KEY_DELIVERY_AGENT
	}
}

func entryToProto(e *entry.Entry) *capb.Entry {
	p := &capb.Entry{
		EntryId: e.ID, SpiffeId: e.SPIFFEID.String(), ParentId: e.ParentID.String(),
		X509SvidTtlSeconds: int64(e.X509SVIDTTL / time.Second), JwtSvidTtlSeconds: int64(e.JWTSVIDTTL / time.Second),
		DnsNames: e.DNSNames, CommonName: e.CommonName, Hint: e.Hint,
		Admin: e.Role.Name == role.Operator, Role: roleToProto(e.Role.Name), RolePrefix: e.Role.Prefix,
		KeyDelivery: deliveryToProto(e.KeyDelivery), FederatesWith: e.FederatesWith,
		ExpiresAt: timestamp(e.ExpiresAt), Revision: e.Revision, CreatedAt: timestamp(e.CreatedAt),
	}
	p.Selectors = selectorsToProto(e.Selectors)
	return p
}

func selectorsToProto(selectors []entry.Selector) []*capb.Selector {
	var list []*capb.Selector
	for _, sel := range selectors {
		list = append(list, &capb.Selector{Type: sel.Type, Value: sel.Value})
	}
	return list
}

func (s *Service) trustToProto(b *trust.Bundle) *capb.TrustBundle {
	if b == nil {
		return nil
	}
	p := &capb.TrustBundle{TrustDomain: b.TrustDomain.Name(), Sequence: b.Sequence, Jwks: b.JWKS, TaintedAuthorityIds: b.Tainted}
	if len(b.Tainted) > 0 {
		p.RenewSpread = durationpb.New(s.renewSpread())
	}
	return p
}

const (
	// signingPace is what the CA signs of a replacement of everything: 250 a
	// second, which leaves most of two cores to others.
	signingPace = 4 * time.Millisecond
	// maxSpread keeps the replacement within the minute, whatever there is.
	maxSpread = 45 * time.Second
)

// renewSpread is over how long agents spread the replacement of everything.
func (s *Service) renewSpread() time.Duration {
	entries, agents := s.registry.Size()
	return min(time.Duration(entries+agents)*signingPace, maxSpread)
}

func revocationToProto(r *revocation.Record) *capb.Revocation {
	p := &capb.Revocation{
		BeforeRevision: r.BeforeRevision, Realm: r.Realm, ExpiresAt: timestamp(r.ExpiresAt), Note: r.Note, AgentHandle: r.AgentHandle,
	}
	switch {
	case r.SPIFFEID != "":
		p.Subject = &capb.Revocation_SpiffeId{SpiffeId: r.SPIFFEID}
	case r.AgentID != "":
		p.Subject = &capb.Revocation_AgentId{AgentId: r.AgentID}
	case r.AuthorityID != "":
		p.Subject = &capb.Revocation_AuthorityId{AuthorityId: r.AuthorityID}
	default:
		p.Subject = &capb.Revocation_Serial{Serial: r.Serial}
	}
	return p
}

// revocationAt is the record as it will be read back once it is written at
// revision.
func (s *Service) revocationAt(r svid.Revocation, key string, revision uint64) *revocation.Record {
	r.Realm = s.opts.Realm
	if r.Serial == "" {
		r.BeforeRevision = revision
	}
	return &revocation.Record{Revocation: r, Key: key, Revision: revision}
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
