// What a decided gRPC call costs.

package grpcauth_test

import (
	"testing"

	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// One unary call over an open connection: client, TLS, decision at the agent
// over its socket, handler, all in this process.
func BenchmarkCall(b *testing.B) {
	td := sdktest.New(b)
	td.Allow("web", "orders")
	c := connect(b, td.Workload("web"), sdk.Service("orders"), start(b, td.Workload("orders"), &service{}))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.UnaryCall(b.Context(), &testgrpc.SimpleRequest{}); err != nil {
			b.Fatal(err)
		}
	}
}
