// Who may do what over HTTPS, and what is served at which path.

package web

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/report"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

var td = spiffeid.RequireTrustDomainFromString("shop.test")

// newServer is a server over a real store; its bundles say who was let through.
func newServer(t *testing.T, publish bool) *Server {
	t.Helper()
	dir := t.TempDir()
	st, err := badger.Open(filepath.Join(dir, "store"), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(filepath.Join(dir, "audit.jsonl"), audit.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(log.Close(), st.Close()); err != nil {
			t.Error(err)
		}
	})
	if publish {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys := spiffebundle.FromJWTAuthorities(td, map[string]crypto.PublicKey{"k": key.Public()})
		if _, err := trust.Publish(t.Context(), st, keys); err != nil {
			t.Fatal(err)
		}
	}
	discard := slog.New(slog.DiscardHandler)
	decisions, err := report.OpenLog(report.LogOptions{Logger: discard, Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	reg, err := registry.Open(t.Context(), st, discard)
	if err != nil {
		t.Fatal(err)
	}
	return New(Options{
		Service:  api.New(api.Options{TrustDomain: td, Store: st, Registry: reg, Audit: log, Log: discard, Metrics: prometheus.NewRegistry()}),
		Registry: reg, Store: st, Audit: log, Log: discard, Statuses: new(report.Statuses), Decisions: decisions,
		Bundles: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if c := CallerFrom(r.Context()); c != nil {
				_, _ = io.WriteString(w, c.Name)
			}
		}),
	})
}

func (s *Server) ask(t *testing.T, method, target string, headers ...string) *http.Response {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, "https://ca.test"+target, nil)
	r.TLS = nil
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, r)
	return w.Result()
}

func TestPathsAreTakenLiterally(t *testing.T) {
	s := newServer(t, true)
	for target, want := range map[string]int{
		"/v1/trust/bundle":                200,
		"/v1/trust/bundle/":               404,
		"//v1/trust/bundle":               404,
		"/v1/./trust/bundle":              404,
		"/v1/trust/%62undle":              404,
		"/":                               404,
		"/metrics":                        404,
		"/debug/pprof/":                   404,
		"/v1/policy/bundles/main":         401,
		"/v1/status":                      405,
		"/v1/status/":                     404,
		"/v1/status/east":                 405,
		"/v1/status/a/b":                  404,
		"/v1/statuses":                    404,
		"/v1/logs":                        405,
		"/v1/logs/east":                   405,
		"/v1/logs/a/b":                    404,
		"/v1/policy/bundles/":             404,
		"/v1/policy/bundles/main/":        404,
		"/v1/policy/bundles/..":           404,
		"/v1/policy/bundles/a%2fb":        404,
		"/v1/policy/bundles/MAIN":         404,
		"/v1/policy/bundles/%6dain":       404,
		"/v1/policy/bundles/../bundles/x": 404,
	} {
		resp := s.ask(t, http.MethodGet, target)
		if resp.StatusCode != want || resp.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("GET %s = %d; want %d, and nosniff", target, resp.StatusCode, want)
		}
		if want != 200 && resp.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("GET %s: content type %q", target, resp.Header.Get("Content-Type"))
		}
	}
}

func TestMethods(t *testing.T) {
	s := newServer(t, true)
	for target, allow := range map[string]string{"/v1/trust/bundle": "GET, HEAD", "/v1/policy/bundles/main": "GET, HEAD, PUT"} {
		for _, method := range []string{http.MethodPost, http.MethodDelete, http.MethodPatch, http.MethodConnect, http.MethodOptions, http.MethodTrace, "\"><x>"} {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "https://ca.test"+target, nil)
			r.Method = method
			w := httptest.NewRecorder()
			s.Handler().ServeHTTP(w, r)
			if w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != allow || !json.Valid(w.Body.Bytes()) {
				t.Errorf("%q %s = %d, Allow %q, %s", method, target, w.Code, w.Header().Get("Allow"), w.Body)
			}
		}
	}
	if resp := s.ask(t, http.MethodHead, "/v1/trust/bundle"); resp.StatusCode != 200 || resp.ContentLength <= 0 {
		t.Errorf("HEAD = %d with %d bytes announced", resp.StatusCode, resp.ContentLength)
	}
	if resp := newServer(t, false).ask(t, http.MethodGet, "/v1/trust/bundle"); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("before the first trust bundle: %d; want 503", resp.StatusCode)
	}
}

