// What the public socket answers: every RPC on it is listed here with what it asks
// for. One that somebody registers and does not list is refused.

package endpoint

import (
	"context"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
)

// Header must accompany each call with the value "true" (SPIFFE Workload
// Endpoint §3): a browser or a proxy that was tricked into calling cannot set
// it.
const Header = "workload.spiffe.io"

// access is what an RPC asks for. The zero value asks for the header, and is not
// counted.
type access struct {
	// headerless RPCs take calls without Header.
	headerless bool
	// once says that a client needs to call it once, an Envoy once for each name, so
	// that opening it has a rate. Others are called as often as there is work.
	once bool
}

var rpcs = map[string]access{
	workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName:    {once: true},
	workload.SpiffeWorkloadAPI_FetchX509Bundles_FullMethodName: {once: true},
	workload.SpiffeWorkloadAPI_FetchJWTSVID_FullMethodName:     {},
	workload.SpiffeWorkloadAPI_FetchJWTBundles_FullMethodName:  {once: true},
	workload.SpiffeWorkloadAPI_ValidateJWTSVID_FullMethodName:  {},
	workload.SpiffeWorkloadAPI_FetchWITSVID_FullMethodName:     {},
	workload.SpiffeWorkloadAPI_FetchWITBundles_FullMethodName:  {},

	agentpb.Local_Authorize_FullMethodName:   {},
	agentpb.Local_Watch_FullMethodName:       {once: true},
	agentpb.Local_WatchPolicy_FullMethodName: {once: true},
	agentpb.Local_Report_FullMethodName:      {},
	agentpb.Local_HoldKeys_FullMethodName:    {once: true},

	// Envoy does not send the header unless it is told to. Each service is let in by
	// its own name, which opens no other, and whoever could be tricked into speaking
	// it is attested like every caller.
	secretv3.SecretDiscoveryService_StreamSecrets_FullMethodName: {headerless: true, once: true},
	secretv3.SecretDiscoveryService_DeltaSecrets_FullMethodName:  {headerless: true, once: true},
	secretv3.SecretDiscoveryService_FetchSecrets_FullMethodName:  {headerless: true, once: true},
	authv3.Authorization_Check_FullMethodName:                    {headerless: true},

	// Tools that look around do not know it, and there is nothing to get.
	healthgrpc.Health_Check_FullMethodName:                                 {headerless: true},
	healthgrpc.Health_List_FullMethodName:                                  {headerless: true},
	healthgrpc.Health_Watch_FullMethodName:                                 {headerless: true},
	reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName:      {headerless: true},
	reflectionv1alpha.ServerReflection_ServerReflectionInfo_FullMethodName: {headerless: true},
}

// Unary refuses calls that are not listed, or lack what theirs asks for.
func Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := admit(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

// Stream is Unary for streams.
func Stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := admit(stream.Context(), info.FullMethod); err != nil {
		return err
	}
	return next(srv, stream)
}

func admit(ctx context.Context, method string) error {
	rpc, listed := rpcs[method]
	switch {
	case !listed:
		return status.Errorf(codes.PermissionDenied, "%.200q is open to nobody on this socket", method)
	case rpc.headerless:
		return nil
	}
	if values := metadata.ValueFromIncomingContext(ctx, Header); len(values) != 1 || values[0] != "true" {
		return status.Errorf(codes.InvalidArgument, "metadata %s: true is missing", Header)
	}
	return nil
}
