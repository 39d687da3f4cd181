// Every request is decided, over HTTP/1.1 as over HTTP/2, for as long as its
// connection lasts.

package httpauth_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start serves handler behind the middleware as users do, with only TLSConfig
// set, and gives the base URL.
func start(t testing.TB, id *sdk.Identity, handler http.Handler) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{
		Handler:           httpauth.Handler(id, handler),
		TLSConfig:         id.ServerTLS(),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.ServeTLS(lis, "", "") }()
	t.Cleanup(func() { srv.Close(); <-done })
	return "https://" + lis.Addr().String()
}

func client(t testing.TB, id *sdk.Identity, to sdk.Target) *http.Client {
	t.Helper()
	c := httpauth.Client(id, to)
	t.Cleanup(c.CloseIdleConnections)
	return c
}

func get(c *http.Client, url string) (*http.Response, string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, "", err
	}
	res, err := c.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res, string(body), err
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// whoami answers who the caller is and what was decided.
var whoami = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	peer, ok := sdk.PeerFromContext(r.Context())
	decision, decided := sdk.DecisionFromContext(r.Context())
	if !ok || !decided || !decision.Allow {
		http.Error(w, "no peer or decision", http.StatusInternalServerError)
		return
	}
	fmt.Fprintf(w, "%s over %s", peer.ID, r.Proto)
})

func TestHandlerKnowsItsCaller(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	url := start(t, td.Workload("orders"), whoami)
	_, body, err := get(client(t, td.Workload("web"), sdk.Service("orders")), url+"/orders/1")
	if want := "spiffe://sdktest.test/web over HTTP/2.0"; err != nil || body != want {
		t.Errorf("GET = %q, %v; want %q", body, err, want)
	}
}

func TestDenialExplainsItself(t *testing.T) {
	td := sdktest.New(t)
	url := start(t, td.Workload("orders"), whoami)
	_, _, err := get(client(t, td.Workload("web"), sdk.Service("orders")), url+"/orders/1")
	var denied *sdk.DeniedError
	if !errors.As(err, &denied) {
		t.Fatalf("GET = %v; want a *sdk.DeniedError", err)
	}
	if denied.Reason != policy.NoGrant || len(denied.DecisionID) != 24 || !strings.Contains(denied.Hint, denied.DecisionID) {
		t.Errorf("denied: %+v", denied)
	}

	// The same as anybody else sees it.
	raw := dial(t, url, td, "http/1.1")
	res := roundTrip(t, raw, "GET /orders/1 HTTP/1.1\r\nHost: x\r\n\r\n")
	var p httpauth.Problem
	if err := json.NewDecoder(res.Body).Decode(&p); err != nil {
		t.Fatal(err)
	}
	want := httpauth.Problem{
		Type: httpauth.ProblemType, Title: p.Title, Status: 403, Reason: policy.NoGrant,
		DecisionID: res.Header.Get("x-decision-id"), Hint: p.Hint,
	}
	if res.StatusCode != 403 || res.Header.Get("Content-Type") != "application/problem+json" || p.Title == "" || p.Hint == "" || p.DecisionID == "" || !cmp.Equal(p, want) {
		t.Errorf("%d %v %+v", res.StatusCode, res.Header, p)
	}
}

// Also one of an agent that is newer than the service.
func TestEveryReasonReachesTheCaller(t *testing.T) {
	td := sdktest.New(t)
	url := start(t, td.Workload("orders"), whoami)
	c := client(t, td.Workload("web"), sdk.Service("orders"))
	for _, reason := range append(policy.Reasons(), "SOMETHING_NEW") {
		if reason == policy.Allowed {
			continue
		}
		td.Decide(func(*policy.Input) policy.Decision { return policy.Decision{Reason: reason} })
		_, _, err := get(c, url+"/")
		var denied *sdk.DeniedError
		if !errors.As(err, &denied) || denied.Reason != reason {
			t.Errorf("%s: GET = %v", reason, err)
		}
	}
}

