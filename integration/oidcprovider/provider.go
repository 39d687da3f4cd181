// Package oidcprovider is an OpenID provider for tests: it serves a discovery
// document and keys over real TLS on loopback, signs tokens, and can be made to
// answer wrongly. The real ones are other people's.
package oidcprovider

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// The paths that it answers, and the names of its keys.
const (
	DiscoveryPath = "/.well-known/openid-configuration"
	KeysPath      = "/keys"
	ECKeyID       = "ec-1"
	RSAKeyID      = "rsa-1"
)

// Provider is a running provider.
type Provider struct {
	URL string // its issuer
	EC  *ecdsa.PrivateKey
	RSA *rsa.PrivateKey

	tb  testing.TB
	srv *httptest.Server

	mu sync.Mutex
	// guarded by mu
	answers Answers
	asked   map[string]int
}

// Answers are what a provider says.
type Answers struct {
	Keys     []jose.JSONWebKey
	Document map[string]any
	// Instead answers some paths otherwise.
	Instead map[string]http.HandlerFunc
}

var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

// Start runs a provider until the test ends.
func Start(tb testing.TB) *Provider {
	tb.Helper()
	p := &Provider{tb: tb, RSA: rsaKey(), EC: ECKey(tb, elliptic.P256()), asked: make(map[string]int)}
	p.srv = httptest.NewUnstartedServer(http.HandlerFunc(p.serve))
	p.srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	p.srv.StartTLS()
	tb.Cleanup(p.srv.Close)
	p.URL = p.srv.URL
	p.answers = Answers{
		Keys: []jose.JSONWebKey{
			{Key: p.RSA.Public(), KeyID: RSAKeyID, Algorithm: "RS256", Use: "sig"},
			{Key: p.EC.Public(), KeyID: ECKeyID, Use: "sig"},
		},
		Document: map[string]any{"issuer": p.URL, "jwks_uri": p.URL + KeysPath},
		Instead:  make(map[string]http.HandlerFunc),
	}
	return p
}

// ECKey makes a key.
func ECKey(tb testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func (p *Provider) serve(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.asked[r.URL.Path]++
	answers, instead := p.answers, p.answers.Instead[r.URL.Path]
	p.mu.Unlock()
	switch {
	case instead != nil:
		instead(w, r)
	case r.URL.Path == DiscoveryPath:
		_ = json.NewEncoder(w).Encode(answers.Document)
	case r.URL.Path == KeysPath:
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: answers.Keys})
	default:
		http.NotFound(w, r)
	}
}

// Change changes what it says from now on.
func (p *Provider) Change(do func(*Answers)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := p.answers // those being served stay as they are
	next.Document, next.Instead = maps.Clone(next.Document), maps.Clone(next.Instead)
	do(&next)
	p.answers = next
}

// Asked is how often path was asked for.
func (p *Provider) Asked(path string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked[path]
}

// Certificate is that of its TLS.
func (p *Provider) Certificate() *x509.Certificate { return p.srv.Certificate() }

// CertificatePEM is Certificate as a file has it.
func (p *Provider) CertificatePEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.srv.Certificate().Raw})
}

// Claims are those of a good token for audience at now.
func (p *Provider) Claims(audience, sub string, now time.Time) map[string]any {
	return map[string]any{
		"iss": p.URL, "aud": audience, "sub": sub, "iat": now.Add(-time.Second).Unix(), "exp": now.Add(time.Hour).Unix(),
	}
}

// Token signs claims.
func (p *Provider) Token(claims map[string]any) string {
	p.tb.Helper()
	payload, err := json.Marshal(claims)
	if err != nil {
		p.tb.Fatal(err)
	}
	return Sign(p.tb, jose.ES256, p.EC, ECKeyID, payload, nil)
}

// Sign makes a token of whatever payload is. Without kid it has none.
func Sign(tb testing.TB, alg jose.SignatureAlgorithm, key any, kid string, payload []byte, header map[jose.HeaderKey]any) string {
	tb.Helper()
	opts := (&jose.SignerOptions{}).WithType("JWT")
	if kid != "" {
		opts = opts.WithHeader("kid", kid)
	}
	for k, v := range header {
		opts = opts.WithHeader(k, v)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, opts)
	if err != nil {
		tb.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		tb.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		tb.Fatal(err)
	}
	return token
}
