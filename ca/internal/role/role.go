// Package role says what an administrator of the CA can be: the roles, and for
// a registrar which SPIFFE IDs are its own. It is pure: who holds a role say
// registration entries, the configuration and tokens; which RPCs a role opens
// say the annotations in ca/capb.
//
// No role includes another one. An RPC names every role that may call it, so
// that none is let in by where it stands in an order.
package role

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Name is a role as it is spelled everywhere: in files, on the command line, in
// the audit log, and, in capitals, in the protos.
type Name string

// The roles.
const (
	Viewer          Name = "viewer"           // sees entries, agents, revocations, replicas
	Registrar       Name = "registrar"        // registers workloads below its prefix
	PolicyPublisher Name = "policy-publisher" // pushes policy bundles
	Operator        Name = "operator"         // everything
)

// Names lists every role.
func Names() []Name { return []Name{Viewer, Registrar, PolicyPublisher, Operator} }

// maxPrefixBytes is the longest path that an ID of a short trust domain has.
const maxPrefixBytes = 2000

// Role is a role that somebody holds. The zero value is none.
type Role struct {
	Name Name
	// Prefix is the path at or below which the SPIFFE IDs of a registrar lie,
	// such as "/ns/shop". Other roles have none.
	Prefix string
}

// String is the role for people: "registrar of /ns/shop".
func (r Role) String() string {
	if r.Prefix == "" {
		return string(r.Name)
	}
	return string(r.Name) + " of " + r.Prefix
}

// Everywhere says whether the role holds for the whole trust domain.
func (r Role) Everywhere() bool { return r.Name != "" && r.Name != Registrar }

// Covers says whether the SPIFFE ID with the given path is within the role. A
// prefix ends where a segment does: /ns/a never covers /ns/a-evil.
func (r Role) Covers(path string) bool {
	if r.Name != Registrar {
		return r.Everywhere()
	}
	rest, ok := strings.CutPrefix(path, r.Prefix)
	return ok && r.Prefix != "" && (rest == "" || rest[0] == '/')
}

// CheckName says why r is not a role, or nil.
func (r Role) CheckName() error {
	if !slices.Contains(Names(), r.Name) {
		return fmt.Errorf("%q is not a role: viewer, registrar, policy-publisher or operator", r.Name)
	}
	return nil
}

// CheckPrefix says why r cannot have its prefix, or nil.
func (r Role) CheckPrefix() error {
	if r.Name != Registrar {
		if r.Prefix != "" {
			return fmt.Errorf("a %s has no prefix: only a registrar is bound to one", r.Name)
		}
		return nil
	}
	switch {
	case r.Prefix == "":
		return errors.New("is missing: a registrar is bound to a path, such as /ns/shop")
	case len(r.Prefix) > maxPrefixBytes:
		return fmt.Errorf("has %d bytes; at most %d", len(r.Prefix), maxPrefixBytes)
	}
	if err := spiffeid.ValidatePath(r.Prefix); err != nil {
		return fmt.Errorf("%q is not the path of a SPIFFE ID: %v", r.Prefix, err)
	}
	return nil
}

// List joins roles for people; "none" where there is none.
func List(roles []Role) string {
	if len(roles) == 0 {
		return "none"
	}
	names := make([]string, len(roles))
	for i, r := range roles {
		names[i] = r.String()
	}
	return strings.Join(names, ", ")
}
