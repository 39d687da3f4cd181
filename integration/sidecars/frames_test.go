// What the policy denies no server serves, over HTTP/2: requests, and frames that are
// none, sent by a client that sends anything, to Go, nginx and Node behind a sidecar
// (SECURITY.md T13 to T18, T38). A denial counts only if the client is refused, the app
// heard nothing of it, and there is exactly one record.

package sidecars_test

import (
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	codec "golang.org/x/net/http2"

	"merlon.dev/integration/frames"
	"merlon.dev/integration/stage"
	"merlon.dev/policy"
)

// fate is what has to become of a case.
type fate int

const (
	refused fate = iota // nobody hears of it, and there is one record
	garbled             // the connection ends before there was a request to record
	cut                 // the app hears a request that never ends
	passes              // the app hears it, and the client its answer
	flood               // the connection ends; what was asked before may be served
)

// frameCase is what a client says on a connection of its own.
type frameCase struct {
	name string
	want fate
	bare bool // without the preface
	send func(c *frames.Client)
}

// asking is a request for what is public, with fields replaced, added, or with "" left
// out; a name that begins with "+" is added also where there is one.
func asking(pairs ...string) []string {
	out := []string{":method", "GET", ":scheme", "https", ":authority", "shop", ":path", "/public/a"}
	for i := 0; i < len(pairs); i += 2 {
		name, value := pairs[i], pairs[i+1]
		at := -1
		for j := 0; j < len(out); j += 2 {
			if out[j] == name {
				at = j
			}
		}
		switch {
		case at < 0:
			out = append(out, strings.TrimPrefix(name, "+"), value)
		case value == "":
			out = append(out[:at], out[at+2:]...)
		default:
			out[at+1] = value
		}
	}
	return out
}

// first puts fields before those of a request.
func first(pairs ...string) []string { return append(pairs, asking()...) }

// listOf is a case of one list of fields, and nothing else.
func listOf(name string, fields []string) frameCase {
	return frameCase{name: name, want: refused, send: func(c *frames.Client) { c.Headers(1, true, fields...) }}
}

// forged is an identity that nobody has.
const forged = "spiffe://shop.test/forged"

