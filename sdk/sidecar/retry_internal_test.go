// What is tried once more, and what never is.

package sidecar

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// fickle is an app of HTTP/1.1 that does with its nth request what do says, on a
// connection of its own: nothing more to read is an end without an answer.
func fickle(t testing.TB, do func(n int64, r *http.Request) (answer string)) (address string, came *atomic.Int64) {
	came = new(atomic.Int64)
	lis := listen(t)
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(30 * time.Second))
				r, err := http.ReadRequest(bufio.NewReader(conn))
				if err != nil {
					return
				}
				if r.ContentLength > 0 {
					io.Copy(io.Discard, r.Body)
				}
				io.WriteString(conn, do(came.Add(1), r))
			}()
		}
	}()
	return lis.Addr().String(), came
}

const served = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"

func TestOnlyWhatMayBeDoneTwiceIsTriedAgain(t *testing.T) {
	gets := Retry{Methods: []string{"GET", "PUT"}}
	for name, tc := range map[string]struct {
		retry        Retry
		method, body string
		first        string // the answer
		status       int
		came         int64
	}{
		"as configured":                  {gets, "GET", "", "", 200, 2},
		"with a body that is at hand":    {gets, "PUT", "body", "", 200, 2},
		"another method":                 {gets, "DELETE", "", "", 502, 1},
		"a method that is none of these": {gets, "POST", "body", "", 502, 1},
		"not configured":                 {Retry{}, "GET", "", "", 502, 1},
		"no further attempts":            {Retry{Attempts: 1, Methods: []string{"GET"}}, "GET", "", "", 502, 1},
		"a body that is not at hand":     {gets, "PUT", strings.Repeat("a", 1<<20), "", 502, 1},
		"an answer that has begun":       {gets, "GET", "", "HTTP/1.1 200 OK\r\n", 502, 1},
		"a hint of an answer":            {gets, "GET", "", "HTTP/1.1 103 Early Hints\r\n\r\n", 502, 1},
		"a denial of the app's":          {gets, "GET", "", "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 403, 1},
		"an error of the app's":          {gets, "GET", "", "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 503, 1},
	} {
		t.Run(name, func(t *testing.T) {
			app, came := fickle(t, func(n int64, _ *http.Request) string {
				if n == 1 {
					return tc.first
				}
				return served
			})
			p := startPairWith(t, "http", app, func(c *Config) {
				for i := range c.Inbound {
					c.Inbound[i].Retry = tc.retry
				}
			})
			var body io.Reader
			if tc.body != "" {
				body = strings.NewReader(tc.body)
			}
			res, _ := do(t, p.direct(t, "http", true), tc.method, "http://orders/", body)
			if res.StatusCode != tc.status || came.Load() != tc.came {
				t.Errorf("%s, and the app saw %d requests; want %d and %d", res.Status, came.Load(), tc.status, tc.came)
			}
			further := float64(tc.came - 1)
			line := p.inbound.logged(1)[0]
			if n, _ := line["retries"].(float64); n != further || p.inbound.metric("merlon_sidecar_retries_total", "result", "made") != further {
				t.Errorf("the access log has %v, the metrics %v; want %v retries", line, p.inbound.metric("merlon_sidecar_retries_total"), further)
			}
		})
	}
}

// A denial of the policy's reaches nobody, however often a request may be tried.
func TestDenialsAreNotTriedAgain(t *testing.T) {
	app, came := fickle(t, func(int64, *http.Request) string { return served })
	p := startPair(t, "http", app)
	p.td.Deny("web", "orders")
	out := start(t, p.td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: p.inbound.addrs, Protocol: "http", Retry: Retry{Attempts: 9, Methods: []string{"GET"}}}}})
	await(t, "the denial", func() bool {
		res, _ := do(t, client(t), "GET", "http://"+out.addrs[0]+"/", nil)
		return res.StatusCode == 403
	})
	if n := out.metric("merlon_sidecar_retries_total"); n != 0 || came.Load() > 1 {
		t.Errorf("%v retries, and the app saw %d requests", n, came.Load())
	}
}