// T19: a connection is not a permission.
func TestEachRequestOnOneConnectionIsDecided(t *testing.T) {
	for _, protocol := range []string{"h2", "http/1.1"} {
		t.Run(protocol, func(t *testing.T) {
			td := sdktest.New(t)
			td.Allow("web", "orders")
			url := start(t, td.Workload("orders"), whoami)
			var dials atomic.Int32
			c := &http.Client{Transport: &http.Transport{
				ForceAttemptHTTP2: protocol == "h2",
				DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
					dials.Add(1)
					return td.Workload("web").DialTLS(sdk.Service("orders"), protocol)(ctx, network, address)
				},
			}}
			defer c.CloseIdleConnections()
			for _, step := range []struct {
				change func()
				want   int
			}{
				{func() {}, 200},
				{func() { td.Deny("web", "orders") }, 403},
				{func() { td.Forget("web", "orders"); td.Allow("web", "orders") }, 200},
				{func() { td.Forget("web", "orders") }, 403},
			} {
				step.change()
				res, body, err := get(c, url+"/")
				if err != nil || res.StatusCode != step.want {
					t.Fatalf("GET = %v, %q, %v; want %d", res, body, err, step.want)
				}
			}
			if n := dials.Load(); n != 1 {
				t.Errorf("%d connections; want all requests on 1", n)
			}
		})
	}
}

func TestWithoutOurTLSNobodyHasAnIdentity(t *testing.T) {
	td := sdktest.New(t)
	td.Decide(func(*policy.Input) policy.Decision { return policy.Decision{Allow: true, Reason: policy.Allowed} })
	id := td.Workload("orders")
	own := td.SVID("orders")
	// A server that asks for client certificates and verifies none.
	lis, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		MinVersion:   tls.VersionTLS13,
		ClientAuth:   tls.RequestClientCert,
		NextProtos:   []string{"http/1.1"},
		Certificates: []tls.Certificate{{Certificate: [][]byte{own.Certificates[0].Raw}, PrivateKey: own.PrivateKey}},
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: httpauth.Handler(id, whoami)}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(lis) }()
	defer func() { srv.Close(); <-done }()
	res := roundTrip(t, dial(t, "https://"+lis.Addr().String(), td, "http/1.1"), "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	var p httpauth.Problem
	if err := json.NewDecoder(res.Body).Decode(&p); err != nil || res.StatusCode != 403 || p.Reason != policy.NoIdentity {
		t.Errorf("%d %+v %v; want NO_IDENTITY", res.StatusCode, p, err)
	}
}

func TestRevocationCutsAnOpenStream(t *testing.T) {
	for _, protocol := range []string{"h2", "http/1.1"} {
		t.Run(protocol, func(t *testing.T) {
			td := sdktest.New(t)
			td.Allow("web", "orders")
			ended := make(chan struct{})
			url := start(t, td.Workload("orders"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.WriteString(w, "first\n")
				http.NewResponseController(w).Flush()
				<-r.Context().Done() // only the end of the connection ends this
				close(ended)
			}))
			conn := td.Workload("web").DialTLS(sdk.Service("orders"), protocol)
			c := &http.Client{Transport: &http.Transport{DialTLSContext: conn, ForceAttemptHTTP2: protocol == "h2"}}
			defer c.CloseIdleConnections()
			res, err := c.Get(url)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body := bufio.NewReader(res.Body)
			if line, err := body.ReadString('\n'); err != nil || line != "first\n" {
				t.Fatalf("%q, %v", line, err)
			}
			start := time.Now()
			td.Revoke("web")
			read := make(chan error, 1)
			go func() { _, err := body.ReadByte(); read <- err }()
			select {
			case err := <-read:
				if err == nil {
					t.Error("a byte came after the revocation")
				}
			case <-time.After(20 * time.Second):
				t.Fatal("the stream is alive 20 s after the revocation")
			}
			t.Logf("cut after %v", time.Since(start))
			<-ended
		})
	}
}

func TestRotationFailsNoRequest(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	url := start(t, td.Workload("orders"), whoami)
	web := td.Workload("web")
	c := client(t, web, sdk.Service("orders"))
	for i := range 20 {
		if i%2 == 0 {
			td.Rotate("web")
		} else {
			td.Rotate("orders")
		}
		for range 5 {
			if _, _, err := get(c, url+"/"); err != nil {
				t.Fatal(err)
			}
		}
	}
	own := func() string {
		svid, err := web.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		return svid.Certificates[0].SerialNumber.Text(16)
	}
	seen := make(chan string, 64)
	td.Decide(func(in *policy.Input) policy.Decision {
		seen <- in.SourceSerial
		return policy.Decision{Allow: true, Reason: policy.Allowed}
	})
	before := own()
	td.Rotate("web")
	eventually(t, "rotated", func() bool { return own() != before })
	eventually(t, "new requests show the new X509-SVID", func() bool {
		if _, _, err := get(c, url+"/"); err != nil {
			t.Fatal(err)
		}
		return <-seen == own()
	})
}

