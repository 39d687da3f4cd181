// What the tests of this package share: an engine on a real socket, an app behind it,
// and a client that speaks in frames.

package http2

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/sidecar/internal/hop"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is an engine that serves workload orders until the test ends.
type rig struct {
	t      testing.TB
	td     *sdktest.TD
	hop    *hop.Hop
	engine *engine
	addr   string
	dial   func(context.Context, string, string) (net.Conn, error)
	drain  context.CancelFunc

	mu      sync.Mutex
	entries []hop.Entry // guarded by mu
}

func limits() hop.Limits {
	return hop.Limits{
		HeadBytes: 16 << 10, HeaderFields: 100, Streams: 100,
		HandshakeTimeout: 5 * time.Second, HeadTimeout: time.Minute, IdleTimeout: time.Minute, StallTimeout: time.Minute, ResponseTimeout: time.Minute,
	}
}

// newRig has an inbound hop for web, which may call; outbound ones have no TLS on
// either side here.
func newRig(t testing.TB, direction hop.Direction, protocol policy.Protocol, set func(*hop.Limits), apps ...string) *rig {
	t.Helper()
	r := &rig{t: t, td: sdktest.New(t)}
	r.td.Allow("web", "orders")
	r.td.CompilePolicy()
	var upstreams []*hop.Upstream
	for _, app := range apps {
		upstreams = append(upstreams, &hop.Upstream{Address: app, Dial: func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", app)
		}})
	}
	r.hop = &hop.Hop{
		Name: "test", Direction: direction, Protocol: protocol, Limits: limits(), Upstreams: hop.NewUpstreams(upstreams...),
		Retry:  hop.Retry{Attempts: 3, Methods: []string{"GET"}},
		Strip:  func(name string) bool { return policy.ClaimsIdentity(name) || name == "x-listed" },
		Record: r.record,
	}
	r.hop.Upstreams.Budget = hop.Budget{Percent: 20, Floor: 10}
	if set != nil {
		set(&r.hop.Limits)
	}
	r.hop.Identity = r.td.Workload("orders")
	r.hop.To = r.hop.Identity.ID().String()
	r.dial = new(net.Dialer).DialContext
	if direction == hop.Inbound {
		r.dial = r.td.Workload("web").DialTLS(sdk.Service("orders"), "h2")
		await(t, "the compiled policy", r.hop.Identity.DecidesHere)
	}
	r.engine = New(r.hop).(*engine)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.addr = lis.Addr().String()
	r.serve(lis)
	return r
}

func (r *rig) record(e *hop.Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.entries = append(r.entries, *e)
}

// decide has f asked about each call, from now on: what was compiled is in force a
// moment longer.
func (r *rig) decide(f func(*policy.Input) policy.Decision) {
	r.t.Helper()
	r.td.Decide(f)
	await(r.t, "the compiled policy to go", func() bool { return !r.hop.Identity.DecidesHere() })
}

// recorded waits for n entries.
func (r *rig) recorded(n int) []hop.Entry {
	r.t.Helper()
	await(r.t, "records of requests", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.entries) >= n
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.entries) != n {
		r.t.Errorf("%d records; want %d: %+v", len(r.entries), n, r.entries)
	}
	return slices.Clone(r.entries)
}

// serve is what the sidecar's door does.
func (r *rig) serve(lis net.Listener) {
	ctx, cancel := context.WithCancel(context.Background())
	r.drain = cancel
	var all sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	all.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			all.Go(func() {
				if r.hop.Direction == hop.Inbound {
					secured, err := r.hop.Identity.ServerHandshake(context.Background(), conn, "h2")
					if err != nil {
						return
					}
					conn = secured
				}
				r.engine.Serve(ctx, conn)
			})
		}
	})
	r.t.Cleanup(func() {
		cancel()
		lis.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		all.Wait()
		r.engine.Close()
	})
}

// await waits until a condition holds.
func await(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 30 s in vain for %s", what)
		}
	}
}

// app is a server without any identity; it keeps what it has seen.
type app struct {
	addr string

	mu   sync.Mutex
	seen []seen // guarded by mu
}

type seen struct {
	method, host, uri string
	header, trailer   http.Header
	body              string
}

func newApp(t testing.TB, handle http.HandlerFunc) *app {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := &app{addr: lis.Addr().String()}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{Protocols: &protocols, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := seen{method: r.Method, host: r.Host, uri: r.RequestURI, header: r.Header}
		if handle == nil {
			if body, err := io.ReadAll(r.Body); err == nil { // it was whole
				s.body, s.trailer = string(body), r.Trailer
			}
		}
		a.mu.Lock()
		a.seen = append(a.seen, s)
		a.mu.Unlock()
		if handle != nil {
			handle(w, r)
		}
	})}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(lis) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return a
}