// While as many requests as the budget allows are tried again, others fail at once.
func TestRetriesHaveABudget(t *testing.T) {
	hold, again := make(chan struct{}), make(chan struct{}, 10)
	seen := map[string]*atomic.Int64{"/a": {}, "/b": {}}
	app, _ := fickle(t, func(_ int64, r *http.Request) string {
		if seen[r.URL.Path].Add(1) == 1 {
			return ""
		}
		again <- struct{}{}
		<-hold
		return served
	})
	p := startPairWith(t, "http", app, func(c *Config) {
		for i := range c.Inbound {
			c.Inbound[i].Retry = Retry{Methods: []string{"GET"}, BudgetPercent: 1, BudgetFloor: 1}
		}
	})
	c := p.direct(t, "http", true)
	first := make(chan string, 1)
	go func() {
		res, err := c.Get("http://orders/a")
		if err != nil {
			first <- err.Error()
			return
		}
		res.Body.Close()
		first <- res.Status
	}()
	<-again
	if res, _ := do(t, c, "GET", "http://orders/b", nil); res.StatusCode != 502 || seen["/b"].Load() != 1 {
		t.Errorf("beyond the budget: %s, tried %d times", res.Status, seen["/b"].Load())
	}
	if n := p.inbound.metric("merlon_sidecar_retries_total", "result", "over_budget"); n != 1 {
		t.Errorf("%v retries over the budget are counted", n)
	}
	close(hold)
	if got := <-first; got != "200 OK" {
		t.Errorf("the one that was tried again: %s", got)
	}
	p.inbound.logged(2)
	seen["/b"].Store(0)
	if res, _ := do(t, c, "GET", "http://orders/b", nil); res.StatusCode != 200 {
		t.Errorf("when the budget is there again: %s", res.Status)
	}
}

func TestRequestsEndInTime(t *testing.T) {
	drip := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/late" {
			<-r.Context().Done()
			return
		}
		for r.Context().Err() == nil { // never still for long
			io.WriteString(w, "a")
			w.(http.Flusher).Flush()
			time.Sleep(5 * time.Millisecond)
		}
	}
	for _, protocol := range []string{"http", "http2"} {
		var app string
		if protocol == "http" {
			app, _ = httpApp(t, drip)
		} else {
			app = h2cServer(t, drip)
		}
		p := startPairWith(t, protocol, app, func(c *Config) {
			for i := range c.Inbound {
				c.Inbound[i].Timeouts = Timeouts{Request: 300 * time.Millisecond}
			}
		})
		c := p.direct(t, protocol, true)
		res, text := do(t, c, "GET", "http://orders/late", nil)
		if res.StatusCode != http.StatusGatewayTimeout || !strings.Contains(text, "UPSTREAM_TIMEOUT") {
			t.Errorf("%s: %s %q; want 504", protocol, res.Status, text)
		}
		res, err := c.Get("http://orders/drip")
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, res.Body); err == nil || n == 0 {
			t.Errorf("%s: an answer that goes on and on: %d bytes, %v; want that it breaks off", protocol, n, err)
		}
		res.Body.Close()
		for _, line := range p.inbound.logged(2) {
			if line["failure"] != "UPSTREAM_TIMEOUT" {
				t.Errorf("%s: the access log has %v", protocol, line)
			}
		}
	}
}

// h2cServer serves HTTP/2 in the plain.
func h2cServer(t testing.TB, handler http.HandlerFunc) (address string) {
	var one http.Protocols
	one.SetUnencryptedHTTP2(true)
	lis := listen(t)
	srv := &http.Server{Protocols: &one, ReadHeaderTimeout: time.Minute, Handler: handler}
	go srv.Serve(lis)
	t.Cleanup(func() { srv.Close() })
	return lis.Addr().String()
}

// A listener's own times are in the place of those of the file.
func TestTimeoutsOfOneListener(t *testing.T) {
	all := Config{ConnectTimeout: time.Second, IdleTimeout: 2 * time.Second, StallTimeout: 3 * time.Second, ResponseTimeout: 4 * time.Second, TCPIdleTimeout: 5 * time.Second}
	own := Timeouts{Connect: 10 * time.Second, Idle: 20 * time.Second, Stall: 30 * time.Second, Response: 40 * time.Second, Request: 50 * time.Second}
	for name, tc := range map[string]struct {
		protocol string
		own      Timeouts
		want     string
	}{
		"the file's":     {"http", Timeouts{}, "1s 2s 3s 4s 5s 0s"},
		"the listener's": {"http", own, "10s 20s 30s 40s 5s 50s"},
		"of tcp":         {"tcp", Timeouts{Idle: 20 * time.Second}, "1s 2s 3s 4s 20s 0s"},
	} {
		l := all.limits()
		tc.own.apply(&l, tc.protocol)
		if got := fmt.Sprint(l.HandshakeTimeout, l.IdleTimeout, l.StallTimeout, l.ResponseTimeout, l.QuietTimeout, l.RequestTimeout); got != tc.want {
			t.Errorf("%s: %s; want %s", name, got, tc.want)
		}
	}
	app, _ := httpApp(t, func(http.ResponseWriter, *http.Request) {})
	p := startPairWith(t, "http", app, func(c *Config) {
		for i := range c.Outbound {
			c.Outbound[i].Timeouts = Timeouts{Idle: 50 * time.Millisecond}
		}
	})
	if conn := dial(t, p.outbound.addrs[0]); !endsSoon(conn) {
		t.Error("the connection was kept")
	}
}
