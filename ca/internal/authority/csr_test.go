// T11: a CSR gives a key and its proof of possession; whatever else it asks for
// is refused by name.

package authority_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/svid/forge"
)

func csr(t testing.TB, key crypto.Signer, template x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func generate[K crypto.Signer](t testing.TB, key K, err error) crypto.Signer {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func uris(t testing.TB, texts ...string) (out []*url.URL) {
	t.Helper()
	for _, text := range texts {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, u)
	}
	return out
}

func TestT11CSRsAreRefused(t *testing.T) {
	p256 := crypto.Signer(workloadKey)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	weak := generate(t, p224, err)
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	heavy := generate(t, p521, err)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	ed := generate(t, edKey, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 1024)
	short := generate(t, rsaKey, err)
	plain := csr(t, p256, x509.CertificateRequest{})
	badSignature := bytes.Clone(plain)
	badSignature[len(badSignature)-1] ^= 1
	own := "spiffe://example.org/web"
	extension := func(oid ...int) x509.CertificateRequest {
		return x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oid, Value: []byte{0x30, 3, 1, 1, 0xff}}}}
	}
	tests := map[string]struct {
		der  []byte
		want string
	}{
		"1 MB":                 {make([]byte, 1<<20), "at most 8192 are read"},
		"empty":                {nil, "does not parse"},
		"no CSR":               {[]byte("hello"), "does not parse"},
		"bytes behind":         {append(bytes.Clone(plain), 0), "does not parse"},
		"signature altered":    {badSignature, "not signed by its own key"},
		"P-224":                {csr(t, weak, x509.CertificateRequest{}), "P-224"},
		"P-521":                {csr(t, heavy, x509.CertificateRequest{}), "P-521"},
		"Ed25519":              {csr(t, ed, x509.CertificateRequest{}), "ed25519"},
		"RSA 1024":             {csr(t, short, x509.CertificateRequest{}), "1024 bits"},
		"RSA 2560":             {csr(t, forge.NewRSAKey(t, 2560, 65537), x509.CertificateRequest{}), "2560 bits"},
		"RSA 4096":             {csr(t, forge.NewRSAKey(t, 4096, 65537), x509.CertificateRequest{}), "public key of 550 bytes"},
		"RSA 16384":            {csr(t, forge.NewRSAKey(t, 16384, 65537), x509.CertificateRequest{}), "public key of 2086 bytes"},
		"RSA with exponent 3":  {csr(t, forge.NewRSAKey(t, 2048, 3), x509.CertificateRequest{}), "exponent 3"},
		"two URIs":             {csr(t, p256, x509.CertificateRequest{URIs: uris(t, own, "spiffe://example.org/admin")}), `URI SAN "spiffe://example.org/admin"`},
		"URI of another":       {csr(t, p256, x509.CertificateRequest{URIs: uris(t, "spiffe://example.org/admin")}), `URI SAN "spiffe://example.org/admin"`},
		"own URI and another":  {csr(t, p256, x509.CertificateRequest{URIs: uris(t, own, "https://x")}), `URI SAN "https://x"`},
		"own URI twice":        {csr(t, p256, x509.CertificateRequest{URIs: uris(t, own, own)}), "2 URI SANs"},
		"DNS name":             {csr(t, p256, x509.CertificateRequest{DNSNames: []string{"db"}}), `DNS SAN "db"`},
		"own URI and DNS name": {csr(t, p256, x509.CertificateRequest{URIs: uris(t, own), DNSNames: []string{"db"}}), `DNS SAN "db"`},
		"address":              {csr(t, p256, x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}}), "IP SAN 10.0.0.1"},
		"email":                {csr(t, p256, x509.CertificateRequest{EmailAddresses: []string{"a@b"}}), `email SAN "a@b"`},
		"isCA":                 {csr(t, p256, extension(2, 5, 29, 19)), "extension 2.5.29.19"},
		"EKU":                  {csr(t, p256, extension(2, 5, 29, 37)), "extension 2.5.29.37"},
		"other name in SAN": {csr(t, p256, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{
			{Id: []int{2, 5, 29, 17}, Value: []byte{0x30, 4, 0x88, 2, 0x2a, 3}}, // registeredID 1.2.3
		}}), "unknown kind"},
	}
	for name, tt := range tests {
		key, err := authority.PublicKeyFromCSR(tt.der, spiffeid.RequireFromString(own))
		e, ok := errors.AsType[*authority.InvalidError](err)
		if !ok || e.Field != "csr" || !strings.Contains(e.Reason, tt.want) || key != nil {
			t.Errorf("%s: PublicKeyFromCSR = %v, %v; want a refusal with %q", name, key, err, tt.want)
		}
	}
}

func TestCSRsAreAccepted(t *testing.T) {
	own := spiffeid.RequireFromString("spiffe://example.org/web")
	withID := csr(t, workloadKey, x509.CertificateRequest{URIs: uris(t, own.String()), Subject: pkix.Name{CommonName: "ignored"}})
	key, err := authority.PublicKeyFromCSR(withID, own)
	if err != nil || !workloadKey.PublicKey.Equal(key) {
		t.Errorf("PublicKeyFromCSR with the own ID = %v, %v", key, err)
	}
	if _, err := authority.PublicKeyFromCSR(withID); err == nil {
		t.Error("a URI SAN is tolerated where no ID is expected")
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, signer := range []crypto.Signer{workloadKey, p384, forge.NewRSAKey(t, 2048, 65537), forge.NewRSAKey(t, 3072, 65537)} {
		if _, err := authority.PublicKeyFromCSR(csr(t, signer, x509.CertificateRequest{})); err != nil {
			t.Errorf("%T: %v", signer, err)
		}
	}
}

// Weak RSA keys that no generator makes any more, as certificates would carry them.
func TestWeakRSAKeysAreRefused(t *testing.T) {
	sound, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	small, even, huge := sound.PublicKey, sound.PublicKey, sound.PublicKey
	small.E = 3
	even.N = new(big.Int).Sub(sound.N, big.NewInt(1))
	huge.N = new(big.Int).Lsh(sound.N, 4096)
	a := newAuthority(t, "example.org")
	for want, key := range map[string]rsa.PublicKey{"exponent 3": small, "even modulus": even, "6144 bits": huge} {
		_, err := a.Issue(request(func(r *authority.LeafRequest) { r.PublicKey = &key }))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Issue = %v; want a refusal with %q", err, want)
		}
	}
}

func FuzzPublicKeyFromCSR(f *testing.F) {
	own := spiffeid.RequireFromString("spiffe://example.org/web")
	f.Add(csr(f, workloadKey, x509.CertificateRequest{}))
	f.Add(csr(f, workloadKey, x509.CertificateRequest{URIs: uris(f, own.String())}))
	f.Add(csr(f, workloadKey, x509.CertificateRequest{DNSNames: []string{"db"}}))
	f.Fuzz(func(t *testing.T, der []byte) {
		key, err := authority.PublicKeyFromCSR(der, own)
		if err != nil {
			if _, ok := errors.AsType[*authority.InvalidError](err); !ok {
				t.Fatalf("untyped refusal: %v", err)
			}
			return
		}
		parsed, err := x509.ParseCertificateRequest(der)
		if err != nil || parsed.CheckSignature() != nil {
			t.Fatalf("accepted without proof of possession: %v", err)
		}
		if key == nil || len(parsed.DNSNames)+len(parsed.IPAddresses)+len(parsed.EmailAddresses) > 0 || len(parsed.URIs) > 1 {
			t.Fatalf("accepted names: %+v", parsed)
		}
	})
}
