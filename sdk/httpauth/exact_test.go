// What is decided is what was sent, byte for byte, and only TLS says who sent it.

package httpauth_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"merlon.dev/policy"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

// dial connects as workload web with bare TLS.
func dial(t testing.TB, url string, td *sdktest.TD, protocol string) net.Conn {
	t.Helper()
	own := td.SVID("web")
	conn, err := tls.Dial("tcp", strings.TrimPrefix(url, "https://"), &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true,
		NextProtos:         []string{protocol},
		Certificates:       []tls.Certificate{{Certificate: [][]byte{own.Certificates[0].Raw}, PrivateKey: own.PrivateKey}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

func roundTrip(t testing.TB, conn net.Conn, raw string) *http.Response {
	t.Helper()
	if _, err := io.WriteString(conn, raw); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res
}

// ambiguous is the corpus of request targets that no handler may see.
var ambiguous = []string{
	"//orders", "/orders//1", "/./orders", "/../orders", "/orders/.", "/orders/..", "/orders/../admin",
	"/orders%2f1", "/orders%2F1", "/orders%5c1", "/orders%5C..", "/orders%00", "/orders%252f", "/%6frders", "/orders/%2e%2e/admin", "/orders/%2E",
	`/orders\1`, "/orders;a=b", "/orders;/1", "/orders%0d%0a", "/orders%7f", "/orders%c0%af", "/orders%ff",
	"/orders#x", "/orders%", "/orders%2", "/orders%zz",
	"*", "orders", "http://orders/orders", "https://orders/orders", "?x", "/orders?x#y",
}

// T14, T17, T18.
func TestAmbiguousPathsReachNoHandlerOverHTTP1(t *testing.T) {
	td := sdktest.New(t)
	td.Decide(func(*policy.Input) policy.Decision { return policy.Decision{Allow: true, Reason: policy.Allowed} })
	var served atomic.Int32
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) { served.Add(1) })
	url := start(t, td.Workload("orders"), mux)
	targets := append([]string{"/orders\x01", "/orders\xff"}, ambiguous...)
	for _, method := range []string{"GET", "OPTIONS", "CONNECT"} {
		for _, target := range targets {
			res := roundTrip(t, dial(t, url, td, "http/1.1"), method+" "+target+" HTTP/1.1\r\nHost: orders\r\n\r\n")
			if target == "*" && method == "OPTIONS" {
				continue // net/http answers it, without a handler
			}
			if res.StatusCode != 400 {
				t.Errorf("%s %q = %d; want 400", method, target, res.StatusCode)
			}
		}
	}
	for name, raw := range map[string]string{
		"CONNECT":           "CONNECT orders:443 HTTP/1.1\r\nHost: orders:443\r\n\r\n",
		"CONNECT of a path": "CONNECT /orders HTTP/1.1\r\nHost: orders\r\n\r\n",
		"two hosts":         "GET /orders HTTP/1.1\r\nHost: orders\r\nHost: admin\r\n\r\n",
		"length and chunks": "POST /orders HTTP/1.1\r\nHost: orders\r\nContent-Length: 3\r\nTransfer-Encoding: xchunked\r\n\r\nabc",
		"not UTF-8 query":   "GET /orders?\xff HTTP/1.1\r\nHost: orders\r\n\r\n",
		"not UTF-8 header":  "GET /orders HTTP/1.1\r\nHost: orders\r\nX-A: \xff\r\n\r\n",
	} {
		if res := roundTrip(t, dial(t, url, td, "http/1.1"), raw); res.StatusCode != 400 && res.StatusCode != 501 {
			t.Errorf("%s = %d; want 400 or 501", name, res.StatusCode)
		}
	}
	if n := served.Load(); n != 0 {
		t.Errorf("%d requests reached the handler", n)
	}
	if res := roundTrip(t, dial(t, url, td, "http/1.1"), "GET /orders/%C3%A9?a=b HTTP/1.1\r\nHost: orders\r\n\r\n"); res.StatusCode != 200 || served.Load() != 1 {
		t.Errorf("a good request = %d", res.StatusCode)
	}
}

// T14, T17, T18.
func TestAmbiguousPathsReachNoHandlerOverHTTP2(t *testing.T) {
	td := sdktest.New(t)
	td.Decide(func(*policy.Input) policy.Decision { return policy.Decision{Allow: true, Reason: policy.Allowed} })
	var served atomic.Int32
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) { served.Add(1) })
	url := start(t, td.Workload("orders"), mux)
	good := []hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: "orders"}}
	send := func(fields ...hpack.HeaderField) string {
		return frames(t, dial(t, url, td, "h2"), fields)
	}
	for _, target := range append([]string{"/orders\x01", "/orders\xff", ""}, ambiguous...) {
		if got := send(append(good[:3:3], hpack.HeaderField{Name: ":path", Value: target})...); got == "200" {
			t.Errorf(":path %q = %s", target, got)
		}
	}
	path := hpack.HeaderField{Name: ":path", Value: "/orders"}
	if got := send(append(good[:3:3], path, hpack.HeaderField{Name: "host", Value: "admin"})...); got == "200" {
		t.Errorf("another Host beside :authority = %s", got)
	}
	if got := send(hpack.HeaderField{Name: ":method", Value: "CONNECT"}, good[2]); got == "200" {
		t.Errorf("CONNECT = %s", got)
	}
	if n := served.Load(); n != 0 {
		t.Errorf("%d requests reached the handler", n)
	}
	if got := send(append(good[:3:3], path)...); got != "200" || served.Load() != 1 {
		t.Errorf("a good request = %s", got)
	}
}

