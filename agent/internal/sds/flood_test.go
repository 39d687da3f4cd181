// Callers that ask without end, or read nothing.

package sds

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/workload"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
	"merlon.dev/sdk/unixsock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve serves SDS for this very process, from the picture that it returns.
func serve(t *testing.T, requests *endpoint.Rate) (*cache.Cache, secretv3.SecretDiscoveryServiceClient) {
	t.Helper()
	attestor, err := workload.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { attestor.Close() })
	logger := slog.New(slog.DiscardHandler)
	c := cache.New(cache.Options{TrustDomain: td, Logger: logger, Registerer: prometheus.NewRegistry()})
	api := New(&endpoint.Callers{Attestor: attestor, Cache: c}, td, logger)
	api.requests = requests
	dir, err := os.MkdirTemp("", "ms") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	lis, err := unixsock.Listen(filepath.Join(dir, "s", "api.sock"), unixsock.Public)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(unixsock.ServerCredentials()))
	secretv3.RegisterSecretDiscoveryServiceServer(s, api)
	go s.Serve(lis)
	t.Cleanup(s.Stop)
	cc, err := grpc.NewClient("unix://"+lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithStaticStreamWindowSize(64<<10))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return c, secretv3.NewSecretDiscoveryServiceClient(cc)
}

func TestRequestsOfAUserAreRated(t *testing.T) {
	_, c := serve(t, endpoint.NewRate(1, 3))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := c.StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}}) != nil {
			break // Recv says why
		}
	}
	_, err = stream.Recv()
	st := status.Convert(err)
	if err == nil || st.Code() != codes.ResourceExhausted || len(st.Details()) != 1 || st.Details()[0].(*errdetails.ErrorInfo).GetReason() != endpoint.RateLimited {
		t.Errorf("after 100 requests: %v; want ResourceExhausted with RATE_LIMITED", err)
	}
}

// apply makes the trust bundle with this sequence number the picture's.
func apply(t *testing.T, c *cache.Cache, root *forge.Authority, sequence uint64, entries ...*capb.Entry) {
	t.Helper()
	jwks, err := root.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Apply(t.Context(), &capb.SyncResponse{
		Revision: sequence, Synced: true, Entries: entries,
		TrustBundle: &capb.TrustBundle{TrustDomain: td.Name(), Sequence: sequence, Jwks: jwks},
	}); err != nil {
		t.Fatal(err)
	}
}

// A trust bundle counts as delivered when every Envoy that asks for one was
// sent it, and not before.
func TestTrustBundleWaitsForAnEnvoyThatReadsNothing(t *testing.T) {
	c, client := serve(t, endpoint.NewRate(1000, 1000))
	root := forge.New(t, td.Name())
	apply(t, c, root, 1, &capb.Entry{
		EntryId: "e1", SpiffeId: "spiffe://example.test/web", Revision: 1,
		Selectors: []*capb.Selector{{Type: "unix", Value: "uid:" + strconv.Itoa(os.Geteuid())}},
	})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	stream, err := client.StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	acknowledged := func(sequence uint64) bool {
		_, trust := c.Ack(false)
		return trust == sequence
	}
	// It reads no more. 64 KiB and what the kernel buffers are under way before
	// the next trust bundle waits.
	sequence, waits := uint64(1), false
	for !waits && sequence < 2000 {
		sequence++
		apply(t, c, root, sequence)
		waits = true
		for deadline := time.Now().Add(time.Second); waits && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			waits = !acknowledged(sequence)
		}
	}
	if !waits {
		t.Fatalf("%d trust bundles were acknowledged with none of them read", sequence)
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if m.VersionInfo == strconv.FormatUint(sequence, 10) {
			break
		}
	}
	for deadline := time.Now().Add(30 * time.Second); !acknowledged(sequence); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("trust bundle %d was read and is not acknowledged", sequence)
		}
	}
}