func (a *app) requests() []seen {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.seen)
}

// raw is a client, or a server, that speaks in frames.
type raw struct {
	t    testing.TB
	conn net.Conn
	fr   *codec.Framer
	enc  *hpack.Encoder
	dec  *hpack.Decoder
	buf  bytes.Buffer
	// silent: await writes nothing, since another goroutine does.
	silent bool
}

func newRaw(t testing.TB, conn net.Conn) *raw {
	t.Cleanup(func() { conn.Close() })
	// One that is closed already has come at the end of the test: reads will say so.
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Fatal(err)
	}
	c := &raw{t: t, conn: conn, fr: codec.NewFramer(conn, conn), dec: hpack.NewDecoder(4096, nil)}
	c.fr.AllowIllegalWrites = true
	c.enc = hpack.NewEncoder(&c.buf)
	return c
}

// connect says nothing yet.
func (r *rig) connect() *raw {
	r.t.Helper()
	conn, err := r.dial(context.Background(), "tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	return newRaw(r.t, conn)
}

// client is past the preface.
func (r *rig) client(settings ...codec.Setting) *raw {
	r.t.Helper()
	c := r.connect()
	io.WriteString(c.conn, codec.ClientPreface)
	c.fr.WriteSettings(settings...)
	for f := c.next(); ; f = c.next() {
		if s, ok := f.(*codec.SettingsFrame); ok && s.IsAck() {
			return c
		}
	}
}

// block encodes fields given as name, value, name, value.
func (c *raw) block(fields ...string) []byte {
	c.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		c.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return slices.Clone(c.buf.Bytes())
}

func (c *raw) headers(id uint32, end bool, fields ...string) {
	c.fr.WriteHeaders(codec.HeadersFrameParam{StreamID: id, EndStream: end, EndHeaders: true, BlockFragment: c.block(fields...)})
}

// next is the next frame; nil at the end.
func (c *raw) next() codec.Frame {
	f, err := c.fr.ReadFrame()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Error("nothing came for 30 s")
	}
	if err != nil {
		return nil
	}
	return f
}

// answer is how a stream ended, or the connection.
type answer struct {
	fields  map[string]string
	body    string
	reset   codec.ErrCode
	isReset bool
	goAway  codec.ErrCode
	isOver  bool // the connection has ended; goAway says why where it said so
}

// await reads until stream id has ended, or the connection.
func (c *raw) await(id uint32) answer {
	c.t.Helper()
	a := answer{fields: map[string]string{}}
	for {
		switch f := c.next().(type) {
		case nil:
			a.isOver = true
			return a
		case *codec.GoAwayFrame:
			a.goAway = f.ErrCode
		case *codec.RSTStreamFrame:
			if f.StreamID == id {
				a.isReset, a.reset = true, f.ErrCode
				return a
			}
		case *codec.HeadersFrame:
			fields, err := c.dec.DecodeFull(f.HeaderBlockFragment())
			if err != nil {
				c.t.Fatal(err)
			}
			if f.StreamID != id {
				continue
			}
			for _, f := range fields {
				a.fields[f.Name] = strings.TrimPrefix(a.fields[f.Name]+","+f.Value, ",")
			}
			if f.StreamEnded() {
				return a
			}
		case *codec.DataFrame:
			if !c.silent {
				c.fr.WriteWindowUpdate(0, max(1, f.Length))
			}
			if f.StreamID != id {
				continue
			}
			a.body += string(f.Data())
			if f.StreamEnded() {
				return a
			}
		}
	}
}

// good is a request that is served.
var good = []string{":method", "GET", ":scheme", "https", ":authority", "orders", ":path", "/orders/1?x=1"}

// with is good with fields replaced, added, or with "" left out.
func with(pairs ...string) []string {
	out := slices.Clone(good)
	for i := 0; i < len(pairs); i += 2 {
		at := slices.Index(out, pairs[i])
		switch {
		case at >= 0 && at%2 == 0 && pairs[i+1] == "":
			out = slices.Delete(out, at, at+2)
		case at >= 0 && at%2 == 0:
			out[at+1] = pairs[i+1]
		default:
			out = append(out, pairs[i], pairs[i+1])
		}
	}
	return out
}

// isServed says whether a request comes through on stream id.
func (c *raw) isServed(id uint32) {
	c.t.Helper()
	c.headers(id, true, good...)
	if a := c.await(id); a.fields[":status"] != "200" {
		c.t.Fatalf("a request that should have been served: %+v", a)
	}
}
