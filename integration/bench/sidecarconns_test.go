// What a connection to the sidecar costs while nothing happens on it.

package bench_test

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// BenchmarkSidecarConnections has 2000 callers connect to a sidecar of its own process,
// make a gRPC call each and stay, and reports what the process takes for each of them:
// over mutual TLS as at an inbound listener, and plain as at an outbound one.
func BenchmarkSidecarConnections(b *testing.B) {
	const conns = 2000
	for _, direction := range []string{"inbound", "outbound"} {
		b.Run(direction, func(b *testing.B) {
			td := sdktest.New(b)
			td.Allow("web", "orders")
			td.CompilePolicy()
			app, listen := unaryApp(b), listenLocal(b)
			address := listen.Addr().String()
			listen.Close()
			args := []string{"-health-address", "off", "-idle-timeout", "10m"}
			dial := new(net.Dialer).DialContext
			who := "web"
			if direction == "inbound" {
				args = append(args, "-inbound", address+","+app+",grpc")
				dial = td.Workload("web").DialTLS(sdk.Service("orders"), "h2")
				who = "orders"
			} else {
				args = append(args, "-outbound", address+",orders,grpc,"+sidecars(b, td, "grpc", app))
			}
			cmd := exec.Command(stage.Bin(b, "merlon-sidecar"), args...)
			cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+td.Address(who))
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
			stage.Eventually(b, "the sidecar listens", func() error {
				conn, err := net.Dial("tcp", address)
				if err == nil {
					conn.Close()
				}
				return err
			})
			for b.Loop() {
				idle, _ := measure.MemoryOf(b, cmd.Process.Pid)
				b.ReportMetric(float64(idle)/(1<<20), "MiB-idle")
				for range conns {
					call(b, dial, address)
				}
				time.Sleep(3 * time.Minute) // Go collects at least every two
				now, peak := measure.MemoryOf(b, cmd.Process.Pid)
				b.ReportMetric(float64(now-idle)/(1<<10)/conns, "KiB/conn")
				b.ReportMetric(float64(peak-idle)/(1<<10)/conns, "KiB/conn-at-most")
			}
		})
	}
}

// call connects and makes one gRPC call in frames; the connection stays.
func call(b *testing.B, dial func(context.Context, string, string) (net.Conn, error), address string) {
	b.Helper()
	conn, err := dial(b.Context(), "tcp", address)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	var block strings.Builder
	enc := hpack.NewEncoder(&block)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: "/grpc.testing.TestService/UnaryCall"},
		{Name: ":authority", Value: "orders"},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "te", Value: "trailers"},
	} {
		enc.WriteField(f)
	}
	io.WriteString(conn, codec.ClientPreface)
	fr := codec.NewFramer(conn, conn)
	fr.WriteSettings()
	fr.WriteHeaders(codec.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: []byte(block.String())})
	fr.WriteData(1, true, make([]byte, 5))
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			b.Fatal(err)
		}
		if h, ok := f.(*codec.HeadersFrame); ok && h.StreamEnded() {
			return
		}
	}
}
