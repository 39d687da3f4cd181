// Whom a client expects at the other end. A target is a type of its own, so
// that a host name can never be taken for an identity, and its zero value
// names nobody.

package sdk

import (
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Target names the one SPIFFE ID that a client expects of a server. There is
// no target that accepts any peer; the zero value accepts none. Make one with
// [Service] or [ID].
type Target struct {
	service string // path below the own trust domain, without the leading slash
	id      spiffeid.ID
	err     error
}

// Service is the service of that name in the own trust domain: "orders" means
// spiffe://TRUST-DOMAIN/orders, "ns/shop/orders" has more segments. A
// malformed name makes every connection fail with the reason.
func Service(name string) Target {
	if name == "" {
		return Target{err: errors.New(`sdk.Service(""): the service has no name`)}
	}
	if err := spiffeid.ValidatePath("/" + name); err != nil {
		return Target{err: fmt.Errorf("sdk.Service(%q): %w", name, err)}
	}
	return Target{service: name}
}

// ID is the workload with exactly this SPIFFE ID, e.g.
// "spiffe://shop.test/orders", also in a federated trust domain. A malformed
// ID makes every connection fail with the reason.
func ID(id string) Target {
	parsed, err := spiffeid.FromString(id)
	switch {
	case err != nil:
		return Target{err: fmt.Errorf("sdk.ID(%q): %w", id, err)}
	case parsed.Path() == "":
		return Target{err: fmt.Errorf("sdk.ID(%q): names a trust domain, not a workload", id)}
	}
	return Target{id: parsed}
}

// String is what the target was made from, for messages.
func (t Target) String() string {
	switch {
	case t.err != nil:
		return "invalid target"
	case t.service != "":
		return t.service
	case !t.id.IsZero():
		return t.id.String()
	}
	return "no target"
}

// resolve gives the expected SPIFFE ID, seen from a member of trust domain td.
func (t Target) resolve(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	switch {
	case t.err != nil:
		return spiffeid.ID{}, t.err
	case !t.id.IsZero():
		return t.id, nil
	case t.service != "":
		return spiffeid.FromPath(td, "/"+t.service)
	}
	return spiffeid.ID{}, errors.New("the zero sdk.Target names nobody: use sdk.Service or sdk.ID")
}
