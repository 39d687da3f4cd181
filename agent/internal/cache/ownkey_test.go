// What a CSR may cost before the CA has judged it.

package cache

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

func TestCSRKey(t *testing.T) {
	csr := func(key any) []byte {
		t.Helper()
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := csr(p256)
	if key, err := CSRKey(good); err != nil || !key.Equal(&p256.PublicKey) {
		t.Errorf("CSRKey() = %v, %v; want the key", key, err)
	}
	for name, test := range map[string]struct {
		der  []byte
		want string
	}{
		"empty":     {nil, "PKCS#10"},
		"noise":     {[]byte("-----BEGIN"), "PKCS#10"},
		"9 KiB":     {append(good, make([]byte, 9<<10)...), "at most 8192"},
		"RSA 16384": {csr(forge.NewRSAKey(t, 16384, 65537)), "public key of"},
		"Ed25519":   {csr(edKey), "neither ECDSA nor RSA"},
	} {
		if key, err := CSRKey(test.der); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: CSRKey() = %v, %v; want an error with %q", name, key, err, test.want)
		}
	}
}

// Where one entry lets the workload hold its key and another does not, no CSR is
// wanted, or taken, for the other.
func TestCSRsAreForEntriesThatSaySoAlone(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		own := newEntry("e1", "/own", "unix:uid:1")
		own.KeyDelivery = capb.KeyDelivery_KEY_DELIVERY_WORKLOAD
		f.sync(own, newEntry("e2", "/agents", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		_, keys := s.OwnKeys(proves("unix:uid:1"))
		if len(keys) != 2 || keys[0].Wanted == 0 || keys[1].Wanted != 0 || keys[1].Entry.OwnKey {
			t.Fatalf("OwnKeys() = %+v; want a CSR for /own alone", keys)
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]error{"/agents": ErrNotOwn, "/nobodys": ErrNotOwn, "/own": nil} {
			id := spiffeid.RequireFromString("spiffe://" + td + path)
			if err := s.Submit(id, csr, &key.PublicKey); !errors.Is(err, want) {
				t.Errorf("Submit(%s) = %v; want %v", path, err, want)
			}
		}
		if err := s.Submit(spiffeid.RequireFromString("spiffe://"+td+"/own"), csr, &key.PublicKey); !errors.Is(err, ErrNotWanted) {
			t.Errorf("Submit() of a second CSR = %v; want that none is wanted", err)
		}
	})
}

func FuzzCSRKey(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"a.test"}}, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Add([]byte{})
	f.Add(der[:len(der)-1])
	f.Fuzz(func(t *testing.T, der []byte) {
		key, err := CSRKey(der)
		if (err == nil) != (key != nil) {
			t.Fatalf("CSRKey() = %v, %v", key, err)
		}
		if err == nil && (len(der) > maxCSRBytes || !key.Equal(key)) {
			t.Errorf("it takes %d bytes, or a key that is not itself", len(der))
		}
	})
}
