// Answers of an app that is broken or hostile, WebSockets, and callers that dawdle.

package sidecar

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"merlon.dev/policy"
)

// saying is an app that answers anything with these bytes, and closes.
func saying(t testing.TB, answer string) string {
	lis := listen(t)
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
					io.WriteString(conn, answer)
				}
			}()
		}
	}()
	return lis.Addr().String()
}

func TestAnswersThatAreAmbiguousDoNotGoOn(t *testing.T) {
	for name, answer := range map[string]string{
		"nothing":               "",
		"no HTTP":               "SSH-2.0-OpenSSH\r\n\r\n",
		"half a head":           "HTTP/1.1 200 OK\r\nX: ",
		"CL and TE":             "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"two CLs":               "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
		"bare LF":               "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
		"obs-fold":              "HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n",
		"chunks in HTTP/1.0":    "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"malformed chunks":      "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
		"a status without end":  "HTTP/1.1 2000 OK\r\n\r\n",
		"an upgrade of its own": "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"a long head":           "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("a", 20<<10) + "\r\n\r\n",
		"endless preliminaries": strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 100),
	} {
		p := startPair(t, "http", saying(t, answer))
		conn := dial(t, p.outbound.addrs[0])
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		r := bufio.NewReader(conn)
		res, err := http.ReadResponse(r, nil)
		for err == nil && res.StatusCode < 200 {
			res, err = http.ReadResponse(r, nil)
		}
		if err != nil || res.StatusCode != http.StatusBadGateway {
			t.Errorf("%s: %v %v; want 502", name, res, err)
		}
	}
}

func TestAnswersOfEveryShapeGoOn(t *testing.T) {
	for name, tc := range map[string]struct {
		answer, body string
		broken       bool
	}{
		"until the end":              {"HTTP/1.1 200 OK\r\n\r\nabc", "abc", false},
		"HTTP/1.0":                   {"HTTP/1.0 200 OK\r\n\r\nabc", "abc", false},
		"HTTP/1.0 with a length":     {"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", "abc", false},
		"early hints before":         {"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "abc", false},
		"fewer bytes than it says":   {"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc", "abc", true},
		"chunks that break off":      {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "abc", true},
		"more bytes than it says":    {"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n\r\n", "abc", false},
		"a trailer":                  {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n", "abc", false},
		"Connection names something": {"HTTP/1.1 200 OK\r\nConnection: x-secret\r\nX-Secret: a\r\nContent-Length: 3\r\n\r\nabc", "abc", false},
	} {
		p := startPair(t, "http", saying(t, tc.answer))
		conn := dial(t, p.outbound.addrs[0])
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		r := bufio.NewReader(conn)
		res, err := http.ReadResponse(r, nil)
		for err == nil && res.StatusCode < 200 {
			res, err = http.ReadResponse(r, nil)
		}
		if err != nil || res.StatusCode != 200 || res.Header.Get("X-Secret") != "" {
			t.Errorf("%s: %v %v", name, res, err)
			continue
		}
		body, err := io.ReadAll(res.Body)
		if string(body) != tc.body || tc.broken != (err != nil) {
			t.Errorf("%s: %q, %v", name, body, err)
		}
		if more, _ := io.ReadAll(r); !tc.broken && !res.Close && len(more) > 0 {
			t.Errorf("%s: %q follows", name, more)
		}
	}
}

// A WebSocket is a request like others to the policy, and lives as long as that
// allows.
func TestWebSocketLivesAsLongAsThePolicyAllows(t *testing.T) {
	app, came := httpApp(t, func(w http.ResponseWriter, r *http.Request) {
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\n\r\nhello", r.Header.Get("Sec-WebSocket-Key"))
		io.Copy(conn, buffered)
	})
	const ask = "GET /socket HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: k\r\n\r\n"
	for name, remove := range map[string]func(p *pair){
		"policy":     func(p *pair) { p.td.Deny("web", "orders") },
		"revocation": func(p *pair) { p.td.Revoke("web") },
	} {
		p := startPair(t, "http", app)
		conn := dial(t, p.outbound.addrs[0])
		io.WriteString(conn, ask+"x")
		r := bufio.NewReader(conn)
		res, err := http.ReadResponse(r, nil)
		if err != nil || res.StatusCode != 101 || res.Header.Get("Sec-WebSocket-Accept") != "k" {
			t.Fatalf("%v %v", res, err)
		}
		buf := make([]byte, 6)
		if _, err := io.ReadFull(r, buf); err != nil || string(buf) != "hellox" {
			t.Fatalf("%q %v", buf, err)
		}
		remove(p)
		if n, err := r.Read(buf); err == nil {
			t.Errorf("%s: %d bytes came on a WebSocket that had to end", name, n)
		}
		if line := p.inbound.logged(1)[0]; line["status"] != 101.0 || line["bytes_out"] != 6.0 || line["bytes_in"] != 1.0 {
			t.Errorf("access log: %v", line)
		}
	}
	p := startPair(t, "http", app)
	p.td.Decide(func(*policy.Input) policy.Decision { return policy.Decision{Reason: policy.NoGrant} })
	before := came.Load()
	conn := dial(t, p.outbound.addrs[0])
	io.WriteString(conn, ask)
	if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != 403 {
		t.Errorf("%v %v", res, err)
	}
	if n := came.Load() - before; n != 0 {
		t.Errorf("the app saw %d requests", n)
	}
}

// endsSoon says whether the other end closes conn, long before the test's deadline.
func endsSoon(conn net.Conn) bool {
	begun := time.Now()
	io.Copy(io.Discard, conn)
	return time.Since(begun) < 25*time.Second
}

func TestCallersThatDawdleAreCut(t *testing.T) {
	app, came := httpApp(t, func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
	p := startPair(t, "http", app)
	short := 200 * time.Millisecond
	in := start(t, p.td, "orders", Config{
		Inbound:     []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: "http"}},
		IdleTimeout: short, HeadTimeout: short, StallTimeout: short, ResponseTimeout: short,
	})
	p.inbound = in
	for name, sent := range map[string]string{
		"silent":      "",
		"half a head": "GET / HTTP/1.1\r\nHo",
		"half a body": "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc",
		"half chunks": "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
		"one request": "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		conn := asWeb(t, p)
		io.WriteString(conn, sent)
		if !endsSoon(conn) {
			t.Errorf("%s: the connection was kept", name)
		}
	}
	dripped := asWeb(t, p)
	dripped.SetDeadline(time.Now().Add(30 * time.Second))
	n := 0
	for ; n < 10_000; n++ { // each byte in time, and the head is not
		if _, err := io.WriteString(dripped, "a"); err != nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n == 10_000 {
		t.Error("a head that never ended was waited for")
	}
	if came.Load() > 3 {
		t.Errorf("the app saw %d requests", came.Load())
	}
}

func TestAppThatDawdlesIsGivenUp(t *testing.T) {
	hold := make(chan struct{})
	app, _ := httpApp(t, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-hold:
		case <-r.Context().Done():
		}
	})
	defer close(hold)
	p := startPair(t, "http", app)
	p.inbound = start(t, p.td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: "http"}}, ResponseTimeout: 200 * time.Millisecond})
	conn := asWeb(t, p)
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != http.StatusGatewayTimeout {
		t.Errorf("%v %v; want 504", res, err)
	}
}
