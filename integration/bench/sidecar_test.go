// What the sidecar costs beside what one would write in an afternoon: a pair of
// httputil.ReverseProxy.

package bench_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/integration/measure"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/sidecar"
)

// BenchmarkSidecarCall is P10 over gRPC: unary calls through a pair with mutual TLS
// between, a decision for each at the sidecars and none at the others. CPU is that of
// both ends and both proxies.
func BenchmarkSidecarCall(b *testing.B) {
	for _, size := range []int{16, 1 << 20} {
		for _, at := range []int{1, 16, 64} {
			b.Run(fmt.Sprintf("%d-bytes/%d-at-once", size, at), func(b *testing.B) {
				td := sdktest.New(b)
				td.Allow("web", "orders")
				td.CompilePolicy()
				app := unaryApp(b)
				measure.Interleaved(b, turns,
					measure.Variant{Name: "reverseproxy", Run: unaryCalls(b, reverseProxies(b, td, app), size, at)},
					measure.Variant{Name: "plain", Run: unaryCalls(b, app, size, at)},
					measure.Variant{Name: "sidecar", Run: unaryCalls(b, sidecars(b, td, "grpc", app), size, at)},
				)
			})
		}
	}
}

type echoes struct {
	testgrpc.UnimplementedTestServiceServer
}

func (echoes) UnaryCall(_ context.Context, req *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	return &testgrpc.SimpleResponse{Payload: req.GetPayload()}, nil
}

// unaryApp is a gRPC server without TLS.
func unaryApp(b *testing.B) (address string) {
	lis := listenLocal(b)
	srv := grpc.NewServer()
	testgrpc.RegisterTestServiceServer(srv, echoes{})
	go srv.Serve(lis)
	b.Cleanup(srv.Stop)
	return lis.Addr().String()
}

func listenLocal(b *testing.B) net.Listener {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { lis.Close() })
	return lis
}

// unaryCalls makes a function that does 20 calls, or one large one, at times over.
func unaryCalls(b *testing.B, address string, size, at int) func() error {
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	c := testgrpc.NewTestServiceClient(conn)
	req := &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: []byte(strings.Repeat("x", size))}}
	n := 20
	if size > 1<<10 {
		n = 1
	}
	return func() error {
		var wg sync.WaitGroup
		errs := make([]error, at)
		for i := range errs {
			wg.Go(func() {
				for range n {
					if _, errs[i] = c.UnaryCall(context.Background(), req); errs[i] != nil {
						return
					}
				}
			})
		}
		wg.Wait()
		if i := slices.IndexFunc(errs, func(err error) bool { return err != nil }); i >= 0 {
			return errs[i]
		}
		return nil
	}
}

// sidecars runs a pair before app and gives the address for callers.
func sidecars(b *testing.B, td *sdktest.TD, protocol, app string) (address string) {
	b.Helper()
	free := func() string {
		lis := listenLocal(b)
		defer lis.Close()
		return lis.Addr().String()
	}
	between, address := free(), free()
	for name, cfg := range map[string]sidecar.Config{
		"orders": {Inbound: []sidecar.Inbound{{Listen: between, App: app, Protocol: protocol}}},
		"web":    {Outbound: []sidecar.Outbound{{Listen: address, To: "orders", Upstreams: []string{between}, Protocol: protocol}}},
	} {
		cfg.AgentSocket, cfg.HealthAddress, cfg.Logger = td.Address(name), "off", slog.New(slog.DiscardHandler)
		s, err := sidecar.New(cfg)
		if err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		b.Cleanup(func() { cancel(); <-done })
	}
	for _, a := range []string{between, address} {
		for {
			conn, err := net.Dial("tcp", a)
			if err == nil {
				conn.Close()
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	return address
}

// reverseProxies is the pair of net/http.
func reverseProxies(b *testing.B, td *sdktest.TD, app string) (address string) {
	var plain http.Protocols
	plain.SetUnencryptedHTTP2(true)
	serve := func(lis net.Listener, srv *http.Server) {
		srv.ErrorLog = log.New(io.Discard, "", 0)
		go func() {
			if srv.TLSConfig != nil {
				_ = srv.ServeTLS(lis, "", "")
				return
			}
			_ = srv.Serve(lis)
		}()
		b.Cleanup(func() { srv.Close() })
	}
	proxy := func(to string, transport *http.Transport) *httputil.ReverseProxy {
		b.Cleanup(transport.CloseIdleConnections)
		return &httputil.ReverseProxy{
			Transport: transport, FlushInterval: -1, ErrorLog: log.New(io.Discard, "", 0),
			Rewrite: func(r *httputil.ProxyRequest) {
				scheme, host, _ := strings.Cut(to, "://")
				r.Out.URL.Scheme, r.Out.URL.Host = scheme, host
			},
		}
	}
	in, out := listenLocal(b), listenLocal(b)
	serve(in, &http.Server{
		ReadHeaderTimeout: time.Minute, TLSConfig: td.Workload("orders").ServerTLS(),
		Handler: proxy("http://"+app, &http.Transport{Protocols: &plain}),
	})
	serve(out, &http.Server{
		ReadHeaderTimeout: time.Minute, Protocols: &plain,
		Handler: proxy("https://"+in.Addr().String(), &http.Transport{ForceAttemptHTTP2: true, DialTLSContext: td.Workload("web").DialTLS(sdk.Service("orders"), "h2")}),
	})
	return out.Addr().String()
}
