// Command grpc is a service and its client over gRPC: `grpc serve` and `grpc call`.
// The service is the health service of grpc-go; any other registers alike.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	_ "merlon.dev/sdk/otel" // metrics and traces, if OTEL_* asks for them
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("use: grpc serve ADDRESS, or grpc call ADDRESS")
	}
	id, err := sdk.Open(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	defer id.Close()
	if address := os.Args[2]; os.Args[1] == "serve" {
		err = serve(id, address)
	} else {
		err = call(id, address)
	}
	if err != nil {
		log.Print(err)
	}
}

func serve(id *sdk.Identity, address string) error {
	lis, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	srv := grpc.NewServer(grpcauth.ServerOptions(id)...)
	healthpb.RegisterHealthServer(srv, health.NewServer())
	return srv.Serve(lis)
}

// call fails with a *sdk.DeniedError, which says why, if the policy denies the call.
func call(id *sdk.Identity, address string) error {
	cc, err := grpc.NewClient("dns:///"+address, grpcauth.DialOptions(id, sdk.Service("orders"))...)
	if err != nil {
		return err
	}
	defer cc.Close()
	res, err := healthpb.NewHealthClient(cc).Check(context.Background(), &healthpb.HealthCheckRequest{})
	if err == nil {
		fmt.Println(res.GetStatus())
	}
	return err
}
