// A caller that asks without end.

package sds

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

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
	"merlon.dev/sdk/unixsock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve serves SDS for this very process.
func serve(t *testing.T, requests *endpoint.Rate) secretv3.SecretDiscoveryServiceClient {
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
	cc, err := grpc.NewClient("unix://"+lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return secretv3.NewSecretDiscoveryServiceClient(cc)
}

func TestRequestsOfAUserAreRated(t *testing.T) {
	c := serve(t, endpoint.NewRate(1, 3))
	stream, err := c.StreamSecrets(t.Context())
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
	if st.Code() != codes.ResourceExhausted || len(st.Details()) != 1 || st.Details()[0].(*errdetails.ErrorInfo).GetReason() != endpoint.RateLimited {
		t.Errorf("after 100 requests: %v; want ResourceExhausted with RATE_LIMITED", err)
	}
}
