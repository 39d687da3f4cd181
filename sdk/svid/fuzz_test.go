// Foreign bytes: the verifiers never crash, and never accept what go-spiffe
// refuses. Each seed is sound or one flaw away from it, so that mutations stay
// near documents that verify.

package svid_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// FuzzVerifyRawChain takes the part of a leaf that gets signed and signs it with
// the root's key: what an authority gone wrong could issue, not just noise that
// fails the signature check. Bytes that are no certificate go in as they are.
func FuzzVerifyRawChain(f *testing.F) {
	// Fuzzing runs in several processes, each with its own root key: what seeds say
	// about the root has to fit all of them.
	far := func(c *x509.Certificate) { c.NotAfter = time.Now().AddDate(50, 0, 0) }
	ca := forge.New(f, "example.org", far, func(c *x509.Certificate) {
		c.Subject, c.SubjectKeyId = pkix.Name{CommonName: "fuzz root"}, []byte("fuzz root")
	})
	for _, leaf := range []*forge.SVID{
		ca.Leaf("/a", far), ca.Leaf("", far), ca.Leaf("/a", far, noKeyUsage), ca.Leaf("/a", far, noBasicConstraints),
		ca.Leaf("/a", far, forge.RawURIs(true, "spiffe://example.org/a#")), ca.Leaf("/a", far, isCA),
		ca.Leaf("/a", far, anyUsage), ca.Leaf("/a", far, withName), ca.SelfAsSVID(),
	} {
		f.Add(leaf.Chain[0].RawTBSCertificate, true)
		f.Add(leaf.Chain[0].Raw, false)
	}
	bundle := ca.Bundle().X509Bundle()
	trust := svid.NewTrust(x509bundle.NewSet(bundle))
	f.Fuzz(func(t *testing.T, der []byte, sign bool) {
		if sign {
			if der = ca.SignTBS(der); der == nil {
				return
			}
		}
		now := time.Now()
		peer, err := svid.VerifyRawChain([][]byte{der}, bundle, now)
		if leaf, bad := x509.ParseCertificate(der); bad == nil {
			for range 2 { // what a Trust has seen is not judged otherwise
				known, trusts := trust.VerifyChain([]*x509.Certificate{leaf}, now)
				if (err == nil) != (trusts == nil) || err == nil && known.ID != peer.ID {
					t.Fatalf("VerifyRawChain says %v; a Trust %v", err, trusts)
				}
			}
		}
		if err != nil {
			return
		}
		id, _, err := x509svid.ParseAndVerify([][]byte{der}, bundle, x509svid.WithTime(now))
		if err != nil || id != peer.ID {
			t.Fatalf("accepted as %s; go-spiffe says %s, %v", peer.ID, id, err)
		}
		if leaf := peer.Leaf; leaf.IsCA || id.Path() == "" || leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 || len(leaf.URIs) != 1 {
			t.Fatalf("accepted %+v", leaf)
		}
	})
}

// FuzzVerifyJWT signs any header and claims with the trust domain's key.
func FuzzVerifyJWT(f *testing.F) {
	ca := forge.New(f, "example.org")
	head := `{"alg":"ES256","kid":"k","typ":"JWT"}`
	for _, s := range [][2]string{
		{head, `{"sub":"spiffe://example.org/a","aud":["aud"],"exp":9999999999,"iat":1}`},
		{head, `{"sub":"spiffe://example.org","aud":"aud","exp":9999999999}`},
		{head, `{"sub":"spiffe://example.org/a","aud":"aud","exp":1e10,"nbf":0}`},
		{`{"alg":"ES256","kid":"k","jku":"x"}`, `{"sub":"spiffe://example.org/a","aud":"aud","exp":9999999999}`},
		{`{"alg":"none","kid":"k"}`, `{"sub":"spiffe://example.org/a","aud":"aud","aud":"b","exp":9999999999}`},
	} {
		f.Add([]byte(s[0]), []byte(s[1]), true)
		f.Add([]byte(s[0]), []byte(s[1]), false)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	bundle := ca.Bundle().JWTBundle()
	if err := bundle.AddJWTAuthority("k", key.Public()); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, head, claims []byte, signed bool) {
		var err error
		token := string(head) + "." + string(claims) // any text at all
		if signed {
			if token, err = forge.Sign(key, head, claims); err != nil {
				t.Fatal(err)
			}
		}
		got, err := svid.VerifyJWT(token, bundle, []string{"aud"}, time.Now())
		if err != nil {
			return
		}
		want, err := jwtsvid.ParseAndValidate(token, bundle, []string{"aud"})
		if err != nil {
			t.Fatalf("accepted %s; go-spiffe says %v", token, err)
		}
		if got.ID != want.ID || !got.Expiry.Equal(want.Expiry) || got.ID.Path() == "" {
			t.Fatalf("read as %+v; go-spiffe reads %+v", got, want)
		}
	})
}

// FuzzSerialFromBig: numbers come from foreign certificates.
func FuzzSerialFromBig(f *testing.F) {
	f.Add([]byte{1}, false)
	f.Add(svid.Serial{Agent: svid.MaxAgent, Revision: 1, Random: 1}.Big().Bytes(), false)
	f.Fuzz(func(t *testing.T, b []byte, negative bool) {
		n := new(big.Int).SetBytes(b)
		if negative {
			n.Neg(n)
		}
		if s, ok := svid.SerialFromBig(n); ok && s.Big().Cmp(n) != 0 {
			t.Fatalf("%x was read as %x", n, s.Big())
		}
	})
}
