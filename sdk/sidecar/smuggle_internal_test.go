// Requests that two readers could understand differently, and what may go on: the
// corpus of SECURITY.md T13 to T18, sent raw over mutual TLS.

package sidecar

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk"
)

// rawApp records what arrives, and answers each request head with 200.
type rawApp struct {
	address string

	mu    sync.Mutex
	heads []string // guarded by mu
}

func startRawApp(t testing.TB) *rawApp {
	lis := listen(t)
	a := &rawApp{address: lis.Addr().String()}
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go a.serve(conn)
		}
	}()
	return a
}

func (a *rawApp) serve(conn net.Conn) {
	defer conn.Close()
	for r := bufio.NewReader(conn); ; {
		var head strings.Builder
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			head.WriteString(line)
			if line == "\r\n" {
				break
			}
		}
		a.mu.Lock()
		a.heads = append(a.heads, head.String())
		a.mu.Unlock()
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	}
}

func (a *rawApp) seen() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]string(nil), a.heads...)
}

// asWeb opens a raw connection to the inbound listener as workload web.
func asWeb(t testing.TB, p *pair) net.Conn {
	t.Helper()
	if p.web == nil {
		p.web = p.td.Workload("web")
	}
	conn, err := p.web.DialTLS(sdk.Service("orders"), "http/1.1")(t.Context(), "tcp", p.inbound.addrs[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

var malformed = map[string]string{
	"CL and TE":                       "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"TE and CL":                       "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
	"two CLs":                         "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
	"two equal CLs":                   "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
	"CL list":                         "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4, 4\r\n\r\nabcd",
	"CL with a sign":                  "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +4\r\n\r\nabcd",
	"negative CL":                     "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
	"hex CL":                          "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x4\r\n\r\nabcd",
	"CL beyond all numbers":           "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
	"empty CL":                        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
	"CL with an underscore":           "POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 4\r\n\r\nabcd",
	"TE.TE":                           "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
	"TE twice chunked":                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"TE list":                         "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
	"TE obscured":                     "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
	"TE with a parameter":             "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
	"TE behind a vertical tab":        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
	"TE with an underscore":           "POST / HTTP/1.1\r\nHost: a\r\nTransfer_Encoding: chunked\r\n\r\n0\r\n\r\n",
	"space before the colon":          "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
	"tab before the colon":            "GET / HTTP/1.1\r\nHost\t: a\r\n\r\n",
	"obs-fold":                        "GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
	"a first line that is folded":     "GET / HTTP/1.1\r\n Host: a\r\n\r\n",
	"bare LF":                         "GET / HTTP/1.1\nHost: a\n\n",
	"bare LF after a field":           "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
	"bare LF after a value":           "GET / HTTP/1.1\r\nHost: a\r\nX: bc\nY: d\r\n\r\n",
	"bare CR in a value":              "GET / HTTP/1.1\r\nHost: a\r\nX: b\rY: c\r\n\r\n",
	"bare CR at the end":              "GET / HTTP/1.1\r\nHost: a\r\nX: b\r\r\n\r\n",
	"NUL in a value":                  "GET / HTTP/1.1\r\nHost: a\r\nX: b\x00c\r\n\r\n",
	"NUL in a name":                   "GET / HTTP/1.1\r\nHost: a\r\nX\x00: b\r\n\r\n",
	"no name":                         "GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
	"no colon":                        "GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
	"a name outside of ASCII":         "GET / HTTP/1.1\r\nHost: a\r\nXé: b\r\n\r\n",
	"an empty line first":             "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
	"two Hosts":                       "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
	"two equal Hosts":                 "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
	"no Host":                         "GET / HTTP/1.1\r\nX: a\r\n\r\n",
	"an empty Host":                   "GET / HTTP/1.1\r\nHost:\r\n\r\n",
	"a Host with a path":              "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
	"a Host with a user":              "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
	"absolute form":                   "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
	"absolute form of another host":   "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
	"authority form":                  "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n",
	"CONNECT with a path":             "CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n",
	"asterisk form":                   "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
	"HTTP/1.0":                        "GET / HTTP/1.0\r\nHost: a\r\n\r\n",
	"HTTP/0.9":                        "GET /\r\n\r\n",
	"HTTP/2's preface":                "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	"a version in lower case":         "GET / http/1.1\r\nHost: a\r\n\r\n",
	"two spaces":                      "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
	"a tab in the request line":       "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
	"a space behind the version":      "GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
	"a space in the target":           "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
	"a fragment":                      "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
	"a fragment in the query":         "GET /a?b#c HTTP/1.1\r\nHost: a\r\n\r\n",
	"a method that is no token":       "GE(T / HTTP/1.1\r\nHost: a\r\n\r\n",
	"//":                              "GET //admin HTTP/1.1\r\nHost: a\r\n\r\n",
	"..":                              "GET /public/../admin HTTP/1.1\r\nHost: a\r\n\r\n",
	"encoded dots":                    "GET /public/%2e%2e/admin HTTP/1.1\r\nHost: a\r\n\r\n",
	"encoded slash":                   "GET /public%2fadmin HTTP/1.1\r\nHost: a\r\n\r\n",
	"encoded backslash":               "GET /public%5cadmin HTTP/1.1\r\nHost: a\r\n\r\n",
	"backslash":                       "GET /public\\admin HTTP/1.1\r\nHost: a\r\n\r\n",
	"semicolon":                       "GET /admin;a=b HTTP/1.1\r\nHost: a\r\n\r\n",
	"encoded NUL":                     "GET /admin%00.png HTTP/1.1\r\nHost: a\r\n\r\n",
	"double encoding":                 "GET /%252e%252e/ HTTP/1.1\r\nHost: a\r\n\r\n",
	"encoded letter":                  "GET /%61dmin HTTP/1.1\r\nHost: a\r\n\r\n",
	"half an encoding":                "GET /a%2 HTTP/1.1\r\nHost: a\r\n\r\n",
	"an overlong slash":               "GET /a%c0%afb HTTP/1.1\r\nHost: a\r\n\r\n",
	"bad UTF-8 in the query":          "GET /a?b=\xff HTTP/1.1\r\nHost: a\r\n\r\n",
	"h2c":                             "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
	"two Upgrades":                    "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n\r\n",
	"a list of Upgrades":              "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c, websocket\r\n\r\n",
	"an Upgrade that nobody names":    "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n",
	"a WebSocket by POST":             "POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
	"Connection names Host":           "GET / HTTP/1.1\r\nHost: a\r\nConnection: host\r\n\r\n",
	"Connection names the length":     "POST / HTTP/1.1\r\nHost: a\r\nConnection: Content-Length\r\nContent-Length: 4\r\n\r\nabcd",
	"Connection is malformed":         "GET / HTTP/1.1\r\nHost: a\r\nConnection: a b\r\n\r\n",
	"another Expect":                  "POST / HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\nContent-Length: 1\r\n\r\na",
	"a chunk extension":               "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\nx\r\n0\r\n\r\n",
	"an extension of the last chunk":  "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0;a\r\n\r\n",
	"a chunk size with a space":       "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1 \r\nx\r\n0\r\n\r\n",
	"a chunk size with 0x":            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\nx\r\n0\r\n\r\n",
	"a chunk size beyond all numbers": "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000001\r\nx\r\n0\r\n\r\n",
	"a chunk size without digits":     "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
	"a chunk that ends in LF":         "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n",
	"a chunk longer than it says":     "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n0\r\n\r\n",
	"a trailer of framing":            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 5\r\n\r\n",
	"a malformed trailer":             "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\na b\r\n\r\n",
	"a head without end":              "GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("a", 17<<10),
	"a head that is too long":         "GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("a", 17<<10) + "\r\n\r\n",
	"too many fields":                 "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: a\r\n", 100) + "\r\n",
}

// Each malformed request gets 400 and the end of the connection, reaches nobody, and
// is recorded once.
func TestMalformedRequestsReachNobody(t *testing.T) {
	app := startRawApp(t)
	p := startPair(t, "http", app.address)
	n := 0
	for name, request := range malformed {
		conn := asWeb(t, p)
		// What follows must not be taken for a request of its own.
		go io.WriteString(conn, request+"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
		r := bufio.NewReader(conn)
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		text, _ := io.ReadAll(res.Body)
		if res.StatusCode != http.StatusBadRequest || !res.Close || !strings.Contains(string(text), string(policy.BadRequest)) {
			t.Errorf("%s: %s, close %v, %s", name, res.Status, res.Close, text)
		}
		if more, _ := io.ReadAll(r); len(more) > 0 {
			t.Errorf("%s: the connection goes on with %q", name, more)
		}
		conn.Close()
		n++
		if line := last(p.inbound.logged(n)); line["reason"] != string(policy.BadRequest) || line["decision_id"] == nil {
			t.Errorf("%s: access log: %v", name, line)
		}
	}
	if heads := app.seen(); len(heads) > 0 {
		t.Errorf("the app saw %q", heads)
	}
}

func last[T any](all []T) T { return all[len(all)-1] }

// The app's side of the sidecar takes no more from its own app.
func TestMalformedRequestsDoNotLeave(t *testing.T) {
	app := startRawApp(t)
	p := startPair(t, "http", app.address)
	for name, request := range malformed {
		conn := dial(t, p.outbound.addrs[0])
		go io.WriteString(conn, request+"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
		r := bufio.NewReader(conn)
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		io.Copy(io.Discard, res.Body)
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", name, res.Status)
		}
		conn.Close()
	}
	for _, head := range app.seen() {
		// Where only the path is ambiguous, what follows is a request of its own.
		if !strings.HasPrefix(head, "GET /smuggled HTTP/1.1\r\nHost: a\r\n") {
			t.Errorf("the app saw %q", head)
		}
	}
}

// What goes on is what was sent: the very lines, but for those that are for one
// connection, and those that claim an identity.
func TestTheVeryLinesGoOn(t *testing.T) {
	app := startRawApp(t)
	p := startPair(t, "http", app.address)
	conn := asWeb(t, p)
	io.WriteString(conn, "GeT /a%20b/%C3%A9?q=1&&%2F HTTP/1.1\r\n"+
		"hOST: a:80\r\nX-A:  two  spaces \t\r\nx-a: again\r\nX-Empty:\r\nCookie: a=b; c\r\n"+
		"Connection: keep-alive, X-Once\r\nX-Once: 1\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\nProxy-Connection: keep-alive\r\n"+
		"X-Spiffe-Id: spiffe://sdktest.test/admin\r\nX_Spiffe_Id: spiffe://sdktest.test/admin\r\nx-FORWARDED-client-cert: By=a\r\n\r\n")
	if _, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil {
		t.Fatal(err)
	}
	seen := app.seen()
	want := "GeT /a%20b/%C3%A9?q=1&&%2F HTTP/1.1\r\n" +
		"hOST: a:80\r\nX-A:  two  spaces \t\r\nx-a: again\r\nX-Empty:\r\nCookie: a=b; c\r\n" +
		"x-spiffe-id: " + p.td.ID("web").String() + "\r\nx-forwarded-client-cert: By=" + p.td.ID("orders").String() + ";Hash="
	if len(seen) != 1 || !strings.HasPrefix(seen[0], want) || !strings.HasSuffix(seen[0], ";URI="+p.td.ID("web").String()+"\r\n\r\n") {
		t.Errorf("the app saw %q; want it to begin with\n%q", seen, want)
	}
}

// The policy sees what the app sees.
func TestThePolicySeesWhatGoesOn(t *testing.T) {
	app := startRawApp(t)
	p := startPair(t, "http", app.address)
	seen := make(chan policy.Input, 1)
	p.td.Decide(func(in *policy.Input) policy.Decision {
		seen <- *in
		return policy.Decision{Allow: true, Reason: policy.Allowed}
	})
	conn := asWeb(t, p)
	io.WriteString(conn, "GET /a%20b?q=%2e HTTP/1.1\r\nHost: A:80\r\nX-A: 1\r\nx-a: 2,3\r\nConnection: x-once\r\nX-Once: 1\r\nX-Spiffe-Id: spiffe://a/b\r\n\r\n")
	in := <-seen
	if in.Path != "/a%20b" || in.Query != "q=%2e" || in.Host != "A:80" || in.Method != "GET" || in.Protocol != policy.HTTP || in.Source != p.td.ID("web").String() {
		t.Errorf("the policy saw %+v", in)
	}
	if len(in.HeaderMap()) != 1 || fmt.Sprint(in.HeaderMap()["x-a"]) != "[1 2,3]" {
		t.Errorf("the policy saw the fields %v", in.Headers)
	}
}

func TestTrailersThatClaimAnIdentityAreTakenOut(t *testing.T) {
	seen := make(chan http.Header, 1)
	app, _ := httpApp(t, func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		seen <- r.Trailer
	})
	for _, apart := range []bool{false, true} {
		p := startPair(t, "http", app)
		conn := asWeb(t, p)
		io.WriteString(conn, "POST / HTTP/1.1\r\nHost: a\r\nTrailer: X-Spiffe-Id, X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
		if apart {
			time.Sleep(50 * time.Millisecond) // either way is right; this has the rest come by itself
		}
		io.WriteString(conn, "0\r\nX-Spiffe-Id: spiffe://sdktest.test/admin\r\nX-Sum: 1\r\n\r\n")
		if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != 200 {
			t.Fatal(res, err)
		}
		if trailer := <-seen; len(trailer["X-Spiffe-Id"]) > 0 || trailer.Get("X-Sum") != "1" {
			t.Errorf("the app saw the trailers %v", trailer)
		}
	}
}

func TestRequestsAreDecidedOneByOne(t *testing.T) {
	app := startRawApp(t)
	p := startPair(t, "http", app.address)
	p.td.Decide(func(in *policy.Input) policy.Decision {
		if in.Path == "/no" {
			return policy.Decision{Reason: policy.DenyRule}
		}
		return policy.Decision{Allow: true, Reason: policy.Allowed}
	})
	conn := asWeb(t, p)
	io.WriteString(conn, "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /no HTTP/1.1\r\nHost: a\r\n\r\nPOST /no HTTP/1.1\r\nHost: a\r\nContent-Length: 29\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\nabcGET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
	r := bufio.NewReader(conn)
	for i, want := range []int{200, 403, 403, 200} {
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, res.Body)
		if res.StatusCode != want {
			t.Errorf("request %d: %s; want %d", i, res.Status, want)
		}
	}
	if seen := app.seen(); len(seen) != 2 || !strings.HasPrefix(seen[0], "GET /1 ") || !strings.HasPrefix(seen[1], "GET /2 ") {
		t.Errorf("the app saw %q", seen)
	}
	p.inbound.logged(4)
}
