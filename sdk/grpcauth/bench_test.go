// What a decided gRPC call costs.

package grpcauth_test

import (
	"testing"

	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// One unary call over an open connection: client, TLS, decision, handler, all in
// this process; by the compiled policy, and by the agent over its socket.
func BenchmarkCall(b *testing.B) {
	for _, by := range []string{"program", "agent"} {
		b.Run(by, func(b *testing.B) {
			td := sdktest.New(b)
			td.Allow("web", "orders")
			if by == "program" {
				td.CompilePolicy()
			}
			c := connect(b, td.Workload("web"), sdk.Service("orders"), start(b, td.Workload("orders"), &service{}))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.UnaryCall(b.Context(), &testgrpc.SimpleRequest{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
