// P7 and P8: what the SDK adds to mutual TLS. Every variant does the same work in
// one process, both ends, in turn with the others; the figures are CPU of the whole
// process per operation, and their ratios are what counts.

package bench_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/integration/measure"
	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// turns is how often a variant does its operation before the next.
const turns = 20

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
	d, _, id := me(b, 0)
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
			measure.Interleaved(b, turns,
				measure.Variant{Name: "gospiffe", Run: handshakes(b, func(raw net.Conn) *tls.Conn { return tls.Server(raw, server) }, dialer)},
				measure.Variant{Name: "sdk", Run: handshakes(b, func(raw net.Conn) *tls.Conn { return tls.Server(raw, id.ServerTLS()) }, own)},
			)
		})
	}
}

// BenchmarkNewHandshake is P8 for chains that were not seen before, at either end: each
// handshake has two X509-SVIDs of its own, under one intermediate such as the CA's;
// with its root alone in the trust bundle, and with 99 roots of other names beside it.
func BenchmarkNewHandshake(b *testing.B) {
	ca := forge.New(b, "example.org")
	issuer := ca.Intermediate(func(c *x509.Certificate) {
		c.PermittedURIDomains, c.PermittedDNSDomainsCritical, c.MaxPathLen, c.MaxPathLenZero = []string{"example.org"}, true, 0, true
	})
	var svids newSVIDs
	key := forge.OfKey(forge.New(b, "example.org").Key)
	for range forgotten {
		svids.all = append(svids.all, issuer.Leaf("/me", key).X509SVID())
	}
	variants := func(name string, bundle *x509bundle.Bundle) []measure.Variant {
		me := tlsconfig.AuthorizeID(svids.all[0].ID)
		server, dialer := tlsconfig.MTLSServerConfig(&svids, bundle, me), tlsconfig.MTLSClientConfig(&svids, bundle, me)
		trust := svid.NewTrust(x509bundle.NewSet(bundle))
		ours := svid.TLS{SVIDs: &svids, Bundles: bundle}
		ourServer, ourDialer := ours.Server(), ours.Client()
		for _, cfg := range []*tls.Config{server, dialer, ourServer, ourDialer} {
			cfg.MinVersion, cfg.SessionTicketsDisabled = tls.VersionTLS13, true
			cfg.CurvePreferences = []tls.CurveID{tls.X25519}
		}
		for _, cfg := range []*tls.Config{ourServer, ourDialer} {
			cfg.VerifyConnection = func(cs tls.ConnectionState) error {
				_, err := trust.VerifyChain(cs.PeerCertificates, time.Now())
				return err
			}
		}
		return []measure.Variant{
			{Name: "gospiffe" + name, Run: handshakes(b, func(raw net.Conn) *tls.Conn { return tls.Server(raw, server) }, dialer)},
			{Name: "sdk" + name, Run: handshakes(b, func(raw net.Conn) *tls.Conn { return tls.Server(raw, ourServer) }, ourDialer)},
		}
	}
	own := ca.Bundle().X509Bundle()
	many := own.Clone()
	for range 99 {
		many.AddX509Authority(forge.New(b, "example.org").Cert)
	}
	measure.Interleaved(b, turns, append(variants("", own), variants("-100-roots", many)...)...)
}

// forgotten is more chains than a svid.Trust remembers: the first is new again.
const forgotten = 4096

// newSVIDs is a source of another X509-SVID each time.
type newSVIDs struct {
	all  []*x509svid.SVID
	next atomic.Uint64
}

func (s *newSVIDs) GetX509SVID() (*x509svid.SVID, error) {
	return s.all[s.next.Add(1)%uint64(len(s.all))], nil
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
	measure.Interleaved(b, turns,
		measure.Variant{Name: "gospiffe", Ops: callsATurn, Run: calls(b,
			[]grpc.ServerOption{grpc.Creds(grpccredentials.MTLSServerCredentials(theirs, theirs.bundle, tlsconfig.AuthorizeMemberOf(td.ID("web").TrustDomain())))},
			[]grpc.DialOption{grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(client, client.bundle, tlsconfig.AuthorizeID(td.ID("orders"))))})},
		measure.Variant{Name: "plain", Ops: callsATurn, Run: calls(b, nil, []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())})},
		measure.Variant{Name: "sdk", Ops: callsATurn, Run: calls(b, grpcauth.ServerOptions(td.Workload("orders")), grpcauth.DialOptions(td.Workload("web"), sdk.Service("orders")))},
	)
}

// callsATurn are 20 calls by each of 16 callers at a time.
const callsATurn = 16 * 20

// calls makes a function that does those.
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
