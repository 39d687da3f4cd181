// What a handshake and a token cost before any cache.

package svid_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func BenchmarkVerifyRawChain(b *testing.B) {
	ca := forge.New(b, "example.org")
	raw, bundle := ca.Intermediate().Leaf("/a").Raw(), ca.Bundle().X509Bundle()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := svid.VerifyRawChain(raw, bundle, time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}

// A chain that was verified before, one that was not, and go-spiffe's verdict alone;
// with one root, and with 100 of other names.
func BenchmarkTrust(b *testing.B) {
	for _, roots := range []int{1, 100} {
		ca := forge.New(b, "example.org")
		chain, bundle := ca.Intermediate().Leaf("/a").Chain, ca.Bundle().X509Bundle()
		for len(bundle.X509Authorities()) < roots {
			bundle.AddX509Authority(forge.New(b, "example.org").Cert)
		}
		trust := svid.NewTrust(x509bundle.NewSet(bundle))
		for name, verify := range map[string]func() error{
			"known":    func() error { _, err := trust.VerifyChain(chain, time.Now()); return err },
			"unknown":  func() error { trust.Forget(); _, err := trust.VerifyChain(chain, time.Now()); return err },
			"gospiffe": func() error { _, _, err := x509svid.Verify(chain, bundle); return err },
		} {
			b.Run(fmt.Sprintf("roots=%d/%s", roots, name), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if err := verify(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkVerifyJWT(b *testing.B) {
	ca := forge.New(b, "example.org")
	token, bundle := ca.JWT(ca.Header(nil), ca.Claims("/a", nil)), ca.Bundle().JWTBundle()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := svid.VerifyJWT(token, bundle, []string{"aud"}, time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}