// frames sends one request as HTTP/2 frames and gives the status, or how the
// stream ended.
func frames(t *testing.T, conn net.Conn, fields []hpack.HeaderField) string {
	t.Helper()
	_, _ = io.WriteString(conn, http2.ClientPreface)
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = framer.WriteSettings()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range fields {
		_ = enc.WriteField(f)
	}
	_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true})
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return err.Error()
		}
		switch f := frame.(type) {
		case *http2.MetaHeadersFrame:
			return f.PseudoValue("status")
		case *http2.RSTStreamFrame:
			return "reset: " + f.ErrCode.String()
		case *http2.GoAwayFrame:
			return "goaway: " + f.ErrCode.String()
		}
	}
}

// T14, T16: and every value of a header.
func TestPolicySeesTheExactBytes(t *testing.T) {
	td := sdktest.New(t)
	seen := make(chan *policy.Input, 1)
	td.Decide(func(in *policy.Input) policy.Decision {
		seen <- in
		return policy.Decision{Allow: true, Reason: policy.Allowed}
	})
	url := start(t, td.Workload("orders"), whoami)
	roundTrip(t, dial(t, url, td, "http/1.1"), "get /a%20b/%C3%A9/c,d?x=%2f&y HTTP/1.1\r\nHost: orders:1\r\nX-Role: a\r\nX-Role: b, c\r\nx_role: d\r\nX-Spiffe-Id: spiffe://sdktest.test/admin\r\nX-Forwarded-Client-Cert: x\r\nX_Spiffe_Id: y\r\n\r\n")
	got := <-seen
	want := &policy.Input{
		Source: "spiffe://sdktest.test/web", Destination: "spiffe://sdktest.test/orders",
		Protocol: policy.HTTP, Method: "get", Path: "/a%20b/%C3%A9/c,d", Query: "x=%2f&y", Host: "orders:1",
		Headers:            policy.HeaderMap{"x-role": {"a", "b, c"}, "x_role": {"d"}},
		SourceAddress:      got.SourceAddress,
		DestinationAddress: strings.TrimPrefix(url, "https://"),
		SourceSerial:       got.SourceSerial,
	}
	if !cmp.Equal(got, want) || got.SourceSerial == "" || got.SourceAddress == "" {
		t.Errorf("the policy saw (-got +want):\n%s", cmp.Diff(got, want))
	}
}

// T13: also by trailers, Connection and underscores.
func TestForgedIdentityHeadersDoNotReachTheHandler(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	seen := make(chan http.Header, 1)
	url := start(t, td.Workload("orders"), http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		all := r.Header.Clone()
		for name, values := range r.Trailer {
			all["Trailer-"+name] = values
		}
		seen <- all
	}))
	roundTrip(t, dial(t, url, td, "http/1.1"), "POST / HTTP/1.1\r\nHost: orders\r\nX-SPIFFE-ID: a\r\nx-forwarded-client-cert: b\r\nX_Forwarded_Client_Cert: c\r\nConnection: x-spiffe-id\r\n"+
		"X-Other: d\r\nTrailer: X-Spiffe-Id, X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Spiffe-Id: e\r\nX-Sum: f\r\nX-Forwarded-Client-Cert: g\r\n\r\n")
	got := <-seen
	for name := range got {
		if n := strings.ToLower(strings.ReplaceAll(name, "_", "-")); strings.Contains(n, "spiffe") || strings.Contains(n, "client-cert") {
			t.Errorf("the handler saw %s: %v", name, got[name])
		}
	}
	if got.Get("X-Other") != "d" || got.Get("Trailer-X-Sum") != "f" {
		t.Errorf("the handler saw %v; other headers and trailers should be there", got)
	}
}

func TestRewrittenRequestsAreDenied(t *testing.T) {
	td := sdktest.New(t)
	td.Decide(func(*policy.Input) policy.Decision { return policy.Decision{Allow: true, Reason: policy.Allowed} })
	id := td.Workload("orders")
	var served atomic.Int32
	inner := httpauth.Handler(id, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served.Add(1) }))
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, TLSConfig: id.ServerTLS(), Handler: http.StripPrefix("/public", inner)}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.ServeTLS(lis, "", "") }()
	defer func() { srv.Close(); <-done }()
	res := roundTrip(t, dial(t, "https://"+lis.Addr().String(), td, "http/1.1"), "GET /public/admin HTTP/1.1\r\nHost: x\r\n\r\n")
	if res.StatusCode != 400 || served.Load() != 0 {
		t.Errorf("%d, served %d", res.StatusCode, served.Load())
	}
}
