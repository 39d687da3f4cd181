// A service that takes its callers step by step: audit mode and plaintext over HTTP.

package httpauth_test

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

// both serves TLS and plaintext on one port and gives the address.
func both(t *testing.T, id *sdk.Identity, handler http.Handler) string {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: httpauth.Handler(id, handler), ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(id.ServerListener(inner)) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return inner.Addr().String()
}

// seen answers what the handler knows of its call.
var seen = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	caller := "nobody"
	if peer, ok := sdk.PeerFromContext(r.Context()); ok {
		caller = peer.ID.String()
	}
	d, _ := sdk.DecisionFromContext(r.Context())
	fmt.Fprintf(w, "%s %s %v %v", caller, d.Reason, sdk.Audited(d), len(r.Header["X-Spiffe-Id"])+len(r.Header["X-Forwarded-Client-Cert"])+len(r.Header["X-Denied"]))
})

func TestGradualAdoption(t *testing.T) {
	td := sdktest.New(t)
	td.Decide(func(in *policy.Input) policy.Decision {
		if in.Path == "/allowed" {
			return policy.Decision{Allow: true, Reason: policy.Allowed}
		}
		return policy.Decision{Reason: policy.NoGrant, Response: &policy.Response{Status: 418, Headers: []policy.HeaderField{{Name: "x-denied", Value: "yes"}}}}
	})
	var log lockedBuffer
	now := time.Now()
	orders := td.Workload("orders", sdk.WithLogger(slog.New(slog.NewTextHandler(&log, nil))),
		sdk.WithAuditUntil(now.Add(time.Hour)), sdk.WithPlaintextUntil(now.Add(time.Hour)))
	if !strings.Contains(log.String(), "AUDIT MODE") {
		t.Errorf("the log does not speak of audit mode:\n%s", log.String())
	}
	address := both(t, orders, seen)
	secure := client(t, td.Workload("web"), sdk.Service("orders"))
	for path, want := range map[string]string{
		"/allowed": "spiffe://sdktest.test/web ALLOWED false 0",
		"/denied":  "spiffe://sdktest.test/web NO_GRANT true 0",
	} {
		res, body, err := get(secure, "https://"+address+path)
		if err != nil || body != want || res.StatusCode != 200 || res.ProtoMajor != 2 || res.Header.Get("X-Denied") != "" {
			t.Errorf("GET %s over TLS = %v %q, %v; want %q", path, res, body, err, want)
		}
	}

	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	for range 2 { // on one connection
		res := roundTrip(t, conn, "GET /allowed HTTP/1.1\r\nHost: x\r\nX-Spiffe-Id: spiffe://sdktest.test/web\r\nX-Forwarded-Client-Cert: URI=spiffe://sdktest.test/web\r\n\r\n")
		body, err := io.ReadAll(res.Body)
		if want := "nobody NO_IDENTITY true 0"; err != nil || string(body) != want {
			t.Errorf("GET over plaintext = %q, %v; want %q", body, err, want)
		}
	}
	if res := roundTrip(t, conn, "GET /a/../allowed HTTP/1.1\r\nHost: x\r\n\r\n"); res.StatusCode != 400 {
		t.Errorf("an ambiguous path over plaintext is answered %s", res.Status)
	}
	stats := orders.Stats()
	if stats.WouldDeny[policy.NoGrant] != 1 || stats.WouldDeny[policy.NoIdentity] != 2 || len(stats.Plaintext) != 1 || stats.Plaintext[0].Calls != 2 {
		t.Errorf("stats: %+v", stats)
	}
	if n := strings.Count(log.String(), "would be denied"); n != 3 {
		t.Errorf("%d lines of calls that would be denied; want 3:\n%s", n, log.String())
	}
}

// Once the date has passed a plaintext request is denied like any without identity,
// however it came.
func TestPlaintextRequestsAreDeniedAfterTheDate(t *testing.T) {
	td := sdktest.New(t)
	now := time.Now()
	orders := td.Workload("orders", sdk.WithAuditUntil(now.Add(time.Hour)), sdk.WithPlaintextUntil(now.Add(-time.Second)))
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: httpauth.Handler(orders, seen), ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(inner) }()
	t.Cleanup(func() { srv.Close(); <-done })
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, _, err := get(c, "http://"+inner.Addr().String()+"/")
	if err != nil || res.StatusCode != http.StatusForbidden {
		t.Errorf("GET = %v, %v; want 403", res, err)
	}
}

// TLS of somebody else's making proves nothing, and is no plaintext either.
func TestForeignTLSIsNoPlaintext(t *testing.T) {
	td := sdktest.New(t)
	now := time.Now()
	orders := td.Workload("orders", sdk.WithAuditUntil(now.Add(time.Hour)), sdk.WithPlaintextUntil(now.Add(time.Hour)))
	cfg := orders.ServerTLS()
	foreign := cfg.Clone()
	foreign.GetConfigForClient, foreign.VerifyConnection, foreign.ClientAuth = nil, nil, 0
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: httpauth.Handler(orders, seen), TLSConfig: foreign, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.ServeTLS(lis, "", "") }()
	t.Cleanup(func() { srv.Close(); <-done })
	res := roundTrip(t, dial(t, "https://"+lis.Addr().String(), td, "http/1.1"), "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if res.StatusCode != http.StatusForbidden {
		t.Errorf("GET over another TLS is answered %s; want 403", res.Status)
	}
}

// lockedBuffer is a log that tests read while it grows.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