// requestCases are lists of fields that the sidecar refuses.
func requestCases() (all []frameCase) {
	for _, path := range hostilePaths {
		all = append(all, listOf("path "+path, asking(":path", path)))
	}
	for name, fields := range map[string][]string{
		"path with bytes that are no UTF-8":      asking(":path", "/public/\xff/../admin/a"),
		"path with NUL":                          asking(":path", "/public/a\x00/../../admin/a"),
		"path with a line end":                   asking(":path", "/public/a HTTP/1.1\r\nhost: shop\r\n\r\nGET /admin/a"),
		"path with a space":                      asking(":path", "/public/a /admin/a"),
		"empty path":                             append(asking(":path", ""), ":path", ""),
		"no path":                                asking(":path", ""),
		"query with a space":                     asking(":path", "/public/a?b c"),
		"query with a fragment":                  asking(":path", "/public/a?b#c"),
		"path twice, the good one first":         first(":path", "/admin/a"),
		"path twice, the same":                   first(":path", "/public/a"),
		"path among fields":                      asking("x-a", "1", "+:path", "/admin/a"),
		"pseudo-header field after others":       append([]string{"x-a", "1"}, asking()...),
		"unknown pseudo-header field":            first(":x", "1"),
		":status":                                first(":status", "200"),
		":protocol without CONNECT":              first(":protocol", "websocket"),
		"pseudo-header field in upper case":      first(":Path", "/admin/a"),
		"no method":                              asking(":method", ""),
		"method twice":                           first(":method", "POST"),
		"method with a space":                    asking(":method", "GET /admin/a HTTP/1.1"),
		"method with a line end":                 asking(":method", "GET /admin/a HTTP/1.1\r\n\r\nGET"),
		"no scheme":                              asking(":scheme", ""),
		"another scheme":                         asking(":scheme", "ftp"),
		"scheme with a path":                     asking(":scheme", "http://shop/admin/a?"),
		"CONNECT":                                {":method", "CONNECT", ":authority", "shop:80"},
		"CONNECT with a path":                    asking(":method", "CONNECT"),
		"extended CONNECT":                       append([]string{":protocol", "websocket"}, asking(":method", "CONNECT")...),
		"no authority and no host":               asking(":authority", ""),
		"authority twice":                        first(":authority", "admin"),
		"authority with a user":                  asking(":authority", "admin@shop"),
		"authority with a path":                  asking(":authority", "shop/admin/a?"),
		"authority with a line end":              asking(":authority", "shop\r\nx-spiffe-id: "+forged),
		"authority with a space":                 asking(":authority", "shop admin"),
		"host that is not the authority":         asking("host", "admin"),
		"host that is empty":                     append(asking(), "host", ""),
		"two hosts":                              asking(":authority", "", "host", "shop", "+host", "admin"),
		"host in upper case":                     asking("Host", "admin"),
		"identity in upper case":                 asking("X-Spiffe-Id", forged),
		"name with a line end":                   asking("x-a\r\nx-spiffe-id", forged),
		"name with NUL":                          asking("x-a\x00", "1"),
		"name with a space":                      asking("x a", "1"),
		"name with a colon":                      asking("x-spiffe-id:", forged),
		"name outside of ASCII":                  asking("x-é", "1"),
		"empty name":                             append(asking(), "", "1"),
		"value with CR and LF":                   asking("x-a", "1\r\nx-spiffe-id: "+forged),
		"value with CR":                          asking("x-a", "1\rx-spiffe-id: "+forged),
		"value with LF":                          asking("x-a", "1\nx-spiffe-id: "+forged),
		"value with a request":                   asking("x-a", "1\r\n\r\nGET /admin/a HTTP/1.1\r\nhost: shop\r\n\r\n"),
		"value with NUL":                         asking("x-a", "1\x002"),
		"value with DEL":                         asking("x-a", "1\x7f"),
		"value behind a space":                   asking("x-a", " 1"),
		"value before a tab":                     asking("x-a", "1\t"),
		"connection":                             asking("connection", "x-spiffe-id"),
		"connection: upgrade to h2c":             asking("connection", "upgrade, http2-settings", "upgrade", "h2c", "http2-settings", "AAMAAABkAARAAAAAAAIAAAAA"),
		"upgrade to a WebSocket":                 asking("upgrade", "websocket"),
		"transfer-encoding":                      asking("transfer-encoding", "chunked"),
		"keep-alive":                             asking("keep-alive", "timeout=5"),
		"proxy-connection":                       asking("proxy-connection", "keep-alive"),
		"te":                                     asking("te", "gzip"),
		"te with another beside trailers":        asking("te", "trailers, gzip"),
		"content-length without a body":          asking("content-length", "5"),
		"two content-lengths":                    asking("content-length", "0", "+content-length", "5"),
		"a list of content-lengths":              asking("content-length", "0, 0"),
		"content-length with a sign":             asking("content-length", "+0"),
		"content-length in hex":                  asking("content-length", "0x0"),
		"content-length below nothing":           asking("content-length", "-1"),
		"content-length beyond all numbers":      asking("content-length", "99999999999999999999"),
		"content-length with a line end":         asking("content-length", "0\r\n\r\nGET /admin/a HTTP/1.1"),
		"fields longer than allowed":             asking("x-a", strings.Repeat("a", 17<<10)),
		"more fields than allowed":               append(asking(), strings.Split(strings.TrimSuffix(strings.Repeat("x-a,1,", 101), ","), ",")...),
		"a policy's own no":                      asking(":path", "/admin/a"),
		"a policy's own no, by another method":   asking(":method", "DELETE", ":path", "/admin/a"),
		"a policy's no, and the path in a field": asking(":path", "/admin/a", "x-original-url", "/public/a", "x-rewrite-url", "/public/a"),
	} {
		all = append(all, listOf(name, fields))
	}
	return all
}

// post begins the request with a body of the case called name, which web may make: if
// the app hears it, then by that name.
func post(c *frames.Client, name string, pairs ...string) {
	c.Headers(1, false, asking(append([]string{":method", "POST", "x-case", name}, pairs...)...)...)
}

