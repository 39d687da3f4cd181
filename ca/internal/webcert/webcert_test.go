// Certificates from files, as they are replaced, and the TLS that anybody meets.

package webcert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/acme/autocert"

	"merlon.dev/sdk/seal"
)

// write puts a certificate and its key into dir. serial tells certificates apart.
func write(t *testing.T, dir string, serial int64, change func(*x509.Certificate)) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return writeOf(t, dir, serial, change, private)
}

// writeOf is write with a key of the caller's.
func writeOf(t *testing.T, dir string, serial int64, change func(*x509.Certificate), private crypto.Signer) (cert, key string) {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), DNSNames: []string{"trust.test"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func sound(*x509.Certificate) {}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestFilesThatCannotServe(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*x509.Certificate)
		spoil  func(cert, key string) error
		want   string
	}{
		"ended":           {change: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, want: "has ended"},
		"an authority":    {change: func(c *x509.Certificate) { c.IsCA = true }, want: "authority"},
		"no host":         {change: func(c *x509.Certificate) { c.DNSNames = nil }, want: "names no host"},
		"for clients":     {change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }, want: "not for servers"},
		"open to all":     {spoil: func(_, key string) error { return os.Chmod(key, 0o644) }, want: "chmod"},
		"no key":          {spoil: func(_, key string) error { return os.Remove(key) }, want: "no such file"},
		"another's key":   {spoil: func(cert, key string) error { return os.WriteFile(key, read(cert), 0o600) }, want: "tls.key"},
		"too large":       {spoil: func(cert, _ string) error { return os.WriteFile(cert, make([]byte, maxPEM+1), 0o600) }, want: "at most"},
		"no regular file": {spoil: func(cert, _ string) error { return errors.Join(os.Remove(cert), os.Mkdir(cert, 0o700)) }, want: "regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			change := tt.change
			if change == nil {
				change = sound
			}
			cert, key := write(t, t.TempDir(), 1, change)
			if tt.spoil != nil {
				if err := tt.spoil(cert, key); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := OpenFiles(cert, key, discard(), time.Now()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error = %v; want %q", err, tt.want)
			}
		})
	}
}

func read(path string) []byte {
	text, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	return text
}

// serial is that of the certificate in use, looked at anew.
func (f *Files) serial(t *testing.T) int64 {
	t.Helper()
	f.mu.Lock()
	f.looked = time.Time{}
	f.mu.Unlock()
	cert, err := f.GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	return cert.Leaf.SerialNumber.Int64()
}

// Files that were replaced take effect; what cannot be used leaves the last good pair.
func TestReplacedFiles(t *testing.T) {
	dir := t.TempDir()
	cert, key := write(t, dir, 1, sound)
	f, err := OpenFiles(cert, key, discard(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	later := time.Now()
	replaced := func(serial int64, change func(*x509.Certificate)) int64 {
		write(t, dir, serial, change)
		later = later.Add(time.Minute) // than a file system can tell
		for _, path := range []string{cert, key} {
			if err := os.Chtimes(path, later, later); err != nil {
				t.Fatal(err)
			}
		}
		return f.serial(t)
	}
	if got := replaced(2, sound); got != 2 {
		t.Errorf("after it was replaced: %d; want 2", got)
	}
	if got := replaced(3, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }); got != 2 {
		t.Errorf("after it was replaced by one that has ended: %d; want 2", got)
	}
	if err := os.Remove(cert); err != nil {
		t.Fatal(err)
	}
	if got := f.serial(t); got != 2 {
		t.Errorf("without a file: %d; want 2", got)
	}
	if got := replaced(4, sound); got != 4 {
		t.Errorf("after it is good again: %d; want 4", got)
	}
}

// What is older than TLS 1.2, or has neither forward secrecy nor AEAD, is refused.
func TestConfigRefusesOldTLS(t *testing.T) {
	cert, key := write(t, t.TempDir(), 1, sound)
	f, err := OpenFiles(cert, key, discard(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	// A client that would exchange keys by RSA is refused for that, and not for the kind
	// of the server's key.
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = writeOf(t, t.TempDir(), 1, sound, private)
	ofRSA, err := OpenFiles(cert, key, discard(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		client *tls.Config
		want   bool
	}{
		"TLS 1.3":         {&tls.Config{MinVersion: tls.VersionTLS13}, true},
		"TLS 1.2":         {&tls.Config{MaxVersion: tls.VersionTLS12}, true},
		"TLS 1.1":         {&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, false},
		"CBC":             {&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}}, false},
		"RSA signature":   {&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}}, true},
		"RSA key":         {&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256}}, false},
		"ChaCha20 of 1.2": {&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			here, there := net.Pipe()
			defer here.Close()
			go func() {
				defer there.Close()
				of := f
				if strings.HasPrefix(name, "RSA") {
					of = ofRSA
				}
				_ = tls.Server(there, Config(of)).HandshakeContext(t.Context()) // the client says how it went
			}()
			client := tt.client
			client.InsecureSkipVerify = true
			conn := tls.Client(here, client)
			if err := conn.HandshakeContext(t.Context()); (err == nil) != tt.want {
				t.Errorf("%v; want accepted = %t", err, tt.want)
			}
		})
	}
}

// What ACME keeps is sealed; under another key, or damaged, it is as if nothing were
// there.
func TestSealedCache(t *testing.T) {
	dir := t.TempDir()
	kek := func() *seal.Key {
		home := t.TempDir()
		if err := seal.Make(home); err != nil {
			t.Fatal(err)
		}
		key, err := seal.Read(seal.Source{}, home)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	cache := sealed{dir, kek()}
	const name = "a-very-long-name/with+other.characters"
	if err := cache.Put(t.Context(), name, []byte("secret")); err != nil {
		t.Fatal(err)
	}
	if got, err := cache.Get(t.Context(), name); err != nil || string(got) != "secret" {
		t.Errorf("%q, %v", got, err)
	}
	for what, get := range map[string]func() ([]byte, error){
		"another name": func() ([]byte, error) { return cache.Get(t.Context(), "other") },
		"another key":  func() ([]byte, error) { return sealed{dir, kek()}.Get(t.Context(), name) },
		"moved": func() ([]byte, error) {
			if err := os.WriteFile(cache.path("moved"), read(cache.path(name)), 0o600); err != nil {
				t.Fatal(err)
			}
			return cache.Get(t.Context(), "moved")
		},
	} {
		if got, err := get(); !errors.Is(err, autocert.ErrCacheMiss) {
			t.Errorf("%s: %q, %v; want a miss", what, got, err)
		}
	}
	if err := errors.Join(cache.Delete(t.Context(), name), cache.Delete(t.Context(), name)); err != nil {
		t.Fatal(err)
	}
	if got, err := cache.Get(t.Context(), name); !errors.Is(err, autocert.ErrCacheMiss) {
		t.Errorf("deleted: %q, %v; want a miss", got, err)
	}
}
