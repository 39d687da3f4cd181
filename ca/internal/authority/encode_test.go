// The leaves that are written here are, byte for byte, those that crypto/x509
// would have made.

package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func ecKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func rsaKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issuers are intermediates of every kind of key that an authority may have.
func issuers(t testing.TB) []*X509Authority {
	t.Helper()
	root := forge.New(t, "example.org", func(c *x509.Certificate) { c.NotAfter = time.Date(2060, 1, 1, 0, 0, 0, 0, time.UTC) })
	template := root.Intermediate().Cert
	template.Raw, template.RawSubject, template.NotAfter = nil, nil, root.Cert.NotAfter
	var all []*X509Authority
	for _, key := range []crypto.Signer{ecKey(t, elliptic.P256()), ecKey(t, elliptic.P384()), rsaKey(t)} {
		fresh := *template
		fresh.PublicKey, fresh.SignatureAlgorithm = nil, 0
		der, err := x509.CreateCertificate(rand.Reader, &fresh, root.Cert, key.Public(), root.Key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		a := &X509Authority{Chain: []*x509.Certificate{cert}, Root: root.Cert, Signer: key}
		if err := a.ready(); err != nil {
			t.Fatal(err)
		}
		all = append(all, a)
	}
	return all
}

// sameAsLibrary has both make the leaf, and compares all that is signed.
func sameAsLibrary(t testing.TB, a *X509Authority, req LeafRequest) {
	t.Helper()
	v, _, err := a.values(req)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := a.form.encode(v)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, templateOf(req, v, a.Chain[0]), a.Chain[0], req.PublicKey, a.Signer)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(ours, theirs.RawTBSCertificate) {
		t.Fatalf("for %+v\n we write %x\nthe library %x", req, ours, theirs.RawTBSCertificate)
	}
	whole, err := wrap(ours, a.key.algorithm, theirs.Signature)
	if err != nil || !bytes.Equal(whole, der) {
		t.Fatalf("around one body and signature\n we write %x, %v\nthe library %x", whole, err, der)
	}
	leaf, err := a.Issue(req)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(leaf.DER)
	if err != nil || cert.CheckSignatureFrom(a.Chain[0]) != nil || !bytes.Equal(cert.RawTBSCertificate, ours) {
		t.Fatalf("what was issued for %+v: %v", req, err)
	}
}

func TestLeavesAreThoseOfTheLibrary(t *testing.T) {
	authorities := issuers(t)
	keys := []crypto.Signer{ecKey(t, elliptic.P256()), ecKey(t, elliptic.P384()), rsaKey(t), forge.NewRSAKey(t, 3072, 65537)}
	rapid.Check(t, func(rt *rapid.T) {
		path := rapid.OneOf(
			rapid.StringMatching(`(/[a-zA-Z0-9._-]{1,20}[a-z]){1,5}`),
			rapid.Just("/"+strings.Repeat("a", svid.MaxIDBytes-len("spiffe://example.org/"))),
		).Draw(rt, "path")
		sameAsLibrary(t, rapid.SampledFrom(authorities).Draw(rt, "issuer"), LeafRequest{
			SPIFFEID:  spiffeid.RequireFromPath(authorities[0].form.trustDomain, path),
			PublicKey: rapid.SampledFrom(keys).Draw(rt, "key").Public(),
			Serial: svid.Serial{
				Agent: rapid.Uint64Range(0, svid.MaxAgent).Draw(rt, "agent"), Revision: rapid.Uint64Range(0, svid.MaxRevision).Draw(rt, "revision"),
				Random: rapid.Uint64Min(1).Draw(rt, "random"),
			},
			TTL:        time.Duration(rapid.Int64Range(int64(time.Second), int64(MaxTTL)).Draw(rt, "ttl")),
			DNSNames:   rapid.SliceOfNDistinct(rapid.StringMatching(`[a-z][a-z0-9-]{0,10}[a-z0-9](\.[a-z_]{1,5}){0,3}`), 0, 30, strings.ToLower).Draw(rt, "names"),
			CommonName: rapid.SampledFrom([]string{"", "postgres", "Ünï 1", "a*b", "a@b", "a&b", strings.Repeat("ü", 64)}).Draw(rt, "cn"),
			// From now to beyond 2049, where years get four digits.
			Now: time.Now().Add(time.Duration(rapid.Int64Range(0, int64(30*365*24*time.Hour)).Draw(rt, "later"))),
		})
	})
}

func FuzzLeavesAreThoseOfTheLibrary(f *testing.F) {
	a := issuers(f)[0]
	key := ecKey(f, elliptic.P256())
	f.Add("/web", "web.internal", "postgres", uint64(1), int64(3600))
	f.Add("/a", "", "", uint64(1)<<63, int64(1))
	f.Fuzz(func(t *testing.T, path, dns, cn string, random uint64, seconds int64) {
		id, err := spiffeid.FromPath(a.form.trustDomain, path)
		if err != nil {
			return
		}
		req := LeafRequest{
			SPIFFEID: id, PublicKey: key.Public(), Serial: svid.Serial{Agent: 1, Revision: 2, Random: random},
			TTL: time.Duration(seconds%1_000_000) * time.Second, CommonName: cn, Now: time.Now(),
		}
		if dns != "" {
			req.DNSNames = []string{dns}
		}
		if checkLeafRequest(req, a.form.trustDomain) == nil {
			sameAsLibrary(t, a, req)
		}
	})
}
