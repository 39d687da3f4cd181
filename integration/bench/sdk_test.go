// P7 and P8: what the SDK adds to mutual TLS. Every variant does the same work in
// one process, both ends, in turn with the others; the figures are CPU of the whole
// process per operation, and their ratios are what counts.

package bench_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// variant is one way to do the same operation.
type variant struct {
	name string
	run  func() error
}

// inTurn runs the variants in turn, 20 of each and again, and reports the CPU per
// operation of each, and its ratio to the first.
func inTurn(b *testing.B, variants []variant) {
	b.Helper()
	const each = 20
	spent := make([]time.Duration, len(variants))
	for _, v := range variants { // connections, caches, code
		for range each {
			if err := v.run(); err != nil {
				b.Fatal(v.name, err)
			}
		}
	}
	rounds := 0
	for b.Loop() {
		for i := range variants {
			// Whoever goes first is another one each time.
			at := (i + rounds) % len(variants)
			begun := cpuTime(b)
			for range each {
				if err := variants[at].run(); err != nil {
					b.Fatal(variants[at].name, err)
				}
			}
			spent[at] += cpuTime(b) - begun
		}
		rounds++
	}
	b.ReportMetric(0, "ns/op")
	for i, v := range variants {
		b.ReportMetric(float64(spent[i].Microseconds())/float64(rounds*each), v.name+"-cpu-µs")
		if i > 0 {
			b.ReportMetric(float64(spent[i])/float64(spent[0]), v.name+"-ratio")
		}
	}
}

// cpuTime is what this process has used.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// goSPIFFE is a workload as go-spiffe alone has it. SVIDs and trust bundles are at
// hand, as in its X509Source.
type goSPIFFE struct {
	svid   *x509svid.SVID
	bundle x509bundle.Source
}

func (s goSPIFFE) GetX509SVID() (*x509svid.SVID, error) { return s.svid, nil }

func withGoSPIFFE(td *sdktest.TD, name string) goSPIFFE { return goSPIFFE{td.SVID(name), td.Bundle()} }

// BenchmarkHandshake is P8, with X509-SVIDs of a real CA: leaf, intermediate and a
// root that is not sent. Every chain has been seen before.
func BenchmarkHandshake(b *testing.B) {
	d, _, id := me(b)
	source, err := workloadapi.NewX509Source(b.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(d.WorkloadAPI)))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { source.Close() })
	for name, curve := range map[string]tls.CurveID{"mlkem": tls.X25519MLKEM768, "x25519": tls.X25519} {
		b.Run(name, func(b *testing.B) {
			server := tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(id.ID()))
			dialer := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id.ID()))
			own := id.ClientTLS(sdk.Service("me"))
			for _, cfg := range []*tls.Config{server, dialer} {
				cfg.MinVersion, cfg.SessionTicketsDisabled = tls.VersionTLS13, true // as ours: a full handshake each time
			}
			dialer.CurvePreferences, own.CurvePreferences = []tls.CurveID{curve}, []tls.CurveID{curve}
			inTurn(b, []variant{
				{"gospiffe", handshakes(b, func(raw net.Conn) *tls.Conn { return tls.Server(raw, server) }, dialer)},
				{"sdk", handshakes(b, func(raw net.Conn) *tls.Conn { return tls.Server(raw, id.ServerTLS()) }, own)},
			})
		})
	}
}

