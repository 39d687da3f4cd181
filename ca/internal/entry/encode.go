// The stable form of an entry in the store: JSON with a version.

package entry

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/role"
)

const (
	encodingVersion = 1
	// deliveryVersion is that of an entry that keeps a key from being handed out: a
	// Merlon that does not know the field must not read it without.
	deliveryVersion = 2
)

// ErrNewer says that a record was written by a Merlon that knows more.
var ErrNewer = errors.New("written by a newer Merlon than this one")

type stored struct {
	Version     int         `json:"v"`
	ID          string      `json:"id"`
	SPIFFEID    spiffeid.ID `json:"spiffe_id"`
	ParentID    spiffeid.ID `json:"parent_id"`
	Selectors   []string    `json:"selectors"`
	X509SVIDTTL int64       `json:"x509_svid_ttl_ns,omitempty"`
	JWTSVIDTTL  int64       `json:"jwt_svid_ttl_ns,omitempty"`
	DNSNames    []string    `json:"dns_names,omitempty"`
	CommonName  string      `json:"common_name,omitempty"`
	Hint        string      `json:"hint,omitempty"`
	KeyDelivery KeyDelivery `json:"key_delivery,omitempty"`
	// FederatesWith: a Merlon that does not know it trusts fewer.
	FederatesWith []string `json:"federates_with,omitempty"`
	// Admin is the role operator, as every Merlon writes it; Role is any other:
	// one that does not know it reads an entry without power.
	Admin      bool      `json:"admin,omitempty"`
	Role       role.Name `json:"role,omitempty"`
	RolePrefix string    `json:"role_prefix,omitempty"`
	ExpiresAt  time.Time `json:"expires_at,omitzero"`
	CreatedAt  time.Time `json:"created_at,omitzero"`
}

// Encode returns the form in which the store keeps e, without its Revision.
func Encode(e *Entry) ([]byte, error) {
	s := stored{
		Version: encodingVersion, ID: e.ID, SPIFFEID: e.SPIFFEID, ParentID: e.ParentID,
		X509SVIDTTL: int64(e.X509SVIDTTL), JWTSVIDTTL: int64(e.JWTSVIDTTL),
		DNSNames: e.DNSNames, CommonName: e.CommonName, Hint: e.Hint, KeyDelivery: e.KeyDelivery, FederatesWith: e.FederatesWith,
		Admin: e.Role.Name == role.Operator, Role: e.Role.Name, RolePrefix: e.Role.Prefix,
		ExpiresAt: e.ExpiresAt.UTC(), CreatedAt: e.CreatedAt.UTC(),
	}
	if s.Admin {
		s.Role = ""
	}
	if e.KeyDelivery != ByAgent {
		s.Version = deliveryVersion
	}
	for _, sel := range e.Selectors {
		s.Selectors = append(s.Selectors, sel.String())
	}
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode registration entry %s: %w", e.ID, err)
	}
	return b, nil
}