// bodyCases are about what follows the first list of fields.
func bodyCases() (all []frameCase) {
	trailers := func(name string, want fate, pairs ...string) {
		all = append(all, frameCase{name: name, want: want, send: func(c *frames.Client) {
			post(c, name, "trailer", "x-sum")
			_ = c.Framer.WriteData(1, false, []byte("body"))
			c.Headers(1, true, pairs...)
		}})
	}
	trailers("trailers", passes, "x-sum", "1")
	trailers("trailers with an identity", passes, "x-spiffe-id", forged, "x-sum", "1", "x_spiffe_id", forged, "x-forwarded-client-cert", "URI="+forged)
	trailers("trailers with a path", cut, ":path", "/admin/a")
	trailers("trailers with a status", cut, ":status", "200")
	trailers("trailers with connection", cut, "connection", "x-spiffe-id")
	trailers("trailers in upper case", cut, "X-Spiffe-Id", forged)
	trailers("trailers with a line end", cut, "x-sum", "1\r\nx-spiffe-id: "+forged)
	trailers("trailers longer than allowed", cut, "x-sum", strings.Repeat("a", 17<<10))
	body := func(name string, want fate, length string, pieces ...string) {
		all = append(all, frameCase{name: name, want: want, send: func(c *frames.Client) {
			post(c, name, "content-length", length)
			for i, piece := range pieces {
				_ = c.Framer.WriteData(1, i == len(pieces)-1, []byte(piece))
			}
		}})
	}
	smuggled := "GET /admin/a HTTP/1.1\r\nhost: shop\r\n\r\n"
	body("a body that is shorter than it says", cut, "50", "body")
	body("a body that is longer than it says", cut, "2", "b", "ody")
	body("a body where there is none", cut, "0", smuggled)
	body("a body that looks like a request", passes, fmt.Sprint(len(smuggled)), smuggled)
	const identity = "fields with an identity"
	return append(
		all,
		frameCase{name: identity, want: passes, send: func(c *frames.Client) {
			c.Headers(1, true, asking("x-case", identity, "x-spiffe-id", forged, "+x-spiffe-id", forged, "x_spiffe_id", forged, "x-forwarded-client-cert", "URI="+forged, "x_forwarded_client_cert", "URI="+forged)...)
		}},
		frameCase{name: "trailers without an end", want: cut, send: func(c *frames.Client) {
			post(c, "trailers without an end")
			c.Headers(1, false, "x-sum", "1")
		}},
		frameCase{name: "a denied request's body", want: refused, send: func(c *frames.Client) {
			c.Headers(1, false, asking(":method", "POST", ":path", "/admin/a")...)
			_ = c.Framer.WriteData(1, true, []byte("body"))
		}},
	)
}