func TestReaderTokenOpensItsBundleOnly(t *testing.T) {
	s := newServer(t, true)
	token, err := attest.CreateReaderToken(t.Context(), s.opts.Store, "main", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	old, err := attest.CreateReaderToken(t.Context(), s.opts.Store, "main", time.Now().Add(-time.Second))
	if err != nil {
		t.Fatal(err)
	}
	join, err := attest.CreateJoinToken(t.Context(), s.opts.Store, "n1", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	const main = "/v1/policy/bundles/main"
	for name, tt := range map[string]struct {
		method, target, authorization string
		want                          int
	}{
		"its bundle":     {http.MethodGet, main, "Bearer " + token, 200},
		"head":           {http.MethodHead, main, "Bearer " + token, 200},
		"writing":        {http.MethodPut, main, "Bearer " + token, 401},
		"another bundle": {http.MethodGet, main + "2", "Bearer " + token, 403},
		"expired":        {http.MethodGet, main, "Bearer " + old, 401},
		"a join token":   {http.MethodGet, main, "Bearer " + join, 401},
		"unknown":        {http.MethodGet, main, "Bearer mbr-" + strings.Repeat("a", 32), 401},
		"empty":          {http.MethodGet, main, "Bearer ", 401},
		"long":           {http.MethodGet, main, "Bearer mbr-" + strings.Repeat("a", 10_000), 401},
		"another scheme": {http.MethodGet, main, "Basic " + token, 401},
		"none":           {http.MethodGet, main, "", 401},
	} {
		resp := s.ask(t, tt.method, tt.target, "Authorization", tt.authorization)
		body, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != tt.want || strings.Contains(string(body), token) {
			t.Errorf("%s: %d %s; want %d, without the token", name, resp.StatusCode, body, tt.want)
		}
		if got := resp.Header.Get("WWW-Authenticate"); (got == "Bearer") != (tt.want == 401) {
			t.Errorf("%s: WWW-Authenticate %q", name, got)
		}
	}
	if _, err := attest.RedeemJoinToken(t.Context(), s.opts.Store, td, join, time.Now(), time.Now().Add(time.Hour)); err != nil {
		t.Errorf("showing a join token here used it up: %v", err)
	}
}

// That the store is away says nothing about the token.
func TestTokenThatCannotBeCheckedIsNotRefused(t *testing.T) {
	s := newServer(t, true)
	token, err := attest.CreateReaderToken(t.Context(), s.opts.Store, "main", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := httptest.NewRequestWithContext(ctx, http.MethodGet, "https://ca.test/v1/policy/bundles/main", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	if code, reason := s.admit(r, api.Anonymous(), "main"); code != http.StatusServiceUnavailable {
		t.Errorf("admit() = %d %s; want 503", code, reason)
	}
}

func TestEachKindOfCaller(t *testing.T) {
	s := newServer(t, true)
	peer := &svid.Peer{ID: spiffeid.RequireFromString("spiffe://shop.test/web")}
	nobody := []capb.Caller{capb.Caller_CALLER_ANONYMOUS}
	admin := func(name role.Name) *api.Caller {
		return &api.Caller{Name: "m", Peer: peer, Kinds: append(nobody[:1:1], capb.Caller_CALLER_ADMIN), Roles: []role.Role{{Name: name}}}
	}
	for name, tt := range map[string]struct {
		caller   *api.Caller
		get, put int
	}{
		"anonymous": {api.Anonymous(), 401, 401},
		"workload":  {&api.Caller{Name: "w", Peer: peer, Kinds: nobody}, 403, 403},
		"revoked":   {&api.Caller{Name: "r", Peer: peer, Kinds: nobody, Fault: "its X509-SVID is revoked"}, 401, 401},
		"agent":     {&api.Caller{Name: "a", Peer: peer, Kinds: append(nobody[:1:1], capb.Caller_CALLER_AGENT)}, 0, 403},
		"viewer":    {admin(role.Viewer), 0, 403},
		"registrar": {admin(role.Registrar), 403, 403},
		"publisher": {admin(role.PolicyPublisher), 0, 0},
		"operator":  {admin(role.Operator), 0, 0},
		"no role":   {admin(""), 403, 403},
		"bad token": {&api.Caller{Name: "anonymous", Kinds: nobody, Fault: "its bearer token is refused"}, 401, 401},
		"unjudged":  {&api.Caller{Name: "anonymous", Kinds: nobody, Unsure: "the keys cannot be fetched"}, 503, 503},
	} {
		for method, want := range map[string]int{http.MethodGet: tt.get, http.MethodPut: tt.put} {
			r := httptest.NewRequestWithContext(t.Context(), method, "https://ca.test/v1/policy/bundles/main", nil)
			if code, reason := s.admit(r, tt.caller, "main"); code != want {
				t.Errorf("%s %s = %d %s; want %d", name, method, code, reason, want)
			}
		}
	}
}

// A status is its sender's alone, and nobody without an identity has one.
func TestStatusIsForThoseWhoProveWhoTheyAre(t *testing.T) {
	s := newServer(t, true)
	token, err := attest.CreateReaderToken(t.Context(), s.opts.Store, "main", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	const status = `{"labels":{"id":"i1"},"bundles":{"main":{"active_revision":"7"}}}`
	for name, tt := range map[string]struct {
		method, authorization, body string
		want                        int
	}{
		"with a token":     {http.MethodPost, "Bearer " + token, status, 200},
		"without":          {http.MethodPost, "", status, 401},
		"an unknown token": {http.MethodPost, "Bearer mbr-aaaa", status, 401},
		"a JWT":            {http.MethodPost, "Bearer a.b.c", status, 401},
		"malformed":        {http.MethodPost, "Bearer " + token, "{", 400},
		"too large":        {http.MethodPost, "Bearer " + token, strings.Repeat(" ", report.MaxBytes+1), 413},
		"read":             {http.MethodGet, "Bearer " + token, "", 405},
	} {
		r := httptest.NewRequestWithContext(t.Context(), tt.method, "https://ca.test/v1/status", strings.NewReader(tt.body))
		r.TLS = nil
		r.Header.Set("Authorization", tt.authorization)
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		if w.Code != tt.want || strings.Contains(w.Body.String(), token) {
			t.Errorf("%s: %d %s; want %d, without the token", name, w.Code, w.Body, tt.want)
		}
	}
	all := s.opts.Statuses.Instances(time.Now())
	if len(all) != 1 || !strings.HasPrefix(all[0].Uploader, "token:main:") || all[0].PolicyBundle != "main" || all[0].Bundles[0].Revision != "7" || strings.Contains(all[0].Uploader, token) {
		t.Errorf("kept: %+v; want the one with a token", all)
	}
}

// Who may report, and about which destinations.
func TestReportersAndTheirScope(t *testing.T) {
	s := newServer(t, true)
	token, err := attest.CreateReaderToken(t.Context(), s.opts.Store, "main", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	as := func(path string, kinds ...capb.Caller) *api.Caller {
		id := spiffeid.RequireFromString("spiffe://shop.test" + path)
		return &api.Caller{Name: id.String(), Peer: &svid.Peer{ID: id}, Kinds: append([]capb.Caller{capb.Caller_CALLER_ANONYMOUS}, kinds...)}
	}
	revoked := as("/web")
	revoked.Fault = "its X509-SVID is revoked"
	for name, tt := range map[string]struct {
		caller *api.Caller
		token  string
		code   int
		about  string // comma list of those of /web, /orders and other.test/web that are in scope
	}{
		"workload":     {as("/web"), "", 0, "/web"},
		"revoked":      {revoked, "", 401, ""},
		"agent of /":   {as("/agent/n1", capb.Caller_CALLER_AGENT), "", 0, ""},
		"the CA":       {as("/ca", capb.Caller_CALLER_REPLICA), "", 403, ""},
		"anonymous":    {api.Anonymous(), "", 401, ""},
		"token":        {api.Anonymous(), token, 0, "/web,/orders"},
		"two at once":  {api.TwoCredentials(), token, 401, ""},
		"made-up":      {api.Anonymous(), "mbr-" + strings.Repeat("a", 32), 401, ""},
		"unsure agent": {&api.Caller{Name: "a", Unsure: "newer"}, "", 503, ""},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "https://ca.test/v1/logs", nil)
		if tt.token != "" {
			r.Header.Set("Authorization", "Bearer "+tt.token)
		}
		from, code, reason := s.reporterOf(r, tt.caller)
		var about []string
		for _, id := range []string{"spiffe://shop.test/web", "spiffe://shop.test/orders", "spiffe://other.test/web", "", "web"} {
			if code == 0 && from.scope(id) {
				about = append(about, strings.TrimPrefix(id, "spiffe://shop.test"))
			}
		}
		if code != tt.code || strings.Join(about, ",") != tt.about {
			t.Errorf("%s: %d %q about %q; want %d, %q", name, code, reason, about, tt.code, tt.about)
		}
	}
}

func TestUploadsAtTheSameTimeAreBounded(t *testing.T) {
	var u uploads
	var ends []func()
	begin := func(who string) bool {
		done, ok := u.begin(who)
		if ok {
			ends = append(ends, done)
		}
		return ok
	}
	first, second, third := begin("a"), begin("a"), begin("a")
	if !first || !second || third || !begin("b") {
		t.Error("one uploader has another share than two")
	}
	for n := range maxUploads {
		begin(string(rune('c' + n)))
	}
	if u.n != maxUploads || begin("z") {
		t.Errorf("%d uploads at the same time; want %d", u.n, maxUploads)
	}
	for _, done := range ends {
		done()
	}
	if u.n != 0 || len(u.by) != 0 || !begin("a") {
		t.Errorf("after all: %d, %v", u.n, u.by)
	}
}
