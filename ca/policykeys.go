// The keys that sign policy bundles: those of all replicas whose record holds a
// certificate of the root's. Each replica signs with its own, and announces all.

package ca

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/policy/bundle"
)

// policyKeys is safe for concurrent use.
type policyKeys struct {
	realm       uint32
	trustDomain string
	keys        *upstream.Keys
	registry    *registry.Registry

	mu sync.Mutex
	// guarded by mu
	records []*replica.Record // what live was made from
	live    []replica.PolicyKey
	until   time.Time // when live is judged anew
}

// policyKeysLife is how long verified certificates stay good without a look at
// their end.
const policyKeysLife = time.Minute

// all returns the keys that count, our own first. Do not change them.
func (p *policyKeys) all() []replica.PolicyKey {
	records, now := p.registry.Replicas(), time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live != nil && now.Before(p.until) && slices.Equal(records, p.records) {
		return p.live
	}
	// The roots are our own, from disk: the trust bundle in the store is what
	// somebody who can write there would change first.
	roots := p.keys.Anchors()
	var live []replica.PolicyKey
	own, err := replica.VerifyPolicyCertificate(p.keys.PolicyCertificate(), roots, now)
	if err == nil {
		live = append(live, own)
	}
	for _, rec := range records {
		if rec.Realm != p.realm {
			continue // a nested CA signs the policy of its own agents
		}
		// One that no root vouches for is as good as none.
		if key, err := rec.PolicyKey(roots, now); err == nil && key.KID != own.KID {
			live = append(live, key)
		}
	}
	p.records, p.live, p.until = records, live, now.Add(policyKeysLife)
	return live
}

// publisher publishes policy bundles signed by our key.
func (s *Server) publisher(st store.Store, p *policyKeys) *release.Publisher {
	return release.New(release.Options{
		Store: st, Log: s.log, MaxBytes: bundle.MaxBytes,
		Keys: func() []release.Key {
			var keys []release.Key
			for _, k := range p.all() {
				keys = append(keys, release.Key{KID: k.KID, PKIX: k.PKIX})
			}
			return keys
		},
		Check: func(unsigned []byte) error {
			_, err := bundle.Check(unsigned)
			return err
		},
		Sign: p.sign,
		Unsign: func(signed []byte, name string, candidate bool) ([]byte, error) {
			return p.unsign(signed, name, candidate, p.all()...)
		},
	})
}

func (p *policyKeys) sign(unsigned []byte, seal release.Seal) ([]byte, error) {
	return p.signFor(nil, unsigned, seal)
}

// signFor signs for these destinations alone; none means all.
func (p *policyKeys) signFor(audience []string, unsigned []byte, seal release.Seal) ([]byte, error) {
	kid, signer := p.keys.Policy()
	return bundle.Sign(unsigned, bundle.Metadata{
		Audience: audience,
		Name:     seal.Name, TrustDomain: p.trustDomain, Generation: seal.Generation, IssuedAt: seal.IssuedAt, NotAfter: seal.NotAfter,
		Candidate: seal.Candidate,
	}, kid, signer)
}

// unsign gives back what one of keys signed as the bundle called name, or as its
// candidate.
func (p *policyKeys) unsign(signed []byte, name string, candidate bool, keys ...replica.PolicyKey) ([]byte, error) {
	if len(keys) == 0 {
		return nil, errors.New("no key is known that signs policy")
	}
	return bundle.Unsign(signed, verifiersOf(keys), bundle.Expect{Name: name, TrustDomain: p.trustDomain, Candidate: candidate})
}

// verifiers are the keys that verify what this CA and its replicas sign.
func (p *policyKeys) verifiers() []bundle.Key { return verifiersOf(p.all()) }

func verifiersOf(keys []replica.PolicyKey) (by []bundle.Key) {
	for _, k := range keys {
		by = append(by, bundle.Key{KID: k.KID, PublicKey: k.Public})
	}
	return by
}

// reseal signs the current bundles again that key signed.
func (p *parts) reseal(ctx context.Context, key replica.PolicyKey) ([]*release.Head, error) {
	return p.releases.Reseal(ctx, time.Now(), func(signed []byte, name string, candidate bool) ([]byte, error) {
		return p.policy.unsign(signed, name, candidate, key)
	})
}
