// A proof holds for its key, its connection and its CSR, and for nothing else.

package possession_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"testing"
	"time"

	"merlon.dev/sdk/possession"
)

func signers(t *testing.T) map[string]crypto.Signer {
	t.Helper()
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]crypto.Signer{"P-256": p256, "P-384": p384, "RSA": r, "Ed25519": ed}
}

// connect returns both ends' view of a fresh connection with up to version.
func connect(t *testing.T, version uint16) (client, server tls.ConnectionState) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"ca"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	s := tls.Server(far, &tls.Config{MinVersion: tls.VersionTLS12, MaxVersion: version, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, SessionTicketsDisabled: true})
	c := tls.Client(near, &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true})
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return c.ConnectionState(), s.ConnectionState()
}

func statement(t *testing.T, conn tls.ConnectionState, csr string) []byte {
	t.Helper()
	s, err := possession.Statement(conn, []byte(csr))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestProofHoldsForItsConnectionKeyAndCSRAlone(t *testing.T) {
	client, server := connect(t, tls.VersionTLS13)
	_, other := connect(t, tls.VersionTLS13)
	keys := signers(t)
	for name, key := range keys {
		signature, err := possession.Sign(key, statement(t, client, "csr"))
		if err != nil {
			t.Fatal(err)
		}
		if !possession.Verify(key.Public(), statement(t, server, "csr"), signature) {
			t.Errorf("%s: the proof is refused at the other end", name)
		}
		if possession.Verify(key.Public(), statement(t, other, "csr"), signature) {
			t.Errorf("%s: the proof was replayed on another connection", name)
		}
		if possession.Verify(key.Public(), statement(t, server, "another csr"), signature) {
			t.Errorf("%s: the proof was taken for another CSR", name)
		}
		for other, wrong := range keys {
			if other != name && possession.Verify(wrong.Public(), statement(t, server, "csr"), signature) {
				t.Errorf("the proof of %s was taken for one of %s", name, other)
			}
		}
	}
}

func TestNoProofOnAnOlderTLS(t *testing.T) {
	client, _ := connect(t, tls.VersionTLS12)
	if _, err := possession.Statement(client, nil); err == nil {
		t.Error("a proof was bound to TLS 1.2, whose keying material another connection can share")
	}
	if _, err := possession.Statement(tls.ConnectionState{}, nil); err == nil {
		t.Error("a proof was bound to no connection")
	}
	resumed, _ := connect(t, tls.VersionTLS13)
	resumed.DidResume = true
	if _, err := possession.Statement(resumed, nil); err == nil {
		t.Error("a proof was bound to a resumed connection")
	}
}

func TestUnfitKeysProveNothing(t *testing.T) {
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weak := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}
	small := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 3}
	huge := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 16383), E: 65537}
	for name, key := range map[string]crypto.PublicKey{"P-224": p224.Public(), "RSA 1024": weak, "RSA e=3": small, "RSA 16384": huge, "none": nil} {
		if possession.CheckKey(key) == nil || possession.Verify(key, nil, nil) {
			t.Errorf("%s: a key of that kind is taken", name)
		}
	}
	if _, err := possession.Sign(p224, nil); err == nil {
		t.Error("an unfit key signed")
	}
}
