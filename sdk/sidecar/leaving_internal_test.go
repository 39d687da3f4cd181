// Callers of HTTP/1.1 that go away before they are answered.

package sidecar

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// awaited is an app that says when a request has come, and when it has been given up.
func awaited(t testing.TB, begin bool) (address string, came, left chan struct{}) {
	came, left = make(chan struct{}, 10), make(chan struct{}, 10)
	address, _ = httpApp(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if begin { // an answer that goes on and on, such as a stream of events
			io.WriteString(w, "event")
			w.(http.Flusher).Flush()
		}
		came <- struct{}{}
		<-r.Context().Done()
		left <- struct{}{}
	})
	return address, came, left
}

// A caller that closes its connection, or that dies, has its request given up by both
// sidecars and so by the app, long before any time has run out.
func TestRequestsOfCallersThatLeaveAreGivenUp(t *testing.T) {
	for name, leave := range map[string]func(net.Conn){
		"closes":         func(c net.Conn) { c.Close() },
		"resets":         func(c net.Conn) { c.(*net.TCPConn).SetLinger(0); c.Close() },
		"says no more":   func(c net.Conn) { c.(*net.TCPConn).CloseWrite() },
		"ends its write": func(c net.Conn) { c.(*net.TCPConn).CloseWrite(); c.Close() },
	} {
		for _, begin := range []bool{false, true} {
			app, came, left := awaited(t, begin)
			p := startPairWith(t, "http", app, func(c *Config) {
				c.ResponseTimeout, c.StallTimeout = time.Hour, time.Hour
				for i := range c.Inbound {
					c.Inbound[i].Retry = Retry{Methods: []string{"PUT"}} // not for this
				}
			})
			conn := dial(t, p.outbound.addrs[0])
			io.WriteString(conn, "PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody")
			<-came
			if begin {
				if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != 200 {
					t.Fatal(res, err)
				}
			}
			leave(conn)
			select {
			case <-left:
			case <-time.After(30 * time.Second):
				t.Fatalf("%s: the app goes on", name)
			}
			for _, r := range []*running{p.outbound, p.inbound} {
				if line := r.logged(1)[0]; line["err"] != "the caller has gone away" || line["failure"] != nil {
					t.Errorf("%s: the access log has %v", name, line)
				}
			}
			for _, r := range []*running{p.outbound, p.inbound} {
				for _, u := range r.sidecar.listeners()[0].Upstreams {
					if u.Requests != 0 || u.State != hop.Healthy {
						t.Errorf("%s: afterwards the upstream is %+v", name, u)
					}
				}
			}
		}
	}
}

// A caller that the sidecar itself cuts off is one that has gone away: the app's request
// is given up then, not when some time has run out.
func TestRequestsOfCallersThatAreCutAreGivenUp(t *testing.T) {
	for name, cut := range map[string]func(td *sdktest.TD, r *running){
		"revoked": func(td *sdktest.TD, _ *running) { td.Revoke("web") },
		"drained": func(_ *sdktest.TD, r *running) { r.stop() },
	} {
		for side, begin := range map[string]bool{"before the answer": false, "in the answer": true} {
			t.Run(name+", "+side, func(t *testing.T) {
				app, came, left := awaited(t, begin)
				td := sdktest.New(t)
				td.Allow("web", "orders")
				in := start(t, td, "orders", Config{
					Inbound:         []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: "http"}},
					ResponseTimeout: time.Hour, StallTimeout: time.Hour, DrainTimeout: 50 * time.Millisecond,
				})
				conn := tls.Client(dial(t, in.addrs[0]), careless(td, "web", "http/1.1"))
				t.Cleanup(func() { conn.Close() }) // late: that it leaves is not what is tested
				io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
				<-came
				cut(td, in)
				select {
				case <-left:
				case <-time.After(30 * time.Second):
					t.Fatal("the app goes on")
				}
				in.logged(1)
			})
		}
	}
}

// What is sent after a request, and the ends of other connections, end nothing.
func TestOnlyTheCallersEndGivesARequestUp(t *testing.T) {
	hold := make(chan struct{})
	var asked atomic.Int64
	arrived := make(chan struct{}, 10)
	app, _ := httpApp(t, func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) == 1 {
			arrived <- struct{}{}
			<-hold
		}
		io.WriteString(w, "served")
	})
	p := startPair(t, "http", app)
	conn := dial(t, p.outbound.addrs[0])
	io.WriteString(conn, "GET /first HTTP/1.1\r\nHost: a\r\n\r\n")
	<-arrived
	io.WriteString(conn, "GET /second HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n") // already
	for range 20 {
		other := dial(t, p.outbound.addrs[0])
		io.WriteString(other, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		if res, err := http.ReadResponse(bufio.NewReader(other), nil); err != nil || res.StatusCode != 200 {
			t.Error(res, err)
		}
		other.Close()
	}
	close(hold)
	in := bufio.NewReader(conn)
	for _, which := range []string{"first", "second"} {
		res, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatalf("%s: %v", which, err)
		}
		if text, err := io.ReadAll(res.Body); string(text) != "served" || err != nil {
			t.Errorf("%s: %q %v", which, text, err)
		}
	}
}
