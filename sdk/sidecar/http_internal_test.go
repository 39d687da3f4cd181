// HTTP/1.1 through two sidecars, with ordinary clients and servers at the ends.

package sidecar

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
)

// httpApp serves handler and counts its requests.
func httpApp(t testing.TB, handler http.HandlerFunc) (address string, came *atomic.Int64) {
	came = new(atomic.Int64)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		came.Add(1)
		handler(w, r)
	}))
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String(), came
}

// client is an ordinary HTTP client with connections of its own.
func client(t testing.TB) *http.Client {
	transport := &http.Transport{ExpectContinueTimeout: 10 * time.Second}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}

// do sends a request through the pair and reads the whole answer.
func do(t testing.TB, c *http.Client, method, url string, body io.Reader, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(text)
}

func TestHTTPGoesThrough(t *testing.T) {
	app, _ := httpApp(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(err)
		}
		w.Header().Set("X-App", "yes")
		switch r.URL.Path {
		case "/nothing":
			w.WriteHeader(http.StatusNoContent)
		case "/chunks":
			for range 3 {
				fmt.Fprintf(w, "%d;", len(body))
				w.(http.Flusher).Flush()
			}
		default:
			fmt.Fprintf(w, "%s %s %s %s %s", r.Method, r.RequestURI, r.Host, r.Header.Get("X-Spiffe-Id"), body)
		}
	})
	p := startPair(t, "http", app)
	url := "http://" + p.outbound.addrs[0]
	c := client(t)
	web := p.td.ID("web").String()
	for name, tc := range map[string]struct {
		method, path, body, want string
		chunked                  bool
	}{
		"GET":                {"GET", "/a/b?c=d&e=%2F", "", "GET /a/b?c=d&e=%2F " + p.outbound.addrs[0] + " " + web + " ", false},
		"POST":               {"POST", "/p", "hello", "POST /p " + p.outbound.addrs[0] + " " + web + " hello", false},
		"chunked request":    {"PUT", "/p", "hello", "PUT /p " + p.outbound.addrs[0] + " " + web + " hello", true},
		"chunked answer":     {"POST", "/chunks", "abc", "3;3;3;", false},
		"no body":            {"GET", "/nothing", "", "", false},
		"HEAD":               {"HEAD", "/a", "", "", false},
		"a method of theirs": {"PROPFIND", "/a", "", "PROPFIND /a " + p.outbound.addrs[0] + " " + web + " ", false},
	} {
		for range 2 { // on a kept connection, too
			var body io.Reader
			if tc.body != "" {
				body = strings.NewReader(tc.body)
				if tc.chunked {
					body = struct{ io.Reader }{body}
				}
			}
			res, got := do(t, c, tc.method, url+tc.path, body)
			if got != tc.want || res.Header.Get("X-App") != "yes" {
				t.Errorf("%s: %s %q; want %q", name, res.Status, got, tc.want)
			}
		}
	}
	for _, line := range p.inbound.logged(14) {
		if line["reason"] != string(policy.Allowed) || line["err"] != nil || line["source"] != web {
			t.Errorf("access log: %v", line)
		}
	}
}

func TestLargeBodiesGoThrough(t *testing.T) {
	app, _ := httpApp(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/duplex" { // back before all has come
			http.NewResponseController(w).EnableFullDuplex()
			io.Copy(w, r.Body)
			return
		}
		body, _ := io.ReadAll(r.Body)
		w.Write(body)
	})
	p := startPair(t, "http", app)
	sent := make([]byte, 3<<20+17)
	rand.Read(sent)
	c := client(t)
	for _, path := range []string{"/", "/duplex", "/"} {
		for _, body := range []io.Reader{bytes.NewReader(sent), struct{ io.Reader }{bytes.NewReader(sent)}} {
			res, got := do(t, c, "POST", "http://"+p.outbound.addrs[0]+path, body)
			if res.StatusCode != 200 || got != string(sent) {
				t.Fatalf("%s: %s with %d bytes; want 200 with the %d that were sent", path, res.Status, len(got), len(sent))
			}
		}
	}
}

