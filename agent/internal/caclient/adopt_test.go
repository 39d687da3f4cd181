// Whom the agent takes for the CA, and what for its own SVID.

package caclient

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// newClient is one that has never met its CA, whose root is root.
func newClient(t *testing.T, root *forge.Authority) (*Client, *cache.Cache) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	c, err := New(Config{
		TrustDomain: root.TrustDomain, Addresses: []string{"ca:1"}, DataDir: newDir(t), RootHash: svid.KeyHash(root.Cert),
		Logger: log, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return c, cache.New(cache.Options{TrustDomain: root.TrustDomain, Logger: log, Registerer: prometheus.NewRegistry()})
}

func bundleOf(t *testing.T, root *forge.Authority) *capb.TrustBundle {
	t.Helper()
	jwks, err := root.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return &capb.TrustBundle{TrustDomain: root.TrustDomain.Name(), Sequence: 1, Jwks: jwks}
}

// Evidence goes to the CA alone: neither to a workload of the trust domain nor to
// whoever is below another root, before and after a trust bundle is held.
func TestOnlyTheCAIsMet(t *testing.T) {
	root, other := forge.New(t, "example.test"), forge.New(t, "example.test")
	c, picture := newClient(t, root)
	for _, held := range []bool{false, true} {
		if held {
			trust, err := cache.ParseTrust(bundleOf(t, root), "example.test")
			if err != nil {
				t.Fatal(err)
			}
			picture.SetTrust(t.Context(), trust)
		}
		ended := func(cert *x509.Certificate) { cert.NotAfter = time.Now().Add(-time.Second) }
		verify := c.firstContact(picture).VerifyConnection
		for name, tt := range map[string]struct {
			by *forge.SVID
			ok bool
		}{
			"the CA":                 {root.Leaf("/ca"), true},
			"a workload":             {root.Leaf("/web"), false},
			"an agent":               {root.Leaf("/agent/n1"), false},
			"a CA of another root":   {other.Leaf("/ca"), false},
			"something below /ca":    {root.Leaf("/ca/x"), false},
			"an ended one's SVID":    {root.Leaf("/ca", ended), false},
			"a CA of somewhere else": {forge.New(t, "elsewhere.test").Leaf("/ca"), false},
		} {
			// The root is sent along, as the CA does for who has no trust bundle yet.
			chain := slices.Concat(tt.by.Chain, []*x509.Certificate{root.Cert})
			if err := verify(tls.ConnectionState{PeerCertificates: chain}); (err == nil) != tt.ok {
				t.Errorf("%s, trust bundle held %v: %v; want it met: %v", name, held, err, tt.ok)
			}
		}
	}
}

// The CA's answer becomes the agent's SVID only if it is one: of an agent, of this
// one, with the key that was made for it, below a trusted root.
func TestOnlyItsOwnSVIDIsAdopted(t *testing.T) {
	root, other := forge.New(t, "example.test"), forge.New(t, "example.test")
	c, picture := newClient(t, root)
	adopt := func(s *forge.SVID, key *ecdsa.PrivateKey) error {
		return c.adopt(t.Context(), picture, s.Raw(), bundleOf(t, root), key)
	}
	keyOf := func(s *forge.SVID) *ecdsa.PrivateKey { return s.Key.(*ecdsa.PrivateKey) }
	refused := func(name string, s *forge.SVID, key *ecdsa.PrivateKey) {
		t.Helper()
		before := c.own.Load()
		if err := adopt(s, key); err == nil || c.own.Load() != before {
			t.Errorf("%s was adopted: %v", name, err)
		}
	}
	first, workload, foreign := root.Leaf("/agent/n1"), root.Leaf("/web"), other.Leaf("/agent/n1")
	refused("a workload's SVID", workload, keyOf(workload))
	refused("an SVID below another root", foreign, keyOf(foreign))
	refused("an SVID with another key", first, keyOf(workload))
	if err := adopt(first, keyOf(first)); err != nil {
		t.Fatal(err)
	}
	another, next := root.Leaf("/agent/n2"), root.Leaf("/agent/n1")
	refused("another agent's SVID", another, keyOf(another))
	if err := adopt(next, keyOf(next)); err != nil || c.ID() != spiffeid.RequireFromString("spiffe://example.test/agent/n1") {
		t.Errorf("a renewal: %v, and the agent is %s", err, c.ID())
	}
}
