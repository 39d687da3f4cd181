// A peer that is revoked loses what it has open, by the side that looks at it: callers by
// an inbound listener, whatever they think of it, and called services by an outbound one.

package sidecar

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"merlon.dev/sdk/sdktest"
)

// live are the things that stay open. Each makes one over the connections that dial
// makes, and gives what waits for its end.
var live = map[string]struct {
	protocol, alpn string
	app            func(t *testing.T) (address string)
	open           func(t *testing.T, dial func() net.Conn) (ended func() error)
}{
	"TCP": {
		"tcp", "", func(t *testing.T) string { address, _ := echoApp(t); return address },
		func(t *testing.T, dial func() net.Conn) func() error {
			conn := dial()
			if err := say(conn); err != nil {
				t.Fatal(err)
			}
			return func() error { return nothingMore(conn) }
		},
	},
	"WebSocket": {
		"http", "http/1.1", func(t *testing.T) string {
			address, _ := httpApp(t, func(w http.ResponseWriter, _ *http.Request) {
				conn, buffered, err := http.NewResponseController(w).Hijack()
				if err != nil {
					return
				}
				defer conn.Close()
				io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
				io.Copy(conn, buffered)
			})
			return address
		},
		func(t *testing.T, dial func() net.Conn) func() error {
			conn := dial()
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			res, err := http.ReadResponse(bufio.NewReaderSize(conn, 16), nil)
			if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
				t.Fatalf("%v, %v", res, err)
			}
			if err := say(conn); err != nil {
				t.Fatal(err)
			}
			return func() error { return nothingMore(conn) }
		},
	},
	"gRPC": {
		"grpc", "h2", func(t *testing.T) string { return newGRPCApp(t).addr },
		func(t *testing.T, dial func() net.Conn) func() error {
			c := grpcClient(t, "orders", grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return dial(), nil }))
			s, err := c.FullDuplexCall(within(t))
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Send(&testgrpc.StreamingOutputCallRequest{Payload: payload(1)}); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			return func() error {
				m, err := s.Recv()
				if err == nil {
					return fmt.Errorf("the message %v came", m)
				}
				if status.Code(err) == codes.DeadlineExceeded {
					return err
				}
				return nil
			}
		},
	},
}

// nothingMore waits for the end of conn, and says whether anything came before.
func nothingMore(conn net.Conn) error {
	switch n, err := conn.Read(make([]byte, 1)); {
	case n > 0:
		return errors.New("a byte came")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return err
	}
	return nil
}

// careless is TLS by an SVID of the trust domain which judges nobody.
func careless(td *sdktest.TD, name, alpn string) *tls.Config {
	own := td.SVID(name)
	var chain [][]byte
	for _, c := range own.Certificates {
		chain = append(chain, c.Raw)
	}
	cfg := &tls.Config{
		Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: own.PrivateKey}},
		MinVersion:   tls.VersionTLS13, InsecureSkipVerify: true, ClientAuth: tls.RequireAnyClientCert,
	}
	if alpn != "" {
		cfg.NextProtos = []string{alpn}
	}
	return cfg
}

// carelessServer takes TLS off before app.
func carelessServer(t *testing.T, td *sdktest.TD, alpn, app string) (address string) {
	lis := listen(t)
	cfg := careless(td, "orders", alpn)
	go func() {
		for {
			raw, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				conn := tls.Server(raw, cfg)
				defer conn.Close()
				to, err := net.Dial("tcp", app)
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					io.Copy(conn, to)
				}()
				io.Copy(to, conn)
				to.Close()
			}()
		}
	}()
	return lis.Addr().String()
}

func TestRevokedPeersAreCut(t *testing.T) {
	limit := 25 * time.Second // before the ends of the tests' own connections
	if text := os.Getenv("MERLON_CUTOFF"); text != "" {
		var err error
		if limit, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	for name, l := range live {
		for side, revoked := range map[string]string{"inbound": "web", "outbound": "orders"} {
			t.Run(name+"/"+side, func(t *testing.T) {
				td := sdktest.New(t)
				td.Allow("web", "orders")
				app := l.app(t)
				var ended func() error
				if side == "inbound" {
					in := start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: l.protocol}}})
					cfg := careless(td, "web", l.alpn)
					ended = l.open(t, func() net.Conn { return tls.Client(dial(t, in.addrs[0]), cfg) })
				} else {
					out := start(t, td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: []string{carelessServer(t, td, l.alpn, app)}, Protocol: l.protocol}}})
					ended = l.open(t, func() net.Conn { return dial(t, out.addrs[0]) })
				}
				begun := time.Now()
				td.Revoke(revoked)
				if err := ended(); err != nil {
					t.Fatal(err)
				}
				took := time.Since(begun)
				t.Logf("cut after %v", took.Round(100*time.Microsecond))
				if took > limit {
					t.Errorf("cut after %v; want %v at most", took, limit)
				}
			})
		}
	}
}
