// Whether an intermediate that an upstream authority signed is one to issue with:
// its own profile, its way to the root, and, whatever the upstream put into the
// certificates above it, that an SVID under it passes our own strict verifier.

package upstream

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/svid"
)

// upstreamLeeway is how much longer than asked an intermediate may live: clocks.
const upstreamLeeway = 5 * time.Minute

// checkUpstream compares what an upstream signed with the profile. It may be
// laxer where SPIFFE leaves it to the upstream: path length, and the name
// constraint, whose absence the log tells.
func checkUpstream(got, want *x509.Certificate, now time.Time) error {
	const sign, crl = x509.KeyUsageCertSign, x509.KeyUsageCRLSign
	key, ok := want.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case got == nil:
		return errors.New("there is none")
	case !ok || !key.Equal(got.PublicKey):
		return errors.New("it has another key than the one it was asked for")
	case !got.IsCA || !got.BasicConstraintsValid:
		return errors.New("it is a leaf, no signing certificate (X8): the upstream's template or role must set CA:TRUE")
	case got.KeyUsage&sign == 0 || got.KeyUsage&^(sign|crl) != 0:
		return fmt.Errorf("its key usage is %#x, not keyCertSign, with or without cRLSign, alone (X11)", int(got.KeyUsage))
	case len(got.URIs) != 1 || got.URIs[0].String() != want.URIs[0].String():
		return fmt.Errorf("it carries the URI names %v, not %s alone (X6): the upstream must take them over from the request", got.URIs, want.URIs[0])
	case len(got.DNSNames)+len(got.EmailAddresses)+len(got.IPAddresses) > 0:
		return errors.New("it carries further names, which nobody asked for")
	case got.NotAfter.After(want.NotAfter.Add(upstreamLeeway)):
		return fmt.Errorf("it lives until %s, longer than was asked for", got.NotAfter.Format(time.RFC3339))
	case !now.Before(got.NotAfter) || now.Before(got.NotBefore):
		return fmt.Errorf("it is valid from %s to %s, not now: compare the clocks", got.NotBefore.Format(time.RFC3339), got.NotAfter.Format(time.RFC3339))
	case len(got.PermittedURIDomains) > 0 && !slices.Equal(got.PermittedURIDomains, want.PermittedURIDomains):
		return fmt.Errorf("its name constraint permits %v, not %v", got.PermittedURIDomains, want.PermittedURIDomains)
	case len(got.SubjectKeyId) == 0:
		return errors.New("it has no subject key ID")
	}
	return nil
}

// probe issues a leaf that nobody gets and verifies it: path lengths, name
// constraints and key usages of all that is above count here.
func probe(a *authority.X509Authority, td spiffeid.TrustDomain, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := svid.NewSerial(0, 0)
	if err != nil {
		return err
	}
	id, err := spiffeid.FromPath(td, "/merlon-probe")
	if err != nil {
		return err
	}
	leaf, err := a.Issue(authority.LeafRequest{SPIFFEID: id, PublicKey: key.Public(), Serial: serial, TTL: time.Minute, Now: now})
	if err != nil {
		return fmt.Errorf("no SVID can be issued under it: %w", err)
	}
	chain := [][]byte{leaf.DER}
	for _, c := range a.Chain {
		chain = append(chain, c.Raw)
	}
	if _, err := svid.VerifyRawChain(chain, x509bundle.FromX509Authorities(td, []*x509.Certificate{a.Root}), now); err != nil {
		return fmt.Errorf("an SVID under it would be refused by everybody: %w", err)
	}
	return nil
}

// openUpstream loads the intermediate, if there is one that still holds, or has one
// signed. An upstream that is away is no reason not to start with the one at hand.
func (k *Keys) openUpstream(ctx context.Context, now time.Time) error {
	gen, err := k.dir.newest(kindIntermediate)
	if err != nil {
		return err
	}
	if gen != nil {
		if len(gen.chain) == 0 || !gen.chain[len(gen.chain)-1].Equal(k.external.root) {
			return fmt.Errorf("%w than upstream_root_file says", ErrOtherUpstream)
		}
		a := authorityOf(gen, k.root())
		if now.Before(a.NotAfter()) {
			k.x509.Store(a)
		}
	}
	_, err = k.RenewIntermediate(ctx, now)
	switch current := k.x509.Load(); {
	case err != nil && current == nil:
		return fmt.Errorf("%w: %w", ErrUpstreamAway, err)
	case err != nil:
		k.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "intermediate not renewed by the upstream authority; this CA goes on with the one it has",
			slog.Time("until", current.NotAfter()), slog.Any("err", err))
	}
	return nil
}

// renewFromUpstream has the next intermediate signed. k.mu is held.
func (k *Keys) renewFromUpstream(ctx context.Context, now time.Time) error {
	template, err := k.intermediateTemplate(now)
	if err != nil {
		return err
	}
	key, err := k.dir.create(kindIntermediate)
	if err != nil {
		return err
	}
	gen, err := k.certifyUpstream(ctx, template, key, now)
	if err != nil {
		return k.dir.discard(key, fmt.Errorf("upstream authority %s: %w", k.external.cfg.Type, err))
	}
	if gen, err = k.dir.add(kindIntermediate, key, gen.cert, gen.chain...); err != nil {
		return err
	}
	if len(gen.cert.PermittedURIDomains) == 0 && len(template.PermittedURIDomains) > 0 {
		k.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "the upstream authority left out the name constraint: a thief of the intermediate's key could make SVIDs of any trust domain that trusts this root",
			slog.String("permitted", template.PermittedURIDomains[0]))
	}
	k.x509.Store(authorityOf(gen, k.root()))
	if err := k.dir.removeOlder(gen); err != nil {
		return fmt.Errorf("remove old intermediates: %w", err)
	}
	return nil
}

// certifyUpstream asks for a certificate and judges it.
func (k *Keys) certifyUpstream(ctx context.Context, template *x509.Certificate, key madeKey, now time.Time) (*generation, error) {
	got, err := k.external.sign(ctx, template, key.signer)
	if err != nil {
		return nil, err
	}
	gen := &generation{kind: kindIntermediate, signer: key.signer, cert: got.cert}
	if err := checkUpstream(got.cert, template, now); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUpstreamAnswer, err)
	}
	if gen.chain, err = k.external.path(got); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUpstreamAnswer, err)
	}
	if err := probe(authorityOf(gen, k.root()), k.cfg.TrustDomain, now); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUpstreamAnswer, err)
	}
	return gen, nil
}
