// Which signatures are looked at before they leave, seen from a key whose memory
// is faulty.

package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"io"
	"testing"

	"merlon.dev/sdk/svid/forge"
)

// wrongKey is a signer that is none of Go's own and signs with another key than
// it says.
type wrongKey struct{ says, has crypto.Signer }

func (w wrongKey) Public() crypto.PublicKey { return w.says.Public() }

func (w wrongKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return w.has.Sign(r, digest, opts)
}

func TestEverySignatureOfAForeignSignerIsChecked(t *testing.T) {
	for name, kind := range map[string]wrongKey{
		"P-256": {ecKey(t, elliptic.P256()), ecKey(t, elliptic.P256())},
		"P-384": {ecKey(t, elliptic.P384()), ecKey(t, elliptic.P384())},
		"RSA":   {rsaKey(t), rsaKey(t)},
	} {
		s, err := newSigning(kind)
		if err != nil {
			t.Fatal(err)
		}
		for range 50 {
			if signature, err := s.sign([]byte("message")); err == nil {
				t.Fatalf("%s: a wrong signature %x left", name, signature)
			}
		}
		s.signer = kind.has // it works again
		if _, err := s.sign([]byte("message")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// An RSA key of Go's own is one, too: a fault in it betrays the key at once.
	for name, key := range map[string]crypto.Signer{"RSA": rsaKey(t), "foreign P-256": wrongKey{ecKey(t, elliptic.P256()), nil}} {
		s, err := newSigning(key)
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			if !s.due() {
				t.Fatalf("%s: a signature is not checked", name)
			}
		}
	}
}

// A plain key in memory that has a flipped bit: it is found and never used again.
func TestFaultyKeyInMemoryIsFoundAndNotUsedAgain(t *testing.T) {
	key := ecKey(t, elliptic.P256())
	for name, sound := range map[string]int{"from the start": 0, "later": 20} {
		s, err := newSigning(key)
		if err != nil {
			t.Fatal(err)
		}
		for range sound {
			if _, err := s.sign([]byte("message")); err != nil {
				t.Fatal(err)
			}
		}
		s.signer = flippedKey{ecKey(t, elliptic.P256()), key.Public()}
		left := 0
		for err = nil; err == nil && left < 1000; left++ {
			_, err = s.sign([]byte("message"))
		}
		if !errors.Is(err, ErrFaultyKey) || sound == 0 && left != 1 {
			t.Fatalf("%s: after %d wrong signatures: %v", name, left-1, err)
		}
		s.signer = key
		if _, err := s.sign([]byte("message")); !errors.Is(err, ErrFaultyKey) {
			t.Errorf("%s: it signs again: %v", name, err)
		}
	}
}

// flippedKey signs with a key that is not its public one any more.
type flippedKey struct {
	*ecdsa.PrivateKey
	public crypto.PublicKey
}

func (f flippedKey) Public() crypto.PublicKey { return f.public }

// Both authorities say so, for the CA to be taken out of service.
func TestAuthoritiesSayThatTheirKeyIsFaulty(t *testing.T) {
	ca := forge.New(t, "example.org").Intermediate()
	a := &X509Authority{Chain: []*x509.Certificate{ca.Cert}, Root: ca.Root().Cert, Signer: ca.Key}
	j := &JWTAuthority{TrustDomain: ca.TrustDomain, KeyID: "k", Signer: ecKey(t, elliptic.P256())}
	if err := errors.Join(a.Fault(), j.Fault()); err != nil {
		t.Fatal(err)
	}
	for _, key := range []*signing{a.key, j.key} {
		key.signer = flippedKey{ecKey(t, elliptic.P256()), key.signer.Public()}
		if _, err := key.sign([]byte("message")); !errors.Is(err, ErrFaultyKey) {
			t.Fatal(err)
		}
	}
	if !errors.Is(a.Fault(), ErrFaultyKey) || !errors.Is(j.Fault(), ErrFaultyKey) {
		t.Errorf("after a wrong signature: %v, %v", a.Fault(), j.Fault())
	}
	if (&X509Authority{}).Fault() == nil || (&JWTAuthority{}).Fault() == nil {
		t.Error("incomplete authorities say that they sign")
	}
}

func TestOneInSixteenOfAPlainKeysSignaturesIsChecked(t *testing.T) {
	s, err := newSigning(ecKey(t, elliptic.P256()))
	if err != nil {
		t.Fatal(err)
	}
	if !s.due() {
		t.Error("the first is not checked")
	}
	checked := 0
	const n = 16_000
	for range n {
		if s.due() {
			checked++
		}
	}
	if checked < n/checkOneIn*3/4 || checked > n/checkOneIn*5/4 { // eight standard deviations
		t.Errorf("%d of %d are checked; want one in %d", checked, n, checkOneIn)
	}
}

func TestKeysThatDoNotSignAreRefused(t *testing.T) {
	for name, key := range map[string]crypto.Signer{"P-224": ecKey(t, elliptic.P224()), "P-521": ecKey(t, elliptic.P521())} {
		if _, err := newSigning(key); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	ca := forge.New(t, "example.org").Intermediate()
	for name, key := range map[string]crypto.Signer{"another P-256 key": ecKey(t, elliptic.P256()), "P-521": ecKey(t, elliptic.P521())} {
		a := &X509Authority{Chain: []*x509.Certificate{ca.Cert}, Root: ca.Root().Cert, Signer: key}
		if err := a.ready(); err == nil {
			t.Errorf("%s signs for an authority of P-256", name)
		}
	}
}
