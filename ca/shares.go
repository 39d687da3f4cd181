// What a caller gets of a policy bundle: an agent the grants that its node needs, and
// nobody else's; administrators, and stock OPAs by their tokens, the whole.

package ca

import (
	"crypto/sha256"
	"fmt"
	"sync"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/release"
	"merlon.dev/policy/bundle"
)

const (
	// maxWholes is how many generations are kept taken apart: of a bundle and its
	// candidate, before and after a push.
	maxWholes = 4
	// maxShares is how many shares of one generation are kept. Where nodes' services come
	// and go, most of them nobody asks for any more.
	maxShares = 16384
)

// audienceOf are the destinations whose share c gets, sorted; nil for the whole.
// Who may read policy as an administrator is no agent in this.
func (b bundles) audienceOf(c *api.Caller) []string {
	if c == nil || c.Agent == nil || b.service.Permits(c, capb.Admin_GetPolicy_FullMethodName) {
		return nil
	}
	return b.registry.Identities(c.Agent.ID, time.Now())
}

// shares makes shares of signed bundles, and keeps them. It is safe for concurrent
// use.
type shares struct {
	policy *policyKeys

	mu sync.Mutex
	// guarded by mu
	wholes []*whole // the one that was asked for last in front
}

// whole is one generation, and the shares of it that were asked for.
type whole struct {
	etag   string
	opened made[*opened]
	mu     sync.Mutex
	signed map[[sha256.Size]byte]*made[*bundle.Published] // guarded by mu; by audience
}

// opened is a generation taken apart.
type opened struct {
	parts *bundle.Shares
	md    bundle.Metadata
}

// made is what is made once for all who ask. What could not be made is tried again for
// the next: a key of another replica may be known by then, or the device that signs
// be back.
type made[T any] struct {
	mu sync.Mutex
	// guarded by mu
	done  bool
	value T
}

func (m *made[T]) get(do func() (T, error)) (T, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.done {
		return m.value, nil
	}
	value, err := do()
	if err == nil {
		m.value, m.done = value, true
	}
	return value, err
}

// of is the share of audience in the bundle called name, whose signed bytes are raw
// under etag.
func (s *shares) of(name string, candidate bool, raw []byte, etag string, audience []string) (*bundle.Published, error) {
	w := s.whole(etag)
	o, err := w.opened.get(func() (*opened, error) {
		return open(raw, s.policy, bundle.Expect{Name: name, TrustDomain: s.policy.trustDomain, Candidate: candidate})
	})
	if err != nil {
		return nil, fmt.Errorf("take policy bundle %s apart: %w", name, err)
	}
	return w.part(hashOf(audience)).get(func() (*bundle.Published, error) { return o.sign(s.policy, audience) })
}

func (s *shares) whole(etag string) *whole {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, w := range s.wholes {
		if w.etag == etag {
			copy(s.wholes[1:i+1], s.wholes[:i])
			s.wholes[0] = w
			return w
		}
	}
	w := &whole{etag: etag, signed: map[[sha256.Size]byte]*made[*bundle.Published]{}}
	s.wholes = append([]*whole{w}, s.wholes[:min(len(s.wholes), maxWholes-1)]...)
	return w
}

// open takes apart what one of the CA's keys has signed: who can write the store
// alone must not have his policy signed.
func open(raw []byte, keys *policyKeys, want bundle.Expect) (*opened, error) {
	c, err := bundle.Verify(raw, keys.verifiers(), want)
	if err != nil {
		return nil, err
	}
	return &opened{parts: bundle.NewShares(c), md: c.Metadata}, nil
}

func (w *whole) part(audience [sha256.Size]byte) *made[*bundle.Published] {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p := w.signed[audience]; p != nil {
		return p
	}
	if len(w.signed) >= maxShares {
		for some := range w.signed {
			delete(w.signed, some)
			break
		}
	}
	p := new(made[*bundle.Published])
	w.signed[audience] = p
	return p
}

func (o *opened) sign(keys *policyKeys, audience []string) (*bundle.Published, error) {
	unsigned, err := o.parts.Of(audience)
	if err != nil {
		return nil, err
	}
	signed, err := keys.signFor(audience, unsigned, release.Seal{
		Name: o.md.Name, Generation: o.md.Generation, IssuedAt: o.md.IssuedAt, NotAfter: o.md.NotAfter, Candidate: o.md.Candidate,
	})
	if err != nil {
		return nil, err
	}
	// The same at each replica, though each signs anew.
	h := sha256.New()
	h.Write(unsigned)
	sum := hashOf(audience)
	h.Write(sum[:])
	return &bundle.Published{Raw: signed, ETag: fmt.Sprintf("%q", fmt.Sprintf("%d-%.12x", o.md.Generation, h.Sum(nil))), Generation: o.md.Generation}, nil
}

func hashOf(audience []string) [sha256.Size]byte {
	h := sha256.New()
	for _, id := range audience {
		h.Write([]byte(id))
		h.Write([]byte{0}) // which no SPIFFE ID has
	}
	return [sha256.Size]byte(h.Sum(nil))
}
