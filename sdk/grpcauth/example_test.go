// A gRPC server and client, as their users write them.

package grpcauth_test

import (
	"context"
	"errors"
	"log"
	"net"

	"google.golang.org/grpc"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
)

func ExampleServerOptions() {
	id, err := sdk.Open(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	defer id.Close()

	lis, err := net.Listen("tcp", ":8443")
	if err != nil {
		log.Fatal(err)
	}
	srv := grpc.NewServer(grpcauth.ServerOptions(id)...)
	testgrpc.RegisterTestServiceServer(srv, &service{}) // your own
	log.Fatal(srv.Serve(lis))
}

func ExampleDialOptions() {
	ctx := context.Background()
	id, err := sdk.Open(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer id.Close()

	cc, err := grpc.NewClient("dns:///orders.internal:8443", grpcauth.DialOptions(id, sdk.Service("orders"))...)
	if err != nil {
		log.Fatal(err)
	}
	defer cc.Close()
	_, err = testgrpc.NewTestServiceClient(cc).UnaryCall(ctx, &testgrpc.SimpleRequest{})
	if denied, ok := errors.AsType[*sdk.DeniedError](err); ok {
		log.Fatal(denied.Reason, denied.DecisionID, denied.Hint)
	}
}
