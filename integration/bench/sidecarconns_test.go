// What a connection to the sidecar costs while nothing happens on it.

package bench_test

import (
	"bufio"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"merlon.dev/integration/frames"
	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
)

// BenchmarkSidecarConnections has 2000 callers connect to a sidecar, make a request each
// and stay, and reports what the process takes for each of them, at once and when it has
// been left alone: over mutual TLS as at an inbound listener, and plain as at an
// outbound one.
func BenchmarkSidecarConnections(b *testing.B) {
	const conns = 2000
	for _, protocol := range []string{carriesHTTP, carriesGRPC} {
		for side, direction := range []string{"outbound", "inbound"} {
			b.Run(protocol+"/"+direction, func(b *testing.B) {
				s := newSite(b)
				app, ask, alpn := plainApp, askHTTP, "http/1.1"
				if protocol == carriesGRPC {
					app, ask, alpn = unaryApp, askGRPC, "h2"
				}
				p, _ := sidecarPair(s, protocol, app(b))
				connect := func() (net.Conn, error) { return net.Dial("tcp", p.entry) }
				if direction == "inbound" {
					id, err := sdk.Open(b.Context(), sdk.WithAgentAddress(s.d.WorkloadAPI), sdk.WithLogger(slog.New(slog.DiscardHandler)))
					if err != nil {
						b.Fatal(err)
					}
					b.Cleanup(id.Close)
					connect = func() (net.Conn, error) {
						return id.DialTLS(sdk.Service("me"), alpn)(b.Context(), "tcp", p.inner)
					}
				}
				stay := func() error {
					conn, err := connect()
					if err != nil {
						return err
					}
					b.Cleanup(func() { conn.Close() })
					return ask(conn)
				}
				stage.Eventually(b, "the sidecars serve", stay)
				for b.Loop() {
					time.Sleep(30 * time.Second) // then what the start took has gone back
					idle, _ := measure.MemoryOf(b, p.pids[side])
					each := func() float64 {
						now, _ := measure.MemoryOf(b, p.pids[side])
						return float64(now-idle) / 1024 / conns
					}
					b.ReportMetric(float64(idle)/(1<<20), "MiB-idle")
					for range conns {
						if err := stay(); err != nil {
							b.Fatal(err)
						}
					}
					b.ReportMetric(each(), "KiB/conn-at-once")
					time.Sleep(55 * time.Second) // idle connections end after a minute
					b.ReportMetric(each(), "KiB/conn")
				}
			})
		}
	}
}

func askHTTP(conn net.Conn) error {
	c := &caller{conn, bufio.NewReaderSize(conn, 256)}
	return c.call(get)
}

// askGRPC makes one call in frames.
func askGRPC(conn net.Conn) error {
	c := frames.New(conn)
	c.Hello()
	c.Headers(1, false, ":method", "POST", ":scheme", "http", ":path", "/grpc.testing.TestService/UnaryCall", ":authority", "orders",
		"content-type", "application/grpc", "te", "trailers")
	if err := c.Framer.WriteData(1, true, make([]byte, 5)); err != nil {
		return err
	}
	if got := c.Await(1); got.Status != "200" || got.Body == "" {
		return errors.New("no answer, but " + got.Status + got.ErrCode.String())
	}
	return nil
}
