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
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/store"
)

// Key is where the store keeps the trust bundle.
const Key = "trust/bundle"

// RefreshHint is how often those who poll the trust bundle should, unless the
// configuration says otherwise.
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
	// Tainted are the IDs of keys that are in it for now: agents replace what
	// they have signed.
	Tainted []string
	// Revision is the store revision that wrote it.
	Revision uint64
}

// Document is what it says as others' trust bundles do.
func (b *Bundle) Document() *Document {
	return &Document{Sequence: b.Sequence, RefreshHint: b.Hint(), X509: b.Keys.X509Authorities(), JWT: b.Keys.JWTAuthorities()}
}

// Hint is how often those who poll it should.
func (b *Bundle) Hint() time.Duration {
	if hint, ok := b.Keys.RefreshHint(); ok {
		return hint
	}
	return RefreshHint
}

type stored struct {
	Version     int             `json:"v"`
	TrustDomain string          `json:"trust_domain"`
	Sequence    uint64          `json:"sequence"`
	JWKS        json.RawMessage `json:"jwks"`
	Tainted     []string        `json:"tainted,omitempty"`
}

// content is what a sequence number stands for.
type content struct {
	keys    *spiffebundle.Bundle
	tainted []string
	hint    time.Duration
}

// ErrOtherRoot is returned where a CA wants to publish keys under a root that
// the published trust bundle does not hold.
var ErrOtherRoot = errors.New("the store belongs to a CA with another root")

// Publish adds keys to the published content and returns what is published
// then. Only eviction takes a key away (Plan): replicas publish side by side,
// each its own. The first ever brings the root with it; later ones must have
// that root, or get ErrOtherRoot.
func Publish(ctx context.Context, st store.Store, keys *spiffebundle.Bundle) (*Bundle, error) {
	for range maxAttempts {
		change, err := Plan(ctx, st, keys.TrustDomain(), func(published *spiffebundle.Bundle) error { return Add(published, keys) })
		if err != nil {
			return nil, err
		}
		if len(change.Ops) == 0 {
			return change.Bundle, nil
		}
		res, err := st.Txn(ctx, []store.Cmp{change.Cmp}, change.Ops, nil)
		if err != nil {
			return nil, fmt.Errorf("write the trust bundle: %w", err)
		}
		if res.Succeeded {
			change.Bundle.Revision = res.Revision
			return change.Bundle, nil
		}
	}
	return nil, errors.New("publish the trust bundle: others keep changing it")
}

// Add puts keys into published, an editable copy of what is published.
func Add(published, keys *spiffebundle.Bundle) error {
	for _, root := range keys.X509Authorities() {
		if !published.HasX509Authority(root) && !published.Empty() {
			return ErrOtherRoot
		}
		published.AddX509Authority(root)
	}
	for kid, key := range keys.JWTAuthorities() {
		if err := published.AddJWTAuthority(kid, key); err != nil {
			return fmt.Errorf("add a JWT key to the trust bundle: %w", err)
		}
	}
	return nil
}

// Change is the next trust bundle as a part of a transaction.
type Change struct {
	// Bundle is what is published after it; where that is new, Revision is not
	// known yet.
	Bundle *Bundle
	// Cmp holds while nobody else changes the trust bundle.
	Cmp store.Cmp
	// Ops write it; none where the content stays as it is.
	Ops []store.Op
}

// Plan prepares the change that edit makes to what is published, an empty
// bundle at first. Content that is published already keeps its sequence number;
// other content gets the next one, and Cmp sees to it that two replicas never
// give one number to two contents. In a store that was restored (store.Epoch)
// the same content gets a number too: others may have seen a later one that is
// lost.
func Plan(ctx context.Context, st store.Store, td spiffeid.TrustDomain, edit func(published *spiffebundle.Bundle) error) (*Change, error) {
	return plan(ctx, st, td, func(c *content) error { return edit(c.keys) })
}

func plan(ctx context.Context, st store.Store, td spiffeid.TrustDomain, edit func(*content) error) (*Change, error) {
	current, err := Current(ctx, st)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	change := &Change{Cmp: store.Cmp{Key: Key}}
	next := content{keys: spiffebundle.New(td), hint: RefreshHint}
	if current != nil {
		if current.TrustDomain != td {
			return nil, fmt.Errorf("the store belongs to trust domain %s, and this CA is configured for %s", current.TrustDomain, td)
		}
		change.Cmp.ModRevision = current.Revision
		next = current.content()
	}
	if err := edit(&next); err != nil {
		return nil, err
	}
	revision, err := st.Revision(ctx)
	if err != nil {
		return nil, fmt.Errorf("publish the trust bundle: %w", err)
	}
	if current != nil && !store.BeforeEpoch(revision, current.Sequence) && current.content().equal(next) {
		change.Bundle = current
		return change, nil
	}
	if change.Bundle, err = successor(current, next, revision); err != nil {
		return nil, err
	}
	op, err := change.Bundle.put()
	change.Ops = []store.Op{op}
	return change, err
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
	return &Bundle{TrustDomain: td, Sequence: s.Sequence, JWKS: s.JWKS, Keys: keys, Tainted: s.Tainted, Revision: kv.ModRevision}, nil
}

// content returns what is published, to be edited.
func (b *Bundle) content() content {
	hint, ok := b.Keys.RefreshHint()
	if !ok {
		hint = RefreshHint
	}
	return content{keys: b.Keys.Clone(), tainted: b.Tainted, hint: hint}
}

func (c content) equal(other content) bool {
	a, b := c.keys.Clone(), other.keys.Clone()
	for _, x := range []*spiffebundle.Bundle{a, b} {
		x.ClearSequenceNumber()
		x.ClearRefreshHint()
	}
	return a.Equal(b) && slices.Equal(c.tainted, other.tainted) && c.hint == other.hint
}

// successor gives content the number after current's in the epoch of revision.
func successor(current *Bundle, c content, revision uint64) (*Bundle, error) {
	var last uint64
	if current != nil {
		last = current.Sequence
	}
	next := &Bundle{TrustDomain: c.keys.TrustDomain(), Sequence: store.InEpoch(revision, last), Keys: c.keys.Clone(), Tainted: c.tainted}
	next.Keys.SetSequenceNumber(next.Sequence)
	next.Keys.SetRefreshHint(c.hint)
	var err error
	if next.JWKS, err = next.Keys.Marshal(); err != nil {
		return nil, fmt.Errorf("encode the trust bundle: %w", err)
	}
	return next, nil
}

// Encode returns the bundle as it is stored.
func (b *Bundle) Encode() ([]byte, error) {
	op, err := b.put()
	return op.Value, err
}

func (b *Bundle) put() (store.Op, error) {
	value, err := json.Marshal(stored{Version: encodingVersion, TrustDomain: b.TrustDomain.Name(), Sequence: b.Sequence, JWKS: b.JWKS, Tainted: b.Tainted})
	if err != nil {
		return store.Op{}, fmt.Errorf("encode the trust bundle: %w", err)
	}
	return store.Put(Key, value), nil
}
