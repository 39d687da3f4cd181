// Peers' certificates are kept once, for as long as they are used.

package sdk

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"runtime"
	"sync"
	"testing"
	"time"
)

func selfSigned(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano())}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(der)
}

// parsed is der as a handshake gives it.
func parsed(t *testing.T, der string) *x509.Certificate {
	t.Helper()
	cert, err := x509.ParseCertificate([]byte(der))
	if err != nil {
		t.Error(err)
		return new(x509.Certificate)
	}
	return cert
}

func (p *peerCerts) len() (n int) {
	p.all.Range(func(any, any) bool { n++; return true })
	return n
}

func TestPeerCertificatesAreKeptOnce(t *testing.T) {
	var p peerCerts
	a, b := selfSigned(t), selfSigned(t)
	first := []*x509.Certificate{parsed(t, a), parsed(t, b)}
	again := []*x509.Certificate{parsed(t, b), parsed(t, a)}
	kept := [2]*x509.Certificate{first[0], first[1]}
	p.share(first)
	p.share(again)
	if first[0] != kept[0] || first[1] != kept[1] || again[0] != kept[1] || again[1] != kept[0] {
		t.Error("the second connection has copies of its own")
	}
	if p.len() != 2 {
		t.Errorf("%d certificates are kept; want 2", p.len())
	}
	runtime.KeepAlive(kept)
}

func TestPeerCertificatesAreForgotten(t *testing.T) {
	var p peerCerts
	der := selfSigned(t)
	func() { p.share([]*x509.Certificate{parsed(t, der)}) }()
	for end := time.Now().Add(30 * time.Second); p.len() > 0; runtime.GC() {
		if time.Now().After(end) {
			t.Fatal("a certificate that nobody uses stays")
		}
	}
	p.share([]*x509.Certificate{parsed(t, der)})
	if p.len() != 1 {
		t.Error("it does not come back")
	}
}

// Handshakes meet collections: nobody ever gets another certificate than his own.
func TestPeerCertificatesUnderLoad(t *testing.T) {
	var p peerCerts
	ders := []string{selfSigned(t), selfSigned(t), selfSigned(t)}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for n := range 300 {
				der := ders[n%len(ders)]
				certs := []*x509.Certificate{parsed(t, der)}
				if p.share(certs); string(certs[0].Raw) != der {
					t.Error("another certificate came back")
				}
				if n%50 == 0 {
					runtime.GC()
				}
			}
		})
	}
	all.Wait()
}