func TestAppMayAnswerBeforeItHasReadTheBody(t *testing.T) {
	app, _ := httpApp(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "close")
		w.WriteHeader(http.StatusRequestEntityTooLarge)
	})
	p := startPair(t, "http", app)
	conn := dial(t, p.outbound.addrs[0])
	fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\nsome of it")
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusRequestEntityTooLarge || !res.Close {
		t.Errorf("%s, close %v", res.Status, res.Close)
	}
}

func TestExpectContinue(t *testing.T) {
	app, _ := httpApp(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		io.Copy(w, r.Body)
	})
	p := startPair(t, "http", app)
	res, got := do(t, client(t), "POST", "http://"+p.outbound.addrs[0]+"/yes", strings.NewReader("hello"), "Expect", "100-continue")
	if got != "hello" {
		t.Errorf("%s %q", res.Status, got)
	}
	if res, _ := do(t, client(t), "POST", "http://"+p.outbound.addrs[0]+"/no", strings.NewReader("hello"), "Expect", "100-continue"); res.StatusCode != http.StatusForbidden {
		t.Errorf("%s; want 403", res.Status)
	}
}

func TestDenialExplainsItselfAndReachesNobody(t *testing.T) {
	app, came := httpApp(t, func(http.ResponseWriter, *http.Request) {})
	p := startPair(t, "http", app)
	c := client(t)
	url := "http://" + p.outbound.addrs[0] + "/a"
	if res, _ := do(t, c, "GET", url, nil); res.StatusCode != 200 {
		t.Fatal(res.Status)
	}
	p.td.Deny("web", "orders")
	res, text := do(t, c, "POST", url, strings.NewReader("body"))
	var problem denial.Problem
	if err := json.Unmarshal([]byte(text), &problem); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	if res.StatusCode != 403 || problem.Reason != policy.DenyRule || problem.DecisionID == "" || res.Header.Get("X-Decision-Id") != problem.DecisionID {
		t.Errorf("%s %v %+v", res.Status, res.Header, problem)
	}
	p.td.Forget("web", "orders")
	p.td.Allow("web", "orders")
	if res, _ := do(t, c, "GET", url, nil); res.StatusCode != 200 {
		t.Errorf("after the denial on the same connection: %s", res.Status)
	}
	if n := came.Load(); n != 2 {
		t.Errorf("the app saw %d requests; want 2", n)
	}
	lines := p.inbound.logged(3)
	if lines[1]["decision_id"] != problem.DecisionID || lines[1]["status"] != 403.0 || lines[1]["upstream"] != nil {
		t.Errorf("access log: %v", lines[1])
	}
}

func TestWhatThePolicySendsIsSent(t *testing.T) {
	app, _ := httpApp(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header["X-Team"], r.Header["X-Secret"], r.Header["X_secret"])
	})
	p := startPair(t, "http", app)
	p.td.Decide(func(in *policy.Input) policy.Decision {
		if in.Path == "/no" {
			return policy.Decision{Reason: policy.DenyRule, Response: &policy.Response{Status: 418, Body: "tea", Headers: []policy.HeaderField{{Name: "x-a", Value: "b"}}}}
		}
		return policy.Decision{Allow: true, Reason: policy.Allowed, Response: &policy.Response{
			Headers: []policy.HeaderField{{Name: "x-team", Value: "shop"}}, RemoveHeaders: []string{"x-secret"},
			ResponseHeaders: []policy.HeaderField{{Name: "x-policy", Value: "1"}},
		}}
	})
	url := "http://" + p.outbound.addrs[0]
	res, got := do(t, client(t), "GET", url+"/", nil, "X-Team", "forged", "X-Secret", "s", "x_secret", "s")
	if got != "[shop] [] []" || res.Header.Get("X-Policy") != "1" {
		t.Errorf("%q %v", got, res.Header)
	}
	if res, got := do(t, client(t), "GET", url+"/no", nil); res.StatusCode != 418 || got != "tea" || res.Header.Get("X-A") != "b" || res.Header.Get("X-Decision-Id") == "" {
		t.Errorf("%s %q %v", res.Status, got, res.Header)
	}
}

