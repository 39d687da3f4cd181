// Trust bundles of other trust domains: which of them the node has, and which a
// workload may have. Each vouches for its own trust domain alone; none is ever the
// own one.

package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"merlon.dev/ca/capb"
)

// Federated is the trust bundle of another trust domain. It is immutable.
type Federated struct {
	TrustDomain spiffeid.TrustDomain
	// Bundle is not to be changed.
	Bundle *spiffebundle.Bundle
	// X509 holds the X.509 authorities, DER, one after the other; JWKS the JWT
	// authorities only. Either is empty where there are none: whoever is told of no
	// trust bundle trusts nobody, in each implementation.
	X509, JWKS []byte
	// Version says which document it is. Sequence numbers do not: not every document
	// has one.
	Version string

	wire []byte // as the CA sent it, for the disk
}

// parseFederated reads the trust bundle of another trust domain than own.
func parseFederated(pb *capb.TrustBundle, own spiffeid.TrustDomain) (*Federated, error) {
	td, err := spiffeid.TrustDomainFromString(pb.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	if td == own {
		return nil, errors.New("it claims to be of the own trust domain") // SECURITY.md T22
	}
	b, err := spiffebundle.Parse(td, pb.GetJwks())
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(pb.GetJwks())
	f := &Federated{TrustDomain: td, Bundle: b, Version: hex.EncodeToString(sum[:8])}
	for _, cert := range b.X509Authorities() {
		f.X509 = append(f.X509, cert.Raw...)
	}
	if keys := b.JWTAuthorities(); len(keys) > 0 {
		if f.JWKS, err = spiffebundle.FromJWTAuthorities(td, keys).Marshal(); err != nil {
			return nil, err
		}
	}
	f.wire, err = proto.Marshal(pb)
	return f, err
}

// takeFederated makes the trust bundles of an update the ones that are held, all
// others are forgotten. One that makes no sense is logged and left out: nobody of
// its trust domain is trusted then. c.mu is held.
func (c *Cache) takeFederated(ctx context.Context, pbs []*capb.TrustBundle) {
	next := make(map[string]*Federated, len(pbs))
	for _, pb := range pbs {
		f, err := parseFederated(pb, c.td)
		if err != nil {
			c.log.LogAttrs(ctx, slog.LevelError, "federated trust bundle from the CA refused",
				slog.String("trust_domain", pb.GetTrustDomain()), slog.Any("err", err))
			continue
		}
		next[f.TrustDomain.Name()] = f
	}
	same := func(a, b *Federated) bool { return bytes.Equal(a.wire, b.wire) }
	if maps.EqualFunc(c.federated, next, same) {
		return
	}
	for name, f := range next {
		if held := c.federated[name]; held == nil || !same(held, f) {
			c.log.LogAttrs(ctx, slog.LevelInfo, "federated trust bundle changed", slog.String("trust_domain", name), slog.String("version", f.Version))
		}
	}
	for name := range c.federated {
		if next[name] == nil {
			c.log.LogAttrs(ctx, slog.LevelInfo, "federated trust bundle withdrawn", slog.String("trust_domain", name))
		}
	}
	c.federated = next
	c.notifyAll()
	signal(c.changed)
}

// federatedOf are the trust bundles that who has the entries may have, by trust
// domain, in order. c.mu is held, or held shared.
func (c *Cache) federatedOf(entries []*Entry) (out []*Federated) {
	var names []string
	for _, e := range entries {
		names = append(names, e.FederatesWith...)
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		if f := c.federated[name]; f != nil {
			out = append(out, f)
		}
	}
	return out
}

// FederationWaiting are those of e's trust domains of which there is no trust bundle.
func (c *Cache) FederationWaiting(e *Entry) (names []string) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for _, name := range e.FederatesWith {
		if c.federated[name] == nil {
			names = append(names, name)
		}
	}
	return names
}

// JWTBundles are the trust bundles by which who has the entries may validate
// JWT-SVIDs; nil before there is an own one.
func (c *Cache) JWTBundles(entries []*Entry) jwtbundle.Source {
	trust := c.trust.Load()
	if trust == nil {
		return nil
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	return trustOf{own: trust, federated: c.federatedOf(entries)}
}

// trustOf is the trust of one caller.
type trustOf struct {
	own       *Trust
	federated []*Federated
}

// GetJWTBundleForTrustDomain implements jwtbundle.Source.
func (t trustOf) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	if td == t.own.Bundle.TrustDomain() {
		return t.own.Bundle.JWTBundle(), nil
	}
	for _, f := range t.federated {
		if f.TrustDomain == td {
			return f.Bundle.JWTBundle(), nil
		}
	}
	return nil, fmt.Errorf("the caller's registration entries do not federate with %s, or its trust bundle is not here", td.Name())
}
