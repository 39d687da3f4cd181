// The public endpoint: what those read who know nothing of SPIFFE yet. The trust bundle
// for other trust domains (SPIFFE Federation §5.2.1, profile https_web), and OpenID
// Connect discovery for parties that accept JWT-SVIDs as ID tokens. Its certificate is
// one of the web's; everything here is public.

package web

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/trust"
)

// The paths of the public endpoint.
const (
	TrustBundlePath = "/v1/trust/bundle"
	discoveryPath   = "/.well-known/openid-configuration"
	keysPath        = "/keys"
)

// Public serves the public endpoint. Its methods are safe for concurrent use.
type Public struct {
	Registry *registry.Registry
	// Issuer is what JWT-SVIDs say in iss, https://…; empty: there is no discovery.
	Issuer string
	// Service says why this CA must not answer, and is told who came by.
	Service *api.Service
	Log     *slog.Logger
}

// Serve answers on lis until ctx ends. It closes lis.
func (p *Public) Serve(ctx context.Context, lis net.Listener, cfg *tls.Config) error {
	return serveTLS(ctx, limit(lis), cfg, p.Handler(), p.Log)
}

// Handler routes. Paths are taken literally.
func (p *Public) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		path := r.URL.EscapedPath()
		switch {
		case isTrustBundle(path):
			p.answer(w, r, func(b *trust.Bundle) ([]byte, error) {
				noteReader(p.Service, r, b)
				return b.JWKS, nil
			})
		case path == p.issuerPath()+discoveryPath && p.Issuer != "":
			p.answer(w, r, p.discovery)
		case path == p.issuerPath()+keysPath && p.Issuer != "":
			p.answer(w, r, keys)
		default:
			problem(w, http.StatusNotFound, "nothing is served at this path")
		}
	})
}

// isTrustBundle says whether path is the trust bundle's: for everybody, or for a reader
// that was invited.
func isTrustBundle(path string) bool {
	rest, ok := strings.CutPrefix(path, TrustBundlePath)
	return ok && (rest == "" || rest[0] == '/' && federation.IsReader(rest[1:]))
}

// noteReader tells the service of a reader that was invited, and is sent b.
func noteReader(s *api.Service, r *http.Request, b *trust.Bundle) {
	reader := strings.TrimPrefix(strings.TrimPrefix(r.URL.EscapedPath(), TrustBundlePath), "/")
	if reader != "" && r.Method == http.MethodGet {
		s.NoteReader(reader, b.Sequence)
	}
}

// issuerPath is the path of the issuer's URL, under which its documents are (OpenID
// Connect Discovery 1.0 §4).
func (p *Public) issuerPath() string {
	_, rest, _ := strings.Cut(p.Issuer, "://")
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		return rest[i:]
	}
	return ""
}

// answer sends a document that follows from the trust bundle. It may be kept as long as
// the trust bundle may.
func (p *Public) answer(w http.ResponseWriter, r *http.Request, document func(*trust.Bundle) ([]byte, error)) {
	if !allow(w, r, http.MethodGet, http.MethodHead) {
		return
	}
	if err := p.Service.Standing(); err != nil {
		problem(w, http.StatusServiceUnavailable, "this CA cannot answer now")
		return
	}
	b := p.Registry.Trust()
	if b == nil {
		problem(w, http.StatusServiceUnavailable, "no trust bundle is published yet")
		return
	}
	body, err := document(b)
	if err != nil {
		p.Log.LogAttrs(r.Context(), slog.LevelError, "document of the public endpoint not made", slog.String("path", r.URL.Path), slog.Any("err", err))
		problem(w, http.StatusInternalServerError, "the document could not be made")
		return
	}
	writeDocument(w, r, b, body)
}

// writeDocument sends body, which follows from b, as public JSON.
func writeDocument(w http.ResponseWriter, r *http.Request, b *trust.Bundle, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "public, max-age="+strconv.Itoa(int(b.Hint()/time.Second)))
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // the client may be gone; nothing to do about it
	}
}

// discovery is the OpenID provider's metadata (OpenID Connect Discovery 1.0 §3).
// Tokens come from the Workload API, so there is no endpoint to ask for one.
func (p *Public) discovery(b *trust.Bundle) ([]byte, error) {
	algorithms := make(map[string]bool)
	for _, key := range b.Keys.JWTAuthorities() {
		alg, err := authority.JWSAlgorithm(key)
		if err != nil {
			return nil, err
		}
		algorithms[alg] = true
	}
	return json.Marshal(struct {
		Issuer        string   `json:"issuer"`
		JWKSURI       string   `json:"jwks_uri"`
		ResponseTypes []string `json:"response_types_supported"`
		SubjectTypes  []string `json:"subject_types_supported"`
		Algorithms    []string `json:"id_token_signing_alg_values_supported"`
	}{p.Issuer, p.Issuer + keysPath, []string{"id_token"}, []string{"public"}, append([]string{}, slices.Sorted(maps.Keys(algorithms))...)})
}

// keys is the JWK set of discovery: the JWT authorities, as keys that sign.
func keys(b *trust.Bundle) ([]byte, error) {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	authorities := b.Keys.JWTAuthorities()
	for _, kid := range slices.Sorted(maps.Keys(authorities)) {
		key := authorities[kid]
		alg, err := authority.JWSAlgorithm(key)
		if err != nil {
			return nil, err
		}
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: key, KeyID: kid, Algorithm: alg, Use: "sig"})
	}
	return json.Marshal(set)
}
