// Trust bundles of other trust domains, one record each. None is ever merged with
// another or with the own one (SPIFFE Federation §4.2): a record is replaced whole
// by a later one of the same trust domain, or removed.

package trust

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/store"
)

// FederatedPrefix is where the store keeps them, by name of the trust domain.
const FederatedPrefix = "trust/federated/"

// MaxFederated is how many trust domains a CA federates with: each is looked up
// for every agent whose entries change.
const MaxFederated = 256

// ErrNoFederated is returned where there is no trust bundle of a trust domain.
var ErrNoFederated = errors.New("no trust bundle of this trust domain is here")

// Federated is the trust bundle of another trust domain. It is immutable.
type Federated struct {
	TrustDomain spiffeid.TrustDomain
	*Document
	// JWKS is the document as it is handed on.
	JWKS  []byte
	SetAt time.Time
	// Revision is the store revision that wrote it.
	Revision uint64
}

type storedFederated struct {
	Version     int             `json:"v"`
	TrustDomain string          `json:"trust_domain"`
	JWKS        json.RawMessage `json:"jwks"`
	SetAt       time.Time       `json:"set_at"`
}

// NewFederated is the trust bundle of td that comes at now. own is the trust domain of
// the CA, whose keys nobody else says (SECURITY.md T22). One without a key that can be
// used is one, too: nobody of td is trusted by it (SPIFFE Trust Domain and Bundle
// §4.1.3).
func NewFederated(own, td spiffeid.TrustDomain, document []byte, now time.Time) (*Federated, error) {
	if td == own {
		return nil, fmt.Errorf("%s is the CA's own trust domain: its trust bundle is made here and nowhere else", td)
	}
	d, err := ParseDocument(td, document)
	if err != nil {
		return nil, err
	}
	jwks, err := d.encode()
	if err != nil {
		return nil, fmt.Errorf("encode the trust bundle of %s: %w", td, err)
	}
	if len(jwks) > MaxDocumentBytes { // it could not be read again
		return nil, fmt.Errorf("as JWKS it has %d bytes; at most %d", len(jwks), MaxDocumentBytes)
	}
	return &Federated{TrustDomain: td, Document: d, JWKS: jwks, SetAt: now.UTC()}, nil
}

// End is when the last of the X.509 authorities ends; zero where there is none.
func (d *Document) End() (end time.Time) {
	for _, cert := range d.X509 {
		if cert.NotAfter.After(end) {
			end = cert.NotAfter
		}
	}
	return end
}

// Empty says whether it vouches for nobody.
func (d *Document) Empty() bool { return len(d.X509)+len(d.JWT) == 0 }

// ended says whether there are X.509 authorities, and all of them have ended.
func (d *Document) ended(now time.Time) bool {
	return len(d.X509) > 0 && now.After(d.End())
}

// DecodeFederated reads the store's record.
func DecodeFederated(kv store.KV) (*Federated, error) {
	var s storedFederated
	if err := json.Unmarshal(kv.Value, &s); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	if s.Version != encodingVersion {
		return nil, fmt.Errorf("decode %s: version %d is not known", kv.Key, s.Version)
	}
	td, err := spiffeid.TrustDomainFromString(s.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	if kv.Key != FederatedPrefix+td.Name() {
		return nil, fmt.Errorf("decode %s: it holds the trust bundle of %s", kv.Key, td)
	}
	d, err := ParseDocument(td, s.JWKS)
	if err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	return &Federated{TrustDomain: td, Document: d, JWKS: s.JWKS, SetAt: s.SetAt, Revision: kv.ModRevision}, nil
}

// Put is the write that makes b the trust bundle of its trust domain.
func (b *Federated) Put() (store.Op, error) {
	value, err := json.Marshal(storedFederated{encodingVersion, b.TrustDomain.Name(), b.JWKS, b.SetAt})
	if err != nil {
		return store.Op{}, fmt.Errorf("encode the trust bundle of %s: %w", b.TrustDomain, err)
	}
	return store.Put(FederatedPrefix+b.TrustDomain.Name(), value), nil
}

// Digest says in hex which document it is.
func (b *Federated) Digest() string {
	sum := sha256.Sum256(b.JWKS)
	return hex.EncodeToString(sum[:])
}

// OrderError is the refusal of a trust bundle that is not later than what is held.
type OrderError struct {
	Kind   string // one of the words below
	Reason string
}

// Kinds of an OrderError.
const (
	Older        = "older"
	SameSequence = "same_sequence" // with other keys
	NoSequence   = "no_sequence"   // after one that had one
	Ended        = "ended"         // every root in it has
)

// Error implements error.
func (e *OrderError) Error() string { return e.Reason }

// CheckFollows says why b must not take the place of held, which may be nil, as an
// *OrderError: sequence numbers rise with every change (SPIFFE Trust Domain and
// Bundle §4.1.1), so a lower one is an old document, by mistake or by somebody who
// wants a withdrawn key back (SECURITY.md T23). One whose roots have all ended is old,
// unless its number says that it is later.
func (b *Federated) CheckFollows(held *Federated) error {
	switch {
	case held != nil && (b.Sequence > held.Sequence || b.Digest() == held.Digest()):
		return nil
	case b.ended(b.SetAt):
		return &OrderError{Ended, fmt.Sprintf("every X.509 authority in this document has ended, the first at %s: it is old", b.X509[0].NotAfter.UTC().Format(time.RFC3339))}
	case held == nil:
		return nil
	case b.Sequence == 0 && held.Sequence == 0:
		return nil // neither says which is later
	case b.Sequence == 0:
		return &OrderError{NoSequence, fmt.Sprintf("the trust bundle of %s that is here has the sequence number %d, and this document has none: whether it is later cannot be told", b.TrustDomain, held.Sequence)}
	case b.Sequence == held.Sequence:
		return &OrderError{SameSequence, fmt.Sprintf("the trust bundle of %s that is here has the same sequence number %d and other keys", b.TrustDomain, held.Sequence)}
	}
	return &OrderError{Older, fmt.Sprintf("the trust bundle of %s that is here has the sequence number %d, and this document %d: it is older", b.TrustDomain, held.Sequence, b.Sequence)}
}
