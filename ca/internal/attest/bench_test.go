// What it costs to check evidence, beside the SVID that follows.

package attest

import (
	"crypto/elliptic"
	"testing"
	"time"

	"merlon.dev/integration/k8sapi"
)

func BenchmarkX509POP(b *testing.B) {
	root := newSite(b)
	issuer := root.below(b)
	key := newECDSA(b, elliptic.P256())
	chain, p, now := raw(issuer.issue(b, key, nodeCert()), issuer.cert), root.attestor(""), time.Now()
	signature := signPOP(b, key)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.Prove(chain, signature, popStatement, now); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkK8sToken(b *testing.B) {
	api, now := k8sapi.Start(b), time.Now()
	c, token := clusters(b, api)["file"], api.Sign(api.Claims("worker-1", now))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Prove(b.Context(), token, now); err != nil {
			b.Fatal(err)
		}
	}
}
