// Package trust keeps the trust bundle of the CA's own trust domain in the
// store: one record whose sequence number rises with every change of content,
// also across restarts, so that everyone downstream can tell old from new
// (SPIFFE Trust Domain and Bundle §4.1.1).
package trust

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/store"
)

// Key is where the store keeps the trust bundle.
const Key = "trust/bundle"

// RefreshHint is how often those who poll the trust bundle should.
const RefreshHint = 5 * time.Minute

const (
	encodingVersion = 1
	maxAttempts     = 16
)

// Bundle is the trust bundle as published. It is immutable; do not change what
// its fields point to.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	Sequence    uint64
	// JWKS is the SPIFFE trust bundle document.
	JWKS []byte
	// Keys is JWKS parsed.
	Keys *spiffebundle.Bundle
	// Revision is the store revision that wrote it.
	Revision uint64
}

type stored struct {
	Version     int             `json:"v"`
	TrustDomain string          `json:"trust_domain"`
	Sequence    uint64          `json:"sequence"`
	JWKS        json.RawMessage `json:"jwks"`
}

// Publish makes keys the published content and returns what is published then.
// Content that is published already keeps its sequence number; other content
// gets the next one, by compare-and-swap, so that two replicas never give one
// number to two contents. In a store that was restored (store.Epoch) the same
// content gets a number too: others may have seen a later one that is lost.
func Publish(ctx context.Context, st store.Store, keys *spiffebundle.Bundle) (*Bundle, error) {
	for range maxAttempts {
		current, err := Current(ctx, st)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return nil, err
		}
		if current != nil && current.TrustDomain != keys.TrustDomain() {
			return nil, fmt.Errorf("the store belongs to trust domain %s, and this CA is configured for %s", current.TrustDomain, keys.TrustDomain())
		}
		revision, err := st.Revision(ctx)
		if err != nil {
			return nil, fmt.Errorf("publish the trust bundle: %w", err)
		}
		if current != nil && !store.BeforeEpoch(revision, current.Sequence) && sameKeys(current.Keys, keys) {
			return current, nil
		}
		next, err := successor(current, keys, revision)
		if err != nil {
			return nil, err
		}
		if written, err := next.write(ctx, st, current); err != nil || written {
			return next, err
		}
	}
	return nil, errors.New("publish the trust bundle: others keep changing it")
}

// Current reads the published trust bundle; store.ErrNotFound before the first.
func Current(ctx context.Context, st store.Store) (*Bundle, error) {
	kv, _, err := st.Get(ctx, Key)
	if err != nil {
		return nil, fmt.Errorf("read the trust bundle: %w", err)
	}
	return Decode(kv)
}

// Decode reads the store's record.
func Decode(kv store.KV) (*Bundle, error) {
	var s stored
	if err := json.Unmarshal(kv.Value, &s); err != nil {
		return nil, fmt.Errorf("decode the trust bundle: %w", err)
	}
	if s.Version != encodingVersion {
		return nil, fmt.Errorf("decode the trust bundle: version %d is not known", s.Version)
	}
	td, err := spiffeid.TrustDomainFromString(s.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("decode the trust bundle: %w", err)
	}
	keys, err := spiffebundle.Parse(td, s.JWKS)
	if err != nil {
		return nil, fmt.Errorf("decode the trust bundle: %w", err)
	}
	return &Bundle{TrustDomain: td, Sequence: s.Sequence, JWKS: s.JWKS, Keys: keys, Revision: kv.ModRevision}, nil
}

// sameKeys compares the keys alone.
func sameKeys(a, b *spiffebundle.Bundle) bool {
	a, b = a.Clone(), b.Clone()
	for _, x := range []*spiffebundle.Bundle{a, b} {
		x.ClearSequenceNumber()
		x.ClearRefreshHint()
	}
	return a.Equal(b)
}

// successor gives keys the number after current's in the epoch of revision.
func successor(current *Bundle, keys *spiffebundle.Bundle, revision uint64) (*Bundle, error) {
	var last uint64
	if current != nil {
		last = current.Sequence
	}
	next := &Bundle{TrustDomain: keys.TrustDomain(), Sequence: store.InEpoch(revision, last), Keys: keys.Clone()}
	next.Keys.SetSequenceNumber(next.Sequence)
	next.Keys.SetRefreshHint(RefreshHint)
	var err error
	if next.JWKS, err = next.Keys.Marshal(); err != nil {
		return nil, fmt.Errorf("encode the trust bundle: %w", err)
	}
	return next, nil
}

func (b *Bundle) write(ctx context.Context, st store.Store, current *Bundle) (bool, error) {
	value, err := json.Marshal(stored{Version: encodingVersion, TrustDomain: b.TrustDomain.Name(), Sequence: b.Sequence, JWKS: b.JWKS})
	if err != nil {
		return false, fmt.Errorf("encode the trust bundle: %w", err)
	}
	cmp := store.Cmp{Key: Key}
	if current != nil {
		cmp.ModRevision = current.Revision
	}
	res, err := st.Txn(ctx, []store.Cmp{cmp}, []store.Op{store.Put(Key, value)}, nil)
	if err != nil {
		return false, fmt.Errorf("write the trust bundle: %w", err)
	}
	b.Revision = res.Revision
	return res.Succeeded, nil
}