// A request that lasts ends when the policy does not allow it any more: with the
// denial where no answer has begun, with a broken one where it has.
func TestRequestUnderWayEndsWithThePolicy(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	app, _ := httpApp(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/begun" {
			fmt.Fprint(w, "begun")
			w.(http.Flusher).Flush()
		}
		select {
		case <-hold:
		case <-r.Context().Done():
		}
	})
	for _, path := range []string{"/silent", "/begun"} {
		p := startPair(t, "http", app)
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+p.outbound.addrs[0]+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if path == "/silent" {
			time.AfterFunc(100*time.Millisecond, func() { p.td.Deny("web", "orders") })
		}
		res, err := client(t).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if path == "/begun" {
			p.td.Deny("web", "orders")
		}
		text, err := io.ReadAll(res.Body)
		res.Body.Close()
		switch {
		case path == "/silent" && (res.StatusCode != 403 || !strings.Contains(string(text), "DENY_RULE")):
			t.Errorf("%s: %s %q", path, res.Status, text)
		case path == "/begun" && err == nil:
			t.Errorf("%s: a broken answer passed for a whole one: %q", path, text)
		}
		p.inbound.logged(1)
	}
}

func TestAppThatIsAwayIsToldAsSuch(t *testing.T) {
	lis := listen(t)
	lis.Close()
	p := startPair(t, "http", lis.Addr().String())
	if res, text := do(t, client(t), "GET", "http://"+p.outbound.addrs[0]+"/", nil); res.StatusCode != 503 || strings.Contains(text, lis.Addr().String()) {
		t.Errorf("%s %q", res.Status, text)
	}
	out := start(t, p.td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: []string{lis.Addr().String()}, Protocol: "http"}}})
	if res, text := do(t, client(t), "GET", "http://"+out.addrs[0]+"/", nil); res.StatusCode != 503 || !strings.Contains(text, lis.Addr().String()) {
		t.Errorf("%s %q", res.Status, text)
	}
}

func TestConnectionsOutliveRotation(t *testing.T) {
	app, _ := httpApp(t, func(http.ResponseWriter, *http.Request) {})
	p := startPair(t, "http", app)
	c := client(t)
	for range 10 {
		for range 5 {
			if res, _ := do(t, c, "GET", "http://"+p.outbound.addrs[0]+"/", nil); res.StatusCode != 200 {
				t.Fatal(res.Status)
			}
		}
		p.td.Rotate("web")
		p.td.Rotate("orders")
	}
}

// The app closes connections when it likes; a request that was not sent yet is sent
// over another.
func TestKeptConnectionsThatTheAppHasClosedAreNotUsed(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer srv.Close()
	p := startPair(t, "http", srv.Listener.Addr().String())
	c := client(t)
	for range 20 {
		if res, _ := do(t, c, "POST", "http://"+p.outbound.addrs[0]+"/", strings.NewReader("x")); res.StatusCode != 200 {
			t.Fatal(res.Status)
		}
		srv.CloseClientConnections()
	}
}

func TestDrainFinishesWhatIsUnderWay(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	app, _ := httpApp(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(arrived)
			<-release
		}
		fmt.Fprint(w, "done")
	})
	p := startPair(t, "http", app)
	idle := dial(t, p.outbound.addrs[0])
	fmt.Fprintf(idle, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if _, err := http.ReadResponse(bufio.NewReader(idle), nil); err != nil {
		t.Fatal(err)
	}
	slow := dial(t, p.outbound.addrs[0])
	fmt.Fprintf(slow, "GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
	<-arrived
	stopped := make(chan struct{})
	go func() { p.outbound.stop(); close(stopped) }()
	if _, err := io.ReadAll(idle); err != nil {
		t.Errorf("an idle connection: %v", err)
	}
	close(release)
	res, err := http.ReadResponse(bufio.NewReader(slow), nil)
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(res.Body); string(text) != "done" || err != nil || !res.Close {
		t.Errorf("%q, %v, close %v", text, err, res.Close)
	}
	<-stopped
}