func TestReuseNeverCrossesTargets(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.Allow("web", "refunds")
	url := start(t, td.Workload("orders"), whoami)
	web := td.Workload("web")
	if _, _, err := get(client(t, web, sdk.Service("orders")), url+"/"); err != nil {
		t.Fatal(err)
	}
	// Same address, an open HTTP/2 connection, another expected identity.
	if res, body, err := get(client(t, web, sdk.Service("refunds")), url+"/"); err == nil {
		t.Errorf("GET = %v %q; the server is not refunds", res.Status, body)
	}
}

// The server's direction: callers whose HTTP/2 connections stay open take turns, and
// each is decided as who it is, whoever called before.
func TestReuseNeverCrossesCallers(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.Allow("shop", "orders")
	url := start(t, td.Workload("orders"), whoami)
	clients := make(map[string]*http.Client)
	for _, name := range []string{"web", "intruder", "shop"} {
		clients[name] = client(t, td.Workload(name), sdk.Service("orders"))
	}
	for _, name := range []string{"web", "intruder", "shop", "intruder", "web", "shop", "intruder"} {
		_, body, err := get(clients[name], url+"/")
		if name == "intruder" {
			if _, denied := errors.AsType[*sdk.DeniedError](err); !denied {
				t.Errorf("the intruder: %q, %v; want a denial", body, err)
			}
			continue
		}
		if want := "spiffe://sdktest.test/" + name + " over HTTP/2.0"; err != nil || body != want {
			t.Errorf("GET = %q, %v; want %q", body, err, want)
		}
	}
}

func TestTransportSpeaksOnlyTLS(t *testing.T) {
	td := sdktest.New(t)
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if _, _, err := get(client(t, td.Workload("web"), sdk.Service("orders")), "http://"+plain.Addr().String()+"/"); err == nil || !strings.Contains(err.Error(), "https URLs only") {
		t.Errorf("GET http:// = %v", err)
	}
}

func TestOtherRefusalsStayResponses(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	const body = `{"type":"about:blank","title":"no","decision_id":"theirs"}`
	url := start(t, td.Workload("orders"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.Header().Set("X-Decision-Id", "theirs")
		w.WriteHeader(403)
		_, _ = io.WriteString(w, body)
	}))
	res, got, err := get(client(t, td.Workload("web"), sdk.Service("orders")), url+"/")
	if err != nil || res.StatusCode != 403 || got != body {
		t.Errorf("GET = %v, %q, %v; want the application's own 403", res, got, err)
	}
}

func TestAgentAwayDeniesAndBackWorks(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	url := start(t, td.Workload("orders"), whoami)
	c := client(t, td.Workload("web"), sdk.Service("orders"))
	if _, _, err := get(c, url+"/"); err != nil {
		t.Fatal(err)
	}
	td.StopAgent("orders")
	_, _, err := get(c, url+"/")
	var denied *sdk.DeniedError
	if !errors.As(err, &denied) || denied.Reason != policy.AgentUnavailable {
		t.Errorf("GET = %v; want AGENT_UNAVAILABLE", err)
	}
	td.StartAgent("orders")
	eventually(t, "calls work again", func() bool { _, _, err := get(c, url+"/"); return err == nil })
}

func TestConnectionsAreDrainedBeforeTheyExpire(t *testing.T) {
	t.Parallel()
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.SetTTL(10 * time.Second)
	url := start(t, td.Workload("orders"), whoami)
	conn := dial(t, url, td, "http/1.1")
	td.SetTTL(time.Hour)
	reader := bufio.NewReader(conn)
	// It drains after about 2.5 s, and the cut comes after 10 s.
	for start := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(reader, nil)
		if err != nil {
			t.Fatalf("after %v: %v; want an answer that says close before the cut", time.Since(start), err)
		}
		_, _ = io.Copy(io.Discard, res.Body)
		if res.StatusCode != 200 {
			t.Fatalf("after %v: %s", time.Since(start), res.Status)
		}
		if res.Close {
			return
		}
	}
}
