// Connections that hang on a tainted root run out before it is withdrawn, whichever side
// notices; no call fails, and a stream goes on meanwhile.

package grpcauth_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	"merlon.dev/sdk/sdktest"
)

func TestConnectionsRunOutBeforeTheirRootIsWithdrawn(t *testing.T) {
	for first, second := range map[string]string{"web": "orders", "orders": "web"} {
		t.Run(first+" is the first to have another SVID", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				td := sdktest.NewInMemory(t)
				td.Allow("web", "orders")
				orders, web := td.Workload("orders"), td.Workload("web")
				srv := grpc.NewServer(grpcauth.ServerOptions(orders)...)
				testgrpc.RegisterTestServiceServer(srv, &service{})
				go srv.Serve(td.Listen("orders:443"))
				t.Cleanup(srv.Stop)
				cc, err := grpc.NewClient("dns:///orders:443", grpcauth.DialOptions(web, sdk.Service("orders"))...)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { cc.Close() })
				c := testgrpc.NewTestServiceClient(cc)
				calls := func(d time.Duration) {
					t.Helper()
					for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
						if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); err != nil {
							t.Fatalf("UnaryCall: %v", err)
						}
					}
				}
				calls(time.Second)
				before := connections(orders, web)
				stream, err := c.FullDuplexCall(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				echo := func(when string) {
					t.Helper()
					err := stream.Send(&testgrpc.StreamingOutputCallRequest{})
					if err == nil {
						_, err = stream.Recv()
					}
					if err != nil {
						t.Fatalf("the stream, %s: %v", when, err)
					}
				}
				echo("at first")
				td.AddRoot()
				td.TaintOldRoots()
				td.Rotate(first)
				calls(5 * time.Second)
				td.Rotate(second)
				calls(10 * time.Second)
				echo("on a connection that drains")
				if now := connections(orders, web); len(now) <= len(before) {
					t.Errorf("connections: %v; want another one beside that of the stream", now)
				}
				if err := stream.CloseSend(); err != nil {
					t.Error(err)
				}
				calls(15 * time.Second) // the server hears of the end when it sweeps
				now := connections(orders, web)
				for open := range before {
					if now[open] {
						t.Errorf("%s is still open; want it to have run out", open)
					}
				}
				if len(before) == 0 || len(now) == 0 {
					t.Errorf("connections before: %v, now: %v", before, now)
				}
				td.RemoveOldRoots()
				calls(time.Second)
			})
		})
	}
}

// connections are those of both ends.
func connections(ids ...*sdk.Identity) map[string]bool {
	all := make(map[string]bool)
	for _, id := range ids {
		for _, c := range id.State(1000).Connections {
			all[fmt.Sprintf("a connection with %s, %s, by %s", c.SPIFFEID, c.Serial, c.Authorities)] = true
		}
	}
	return all
}
