// What a handshake and a token cost before any cache.

package svid_test

import (
	"testing"
	"time"

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
