// A service that takes its callers step by step: audit mode and plaintext over gRPC.

package grpcauth_test

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	"merlon.dev/sdk/sdktest"
)

// knows answers who the caller is and why it was let in.
type knows struct {
	testgrpc.UnimplementedTestServiceServer
}

func (knows) UnaryCall(ctx context.Context, _ *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	name := "nobody"
	if peer, ok := sdk.PeerFromContext(ctx); ok {
		name = peer.ID.String()
	}
	d, _ := sdk.DecisionFromContext(ctx)
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("x-spiffe-id")) > 0 {
		name = "forged"
	}
	return &testgrpc.SimpleResponse{Username: name + " " + string(d.Reason)}, nil
}

func plain(t *testing.T, address string) testgrpc.TestServiceClient {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return testgrpc.NewTestServiceClient(cc)
}

func TestGradualAdoption(t *testing.T) {
	td := sdktest.New(t)
	now := time.Now()
	for name, test := range map[string]struct {
		plaintext time.Duration
		served    bool
	}{
		"before the date": {time.Hour, true},
		"after the date":  {-time.Minute, false},
	} {
		t.Run(name, func(t *testing.T) {
			orders := td.Workload("orders", sdk.WithAuditUntil(now.Add(time.Hour)), sdk.WithPlaintextUntil(now.Add(test.plaintext)))
			address := startService(t, orders, knows{})
			ctx := metadata.AppendToOutgoingContext(limited(t), "x-spiffe-id", "spiffe://sdktest.test/web")
			res, err := connect(t, td.Workload("web"), sdk.Service("orders"), address).UnaryCall(ctx, &testgrpc.SimpleRequest{})
			if want := "spiffe://sdktest.test/web NO_GRANT"; err != nil || res.GetUsername() != want {
				t.Errorf("over TLS = %v, %v; want %q", res, err, want)
			}
			res, err = plain(t, address).UnaryCall(ctx, &testgrpc.SimpleRequest{})
			if want := "nobody NO_IDENTITY"; (err == nil) != test.served || test.served && res.GetUsername() != want {
				t.Errorf("over plaintext = %v, %v; served: %v", res, err, test.served)
			}
			stats := orders.Stats()
			if stats.WouldDeny[policy.NoGrant] != 1 || len(stats.Plaintext) != 1 || (stats.Plaintext[0].Calls == 1) != test.served || (stats.Plaintext[0].Refused > 0) == test.served {
				t.Errorf("stats: %+v", stats)
			}
		})
	}
}

// Only our credentials can say that a connection is plaintext: others may have
// authenticated somebody whom we do not know.
func TestForeignCredentialsAreNoPlaintext(t *testing.T) {
	td := sdktest.New(t)
	now := time.Now()
	orders := td.Workload("orders", sdk.WithAuditUntil(now.Add(time.Hour)), sdk.WithPlaintextUntil(now.Add(time.Hour)))
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(append(grpcauth.ServerOptions(orders), grpc.Creds(insecure.NewCredentials()))...)
	testgrpc.RegisterTestServiceServer(srv, knows{})
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(lis) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	_, err = plain(t, lis.Addr().String()).UnaryCall(limited(t), &testgrpc.SimpleRequest{})
	if denied, ok := sdk.DeniedFromStatus(err); !ok || denied.Reason != policy.NoIdentity {
		t.Errorf("UnaryCall = %v; want a denial for NO_IDENTITY", err)
	}
}