// protocolCases break the rules of HTTP/2 itself.
func protocolCases() []frameCase {
	block := func(c *frames.Client, raw string) {
		_ = c.Framer.WriteHeaders(codec.HeadersFrameParam{StreamID: 1, EndStream: true, EndHeaders: true, BlockFragment: []byte(raw)})
	}
	headers := func(c *frames.Client, p codec.HeadersFrameParam) {
		p.BlockFragment = c.Block(asking()...)
		_ = c.Framer.WriteHeaders(p)
	}
	raw := func(text string) func(c *frames.Client) {
		return func(c *frames.Client) { _, _ = io.WriteString(c.Conn, text) }
	}
	return []frameCase{
		{name: "HTTP/1.1", want: garbled, bare: true, send: raw("GET /public/a HTTP/1.1\r\nHost: shop\r\n\r\n")},
		{name: "an upgrade to h2c", want: garbled, bare: true, send: raw("GET /public/a HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n" + codec.ClientPreface)},
		{name: "half a preface", want: garbled, bare: true, send: raw("PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n")},
		{name: "no settings", want: garbled, bare: true, send: func(c *frames.Client) {
			_, _ = io.WriteString(c.Conn, codec.ClientPreface)
			c.Headers(1, true, asking()...)
		}},
		{name: "an index beyond the table", want: garbled, send: func(c *frames.Client) { block(c, "\xff\xff\xff\x7f") }},
		{name: "index zero", want: garbled, send: func(c *frames.Client) { block(c, "\x80") }},
		{name: "an integer without end", want: garbled, send: func(c *frames.Client) { block(c, "\xff"+strings.Repeat("\xff", 20)) }},
		{name: "Huffman's end in a text", want: garbled, send: func(c *frames.Client) { block(c, "\x00\x84\xff\xff\xff\xff\x00") }},
		{name: "a table larger than allowed", want: garbled, send: func(c *frames.Client) { block(c, "\x3f\xe1\xff\x7f"+string(c.Block(asking()...))) }},
		{name: "half a field", want: garbled, send: func(c *frames.Client) { b := c.Block(asking()...); block(c, string(b[:len(b)-2])) }},
		{name: "an HPACK bomb", want: refused, send: func(c *frames.Client) {
			b := c.Block(asking("x-bomb", strings.Repeat("b", 4000))...)
			block(c, string(b)+strings.Repeat("\xbe", 10_000)) // the newest of the table, again and again
		}},
		{name: "an even stream", want: garbled, send: func(c *frames.Client) {
			headers(c, codec.HeadersFrameParam{StreamID: 2, EndStream: true, EndHeaders: true})
		}},
		{name: "stream zero", want: garbled, send: func(c *frames.Client) { headers(c, codec.HeadersFrameParam{EndStream: true, EndHeaders: true}) }},
		{name: "DATA before HEADERS", want: garbled, send: func(c *frames.Client) { _ = c.Framer.WriteData(1, true, []byte("body")) }},
		{name: "CONTINUATION without HEADERS", want: garbled, send: func(c *frames.Client) { _ = c.Framer.WriteContinuation(1, true, c.Block(asking()...)) }},
		{name: "a frame between HEADERS and CONTINUATION", want: garbled, send: func(c *frames.Client) {
			headers(c, codec.HeadersFrameParam{StreamID: 1, EndStream: true})
			_ = c.Framer.WritePing(false, [8]byte{})
			_ = c.Framer.WriteContinuation(1, true, nil)
		}},
		{name: "CONTINUATION of another stream", want: garbled, send: func(c *frames.Client) {
			headers(c, codec.HeadersFrameParam{StreamID: 1, EndStream: true})
			_ = c.Framer.WriteContinuation(3, true, nil)
		}},
		{name: "PUSH_PROMISE", want: garbled, send: func(c *frames.Client) {
			_ = c.Framer.WritePushPromise(codec.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true, BlockFragment: c.Block(asking()...)})
		}},
		{name: "a frame longer than allowed", want: garbled, send: func(c *frames.Client) { _ = c.Framer.WriteRawFrame(codec.FrameHeaders, 5, 1, make([]byte, 1<<20)) }},
		{name: "more padding than there is", want: garbled, send: func(c *frames.Client) { _ = c.Framer.WriteRawFrame(codec.FrameHeaders, 0xd, 1, []byte("\xffabc")) }},
		{name: "windows beyond all numbers", want: garbled, send: func(c *frames.Client) {
			for range 2 {
				_ = c.Framer.WriteWindowUpdate(0, 1<<31-1)
			}
		}},
		{name: "a CONTINUATION flood", want: garbled, send: func(c *frames.Client) {
			headers(c, codec.HeadersFrameParam{StreamID: 1, EndStream: true})
			for range 5_000 {
				if c.Framer.WriteContinuation(1, false, c.Block("x-a", "1")) != nil {
					return
				}
			}
		}},
		{name: "a flood of resets", want: flood, send: func(c *frames.Client) {
			for id := uint32(1); id < 40_000; id += 2 {
				c.Headers(id, false, asking(":method", "POST", "x-case", "flood")...)
				if c.Framer.WriteRSTStream(id, codec.ErrCodeCancel) != nil {
					return
				}
			}
		}},
		{name: "a flood of requests that are malformed", want: flood, send: func(c *frames.Client) {
			for id := uint32(1); id < 40_000; id += 2 {
				c.Headers(id, true, asking("connection", "close")...)
				if c.Framer.WritePing(true, [8]byte{}) != nil {
					return
				}
			}
		}},
		{name: "a flood of probes", want: flood, send: func(c *frames.Client) {
			for range 40_000 {
				if c.Framer.WritePing(false, [8]byte{}) != nil {
					return
				}
			}
		}},
	}
}

