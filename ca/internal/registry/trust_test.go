// Whoever connects is judged by the trust bundle of now, although chains and
// intermediates that were verified are known again.

package registry

import (
	"crypto/x509"
	"encoding/json"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid/forge"
)

// trustEvent publishes the roots of authorities.
func trustEvent(t *testing.T, sequence uint64, authorities ...*forge.Authority) store.Event {
	t.Helper()
	bundle := authorities[0].Bundle()
	for _, other := range authorities[1:] {
		bundle.AddX509Authority(other.Cert)
	}
	jwks, err := bundle.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	value, err := json.Marshal(map[string]any{"v": 1, "trust_domain": td.Name(), "sequence": sequence, "jwks": json.RawMessage(jwks)})
	if err != nil {
		t.Fatal(err)
	}
	return store.Event{KV: store.KV{Key: trust.Key, Value: value}}
}

func TestWhoeverConnectsIsJudgedByTheTrustBundleOfNow(t *testing.T) {
	b := newBatches(t)
	ca, other := forge.New(t, td.Name()), forge.New(t, td.Name())
	issuer := ca.Intermediate()
	known := issuer.Leaf("/agent/known").Chain
	judge := func(what string, want bool) {
		t.Helper()
		for name, chain := range map[string][]*x509.Certificate{"seen before": known, "new, under an intermediate that was seen before": issuer.Leaf("/agent/new").Chain} {
			if _, err := b.r.VerifyChain(chain, time.Now()); (err == nil) != want {
				t.Errorf("%s, a chain %s: %v; want it let in: %t", what, name, err, want)
			}
		}
	}
	judge("before there is a trust bundle", false)
	b.apply(trustEvent(t, 1, ca))
	judge("its root is published", true)
	b.apply(trustEvent(t, 2, ca, other))
	judge("beside another", true)
	b.apply(trustEvent(t, 3, other))
	judge("its root is withdrawn", false)
	b.apply(trustEvent(t, 4, ca))
	judge("its root is published again", true)
	b.apply(deleteEvent(trust.Key))
	judge("the trust bundle is gone", false)
}