// BenchmarkNewHandshake is P8 for chains that were not seen before, at either end, with
// the trust bundle of the real CA and with 99 roots of other names beside its own. The
// verdict is the SDK's (sdk/svid), made to forget what it has verified.
func BenchmarkNewHandshake(b *testing.B) {
	_, _, id := me(b)
	own, err := id.GetX509BundleForTrustDomain(id.ID().TrustDomain())
	if err != nil {
		b.Fatal(err)
	}
	many := own.Clone()
	for range 99 {
		many.AddX509Authority(forge.New(b, "example.org").Cert)
	}
	variants := func(name string, bundle *x509bundle.Bundle) []variant {
		server := tlsconfig.MTLSServerConfig(id, bundle, tlsconfig.AuthorizeID(id.ID()))
		dialer := tlsconfig.MTLSClientConfig(id, bundle, tlsconfig.AuthorizeID(id.ID()))
		trust := svid.NewTrust(x509bundle.NewSet(bundle))
		ours := svid.TLS{SVIDs: id, Bundles: bundle}
		ourServer, ourDialer := ours.Server(), ours.Client()
		for _, cfg := range []*tls.Config{server, dialer, ourServer, ourDialer} {
			cfg.MinVersion, cfg.SessionTicketsDisabled = tls.VersionTLS13, true
			cfg.CurvePreferences = []tls.CurveID{tls.X25519}
		}
		for _, cfg := range []*tls.Config{ourServer, ourDialer} {
			cfg.VerifyConnection = func(cs tls.ConnectionState) error {
				trust.Forget()
				_, err := trust.VerifyChain(cs.PeerCertificates, time.Now())
				return err
			}
		}
		return []variant{
			{"gospiffe" + name, handshakes(b, func(raw net.Conn) *tls.Conn { return tls.Server(raw, server) }, dialer)},
			{"sdk" + name, handshakes(b, func(raw net.Conn) *tls.Conn { return tls.Server(raw, ourServer) }, ourDialer)},
		}
	}
	inTurn(b, append(variants("", own), variants("-100-roots", many)...))
}

// handshakes makes a function that does one, over a connection of its own.
func handshakes(b *testing.B, server func(net.Conn) *tls.Conn, client *tls.Config) func() error {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { lis.Close() })
	done := make(chan error, 1)
	go func() {
		for {
			raw, err := lis.Accept()
			if err != nil {
				return
			}
			conn := server(raw)
			done <- conn.Handshake()
			conn.Close()
		}
	}()
	return func() error {
		raw, err := net.Dial("tcp", lis.Addr().String())
		if err != nil {
			return err
		}
		conn := tls.Client(raw, client)
		err = conn.Handshake()
		err = errors.Join(err, <-done)
		conn.Close()
		return err
	}
}

type answers struct {
	testgrpc.UnimplementedTestServiceServer
}

func (answers) UnaryCall(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	return &testgrpc.SimpleResponse{}, nil
}

// BenchmarkUnaryCall is P7: 16 at a time over one connection.
func BenchmarkUnaryCall(b *testing.B) {
	td := sdktest.New(b)
	td.Allow("web", "orders")
	td.CompilePolicy()
	theirs, client := withGoSPIFFE(td, "orders"), withGoSPIFFE(td, "web")
	inTurn(b, []variant{
		{"gospiffe", calls(b,
			[]grpc.ServerOption{grpc.Creds(grpccredentials.MTLSServerCredentials(theirs, theirs.bundle, tlsconfig.AuthorizeMemberOf(td.ID("web").TrustDomain())))},
			[]grpc.DialOption{grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(client, client.bundle, tlsconfig.AuthorizeID(td.ID("orders"))))})},
		{"plain", calls(b, nil, []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())})},
		{"sdk", calls(b, grpcauth.ServerOptions(td.Workload("orders")), grpcauth.DialOptions(td.Workload("web"), sdk.Service("orders")))},
	})
}

// calls makes a function that does 16 calls at a time, 20 times over.
func calls(b *testing.B, server []grpc.ServerOption, client []grpc.DialOption) func() error {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	srv := grpc.NewServer(server...)
	testgrpc.RegisterTestServiceServer(srv, answers{})
	go srv.Serve(lis)
	b.Cleanup(srv.Stop)
	conn, err := grpc.NewClient("passthrough:///"+lis.Addr().String(), client...)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	c := testgrpc.NewTestServiceClient(conn)
	return func() error {
		var wg sync.WaitGroup
		errs := make([]error, 16)
		for i := range errs {
			wg.Go(func() {
				for range 20 {
					if _, errs[i] = c.UnaryCall(context.Background(), &testgrpc.SimpleRequest{}); errs[i] != nil {
						return
					}
				}
			})
		}
		wg.Wait()
		if i := slices.IndexFunc(errs, func(err error) bool { return err != nil }); i >= 0 {
			return fmt.Errorf("call: %w", errs[i])
		}
		return nil
	}
}
