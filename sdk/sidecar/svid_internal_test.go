// The ends of X509-SVIDs: connections end before, gracefully where there is time, and
// calls go on over others.

package sidecar

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// shortLife is how long X509-SVIDs live here.
const shortLife = 6 * time.Second

// shortLived is an inbound sidecar of orders, and dials it as web with an X509-SVID that
// has no successor.
func shortLived(t *testing.T, protocol, app string) (in *running, dial func(alpn ...string) (io.ReadWriteCloser, time.Time)) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	in = start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: protocol}}, StallTimeout: time.Hour, ResponseTimeout: time.Hour, TCPIdleTimeout: time.Hour})
	td.SetTTL(shortLife)
	web := td.Workload("web")
	return in, func(alpn ...string) (io.ReadWriteCloser, time.Time) {
		conn, err := web.DialTLS(sdk.Service("orders"), alpn...)(t.Context(), "tcp", in.addrs[0])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(30 * time.Second))
		return conn, td.SVID("web").Certificates[0].NotAfter
	}
}

func TestConnectionsEndBeforeTheirSVIDs(t *testing.T) {
	t.Parallel()
	served := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "served") })
	t.Run("http, between requests", func(t *testing.T) {
		t.Parallel()
		app, _ := httpApp(t, served)
		_, dial := shortLived(t, "http", app)
		conn, end := dial("http/1.1")
		in := bufio.NewReader(conn)
		for { // each is answered, and the last one says that it is
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			res, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatalf("a request before the end: %v", err)
			}
			text, err := io.ReadAll(res.Body)
			if string(text) != "served" || err != nil {
				t.Fatalf("%q, %v", text, err)
			}
			if res.Close {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if now := time.Now(); now.After(end) {
			t.Errorf("the connection was used %v beyond the X509-SVID", now.Sub(end))
		}
		if n, err := in.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("after the last answer: %d bytes, %v; want the end", n, err)
		}
	})
	t.Run("http2, between requests", func(t *testing.T) {
		t.Parallel()
		_, dial := shortLived(t, "http2", h2cServer(t, served))
		conn, end := dial("h2")
		io.WriteString(conn, codec.ClientPreface)
		fr := codec.NewFramer(conn, conn)
		fr.WriteSettings()
		for { // GOAWAY comes of itself, and it is no error
			f, err := fr.ReadFrame()
			if err != nil {
				t.Fatalf("before GOAWAY: %v", err)
			}
			if away, ok := f.(*codec.GoAwayFrame); ok {
				if away.ErrCode != codec.ErrCodeNo || time.Now().After(end) {
					t.Errorf("GOAWAY %v, %v before the end", away.ErrCode, time.Until(end))
				}
				break
			}
		}
		for {
			if _, err := fr.ReadFrame(); err != nil {
				if !errors.Is(err, io.EOF) {
					t.Errorf("after GOAWAY: %v; want the end", err)
				}
				return
			}
		}
	})
	for protocol, request := range map[string]string{"http": "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "tcp": "GET / HTTP/1.1\r\nHost: a\r\n\r\n"} {
		t.Run(protocol+", in the midst of one", func(t *testing.T) {
			t.Parallel()
			app, came, left := awaited(t, true)
			sidecar, dial := shortLived(t, protocol, app)
			conn, end := dial(map[string][]string{"http": {"http/1.1"}, "tcp": nil}[protocol]...)
			io.WriteString(conn, request)
			<-came
			_, err := io.Copy(io.Discard, conn)
			if now := time.Now(); now.Before(end.Add(-time.Second)) {
				t.Errorf("the connection ended %v too soon: %v", end.Sub(now), err)
			}
			<-left
			sidecar.logged(1)
		})
	}
	t.Run("http2, in the midst of one", func(t *testing.T) {
		t.Parallel()
		came, left := make(chan struct{}, 1), make(chan struct{}, 1)
		sidecar, dial := shortLived(t, "http2", h2cServer(t, func(_ http.ResponseWriter, r *http.Request) {
			came <- struct{}{}
			<-r.Context().Done()
			left <- struct{}{}
		}))
		conn, end := dial("h2")
		io.WriteString(conn, codec.ClientPreface)
		fr := codec.NewFramer(conn, conn)
		fr.WriteSettings()
		var block bytes.Buffer
		enc := hpack.NewEncoder(&block)
		for _, f := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "orders"}, {":path", "/"}} {
			enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
		}
		fr.WriteHeaders(codec.HeadersFrameParam{StreamID: 1, EndStream: true, EndHeaders: true, BlockFragment: block.Bytes()})
		<-came
		warned := false
		for {
			f, err := fr.ReadFrame()
			if _, ok := f.(*codec.GoAwayFrame); ok {
				warned = true
			}
			if err != nil {
				break
			}
		}
		if now := time.Now(); now.Before(end.Add(-time.Second)) || !warned {
			t.Errorf("the connection ended %v before the X509-SVID; GOAWAY before: %t", end.Sub(now), warned)
		}
		<-left
		sidecar.logged(1)
	})
}

// Callers notice nothing of X509-SVIDs that come and end: each is replaced long before,
// as agents do, and by the end of the test the first ones have ended.
func TestCallsGoOnWhileSVIDsComeAndEnd(t *testing.T) {
	t.Parallel()
	td := sdktest.New(t)
	td.SetTTL(shortLife)
	td.Allow("web", "orders")
	echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	plain, _ := httpApp(t, echo)
	apps := map[string]string{"http": plain, "http2": h2cServer(t, echo), "grpc": newGRPCApp(t).addr}
	var calls sync.WaitGroup
	var made atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for protocol, app := range apps {
		in := start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: protocol}}})
		out := start(t, td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: in.addrs, Protocol: protocol, Retry: Retry{Attempts: 1}}}})
		p := &pair{td: td, inbound: in, outbound: out}
		call := func() error {
			res, err := p.direct(t, protocol, false).Post("http://orders/", "text/plain", strings.NewReader("hello"))
			if err != nil {
				return err
			}
			defer res.Body.Close()
			if text, err := io.ReadAll(res.Body); string(text) != "hello" || err != nil {
				return fmt.Errorf("%s %q %w", res.Status, text, err)
			}
			return nil
		}
		if protocol == "grpc" {
			c := grpcClient(t, out.addrs[0])
			call = func() error {
				_, err := c.UnaryCall(context.Background(), &testgrpc.SimpleRequest{})
				return err
			}
		}
		for range 2 {
			calls.Go(func() {
				for ctx.Err() == nil {
					if err := call(); err != nil {
						t.Errorf("%s: %v", protocol, err)
						return
					}
					made.Add(1)
					time.Sleep(5 * time.Millisecond)
				}
			})
		}
	}
	first := td.SVID("web").Certificates[0].NotAfter
	for time.Now().Before(first.Add(time.Second)) {
		time.Sleep(shortLife / 4)
		td.Rotate("web")
		td.Rotate("orders")
	}
	stop()
	calls.Wait()
	if made.Load() < 100 {
		t.Errorf("only %d calls were made", made.Load())
	}
}
