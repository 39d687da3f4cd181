// A certificate by ACME: asked for at the first handshake of a name, by the challenge
// tls-alpn-01 (RFC 8737) on the endpoint itself, and renewed a month before it ends.

package webcert

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"

	"merlon.dev/sdk/durable"
	"merlon.dev/sdk/seal"
)

// acmeTimeout bounds one request to the ACME server.
const acmeTimeout = 30 * time.Second

// ACMEConfig says who issues, and for which names.
type ACMEConfig struct {
	// Directory is the ACME server's, https://….
	Directory string
	// Domains are the names that the endpoint has; others are not asked for.
	Domains []string
	// Email is where the ACME server writes to; optional.
	Email string
	// Roots verify the ACME server; nil: the system's.
	Roots *x509.CertPool
	// Dir keeps account key and certificates, sealed under Key.
	Dir string
	Key *seal.Key
}

// ACME is a certificate by ACME.
type ACME struct{ manager *autocert.Manager }

// NewACME makes a source; it asks for nothing yet. The operator has agreed to the
// server's terms.
func NewACME(cfg ACMEConfig) *ACME {
	transport := http.DefaultTransport.(*http.Transport).Clone() // always of that type
	transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: cfg.Roots}
	return &ACME{&autocert.Manager{
		Prompt:     autocert.AcceptTOS,
		Cache:      sealed{cfg.Dir, cfg.Key},
		HostPolicy: autocert.HostWhitelist(cfg.Domains...),
		Email:      cfg.Email,
		Client:     &acme.Client{DirectoryURL: cfg.Directory, HTTPClient: &http.Client{Transport: transport, Timeout: acmeTimeout}, UserAgent: "merlon-ca"},
	}}
}

// Protocols implements Source.
func (*ACME) Protocols() []string { return []string{acme.ALPNProto} }

// GetCertificate implements Source.
func (a *ACME) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	return a.manager.GetCertificate(hello)
}

// sealed implements autocert.Cache: private keys do not lie about.
type sealed struct {
	dir string
	key *seal.Key
}

func sealedAs(name string) []string { return []string{"merlon acme", digest(name)} }

// digest has no character of a name, which may be long.
func digest(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:])
}

func (s sealed) path(name string) string { return filepath.Join(s.dir, digest(name)) }

// maxCached bounds a file of the cache.
const maxCached = 256 << 10

// Get implements autocert.Cache. What cannot be opened any more, such as after the
// key-encryption key was replaced, is asked for anew.
func (s sealed) Get(_ context.Context, name string) ([]byte, error) {
	text, err := durable.ReadGuarded(s.path(name), 0o600, maxCached)
	if errors.Is(err, os.ErrNotExist) {
		return nil, autocert.ErrCacheMiss
	}
	if err != nil {
		return nil, fmt.Errorf("read a certificate by ACME: %w", err)
	}
	data, err := s.key.Open(text, sealedAs(name)...)
	if errors.Is(err, seal.ErrWrongKey) || errors.Is(err, seal.ErrBroken) {
		return nil, autocert.ErrCacheMiss
	}
	return data, err
}

// Put implements autocert.Cache.
func (s sealed) Put(_ context.Context, name string, data []byte) error {
	text, err := s.key.Seal(data, sealedAs(name)...)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	return durable.WriteFile(s.dir, digest(name), text)
}

// Delete implements autocert.Cache.
func (s sealed) Delete(_ context.Context, name string) error {
	if err := os.Remove(s.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
