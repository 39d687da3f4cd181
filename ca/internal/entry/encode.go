// The stable form of an entry in the store: JSON with a version.

package entry

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const encodingVersion = 1

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
	Admin       bool        `json:"admin,omitempty"`
	ExpiresAt   time.Time   `json:"expires_at,omitzero"`
	CreatedAt   time.Time   `json:"created_at,omitzero"`
}

// Encode returns the form in which the store keeps e, without its Revision.
func Encode(e *Entry) ([]byte, error) {
	s := stored{
		Version: encodingVersion, ID: e.ID, SPIFFEID: e.SPIFFEID, ParentID: e.ParentID,
		X509SVIDTTL: int64(e.X509SVIDTTL), JWTSVIDTTL: int64(e.JWTSVIDTTL),
		DNSNames: e.DNSNames, CommonName: e.CommonName, Hint: e.Hint, Admin: e.Admin,
		ExpiresAt: e.ExpiresAt.UTC(), CreatedAt: e.CreatedAt.UTC(),
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

// Decode reads what Encode wrote. Bytes of a newer version are an error: what
// an unknown field would have narrowed must not be widened by ignoring it.
func Decode(b []byte) (*Entry, error) {
	var s stored
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("decode registration entry: %w", err)
	}
	if s.Version != encodingVersion {
		return nil, fmt.Errorf("decode registration entry %q: version %d is not known; this Merlon writes %d", s.ID, s.Version, encodingVersion)
	}
	e := &Entry{
		ID: s.ID, SPIFFEID: s.SPIFFEID, ParentID: s.ParentID,
		X509SVIDTTL: time.Duration(s.X509SVIDTTL), JWTSVIDTTL: time.Duration(s.JWTSVIDTTL),
		DNSNames: s.DNSNames, CommonName: s.CommonName, Hint: s.Hint, Admin: s.Admin,
		ExpiresAt: s.ExpiresAt, CreatedAt: s.CreatedAt,
	}
	for _, text := range s.Selectors {
		sel, err := ParseSelector(text)
		if err != nil {
			return nil, fmt.Errorf("decode registration entry %s: %w", s.ID, err)
		}
		e.Selectors = append(e.Selectors, sel)
	}
	return e, nil
}