// speak opens a connection, has a case said on it, and gives what came of its request,
// and the address that it came from.
func speak(t *testing.T, dial func() (net.Conn, error), fc frameCase, limit time.Duration) (got frames.Answer, from string) {
	t.Helper()
	conn, err := dial()
	if err != nil {
		return frames.Answer{Over: true}, ""
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	c := frames.New(conn)
	if !fc.bare {
		c.Hello()
	}
	fc.send(c)
	id := uint32(1)
	if fc.want == garbled || fc.want == flood {
		id = 0 // it is about the connection
	}
	return c.Await(id), conn.LocalAddr().String()
}

func TestWhatThePolicyDeniesNoServerServesOverHTTP2(t *testing.T) {
	t.Parallel()
	s := openShop(t)
	public := frameCase{name: "public", want: passes, send: func(c *frames.Client) { c.Headers(1, true, asking("x-case", "public")...) }}
	all := slices.Concat(requestCases(), bodyCases(), protocolCases(), []frameCase{public})
	for name, app := range apps {
		t.Run(name, func(t *testing.T) {
			_, address := app(t, s.root)
			c := s.sell(t, "http2", address)
			var ready string
			stage.Eventually(t, "a public answer", func() (err error) {
				got, from := speak(t, c.dial, public, 20*time.Second)
				if ready = from; got.Body != "public" {
					err = fmt.Errorf("%+v", got)
				}
				return err
			})
			served := 0
			for _, fc := range requestCases() {
				past := func() (net.Conn, error) { return stage.DialApp(c.app) }
				if got, _ := speak(t, past, fc, 300*time.Millisecond); strings.Contains(got.Body, secret) {
					served++
				}
			}
			t.Logf("%d of the requests get the secret without a sidecar", served)
			if served < 5 {
				t.Error("the requests prove nothing about this server")
			}
			said := map[string]frameCase{} // by the address that it came from
			for _, fc := range all {
				got, from := speak(t, c.dial, fc, 20*time.Second)
				said[from] = fc
				// What is cut may have had its answer before.
				isServed := strings.HasPrefix(got.Status, "2") && !got.Reset
				if got.Late || fc.want != cut && isServed != (fc.want == passes) || strings.Contains(got.Body, secret) {
					t.Errorf("%s: %+v", fc.name, got)
				}
			}
			records := c.close(t)
			delete(records, ready)
			for from, fc := range said {
				if n := len(records[from]); fc.want != flood && n != map[bool]int{true: 0, false: 1}[fc.want == garbled] {
					t.Errorf("%s: %d records: %v", fc.name, n, records[from])
				}
				if fc.want == refused && len(records[from]) == 1 && !records[from][0].isDenial() {
					t.Errorf("%s: the record is %+v", fc.name, records[from][0])
				}
			}
			s.heard(t, c.tap, all)
		})
	}
}

// heard checks that an app was sent nothing but what it may be.
func (s *shop) heard(t *testing.T, tap *stage.Tap, all []frameCase) {
	t.Helper()
	began, ended := map[string]int{}, map[string]int{}
	for _, sent := range tap.Heard() {
		requests, err := frames.Requests(sent)
		if err != nil && len(sent) > 0 {
			t.Errorf("what the app was sent is no HTTP/2: %v", err)
		}
		for _, r := range requests {
			name := r.Get("x-case")
			if began[name]++; r.Complete {
				ended[name]++
			}
			if r.Get(":path") != "/public/a" || r.Get("x-spiffe-id") != s.d.ID("/web") || !strings.HasSuffix(r.Get("x-forwarded-client-cert"), "URI="+s.d.ID("/web")) {
				t.Errorf("%s: the app heard %v", name, r.Fields)
			}
			for _, f := range slices.Concat(r.Fields, r.Trailers) {
				if strings.Contains(f.Value, forged) || strings.ContainsAny(f.Name+f.Value, "\r\n\x00") || f.Name != strings.ToLower(f.Name) {
					t.Errorf("%s: the app heard %s: %q", name, f.Name, f.Value)
				}
			}
			for _, f := range r.Trailers {
				if f.IsPseudo() || policy.ClaimsIdentity(f.Name) || f.Name == "connection" {
					t.Errorf("%s: the app heard %s in trailers", name, f.Name)
				}
			}
		}
	}
	delete(began, "flood")
	for _, fc := range all {
		switch {
		case fc.want == passes && began[fc.name] == 0: // its end it may not have waited for
			t.Errorf("%s: the app did not hear it", fc.name)
		case fc.want == cut && ended[fc.name] > 0:
			t.Errorf("%s: the app heard it end", fc.name)
		}
		if fc.want == passes || fc.want == cut {
			delete(began, fc.name)
		}
	}
	if len(began) > 0 {
		t.Errorf("the app heard of requests that were refused: %v", began)
	}
}
