// The Workload API by the letter of the standard, from outside (SECURITY.md
// E2, E8, E12, E15): metadata on every RPC, reflection, error codes.

package integration_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/unixsock"
)

func dialSocket(t *testing.T, address string) *grpc.ClientConn {
	t.Helper()
	cc, err := grpc.NewClient("unix:"+strings.TrimPrefix(address, "unix://"), grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

// firstOf is the first message of a stream.
func firstOf[T any](stream grpc.ServerStreamingClient[T], err error) error {
	if err == nil {
		_, err = stream.Recv()
	}
	return err
}

// calls are all RPCs of the public socket, each as it answers a workload.
func calls(cc *grpc.ClientConn) map[string]func(context.Context) error {
	api, local := workload.NewSpiffeWorkloadAPIClient(cc), agentpb.NewLocalClient(cc)
	return map[string]func(context.Context) error{
		"FetchX509SVID": func(ctx context.Context) error {
			return firstOf(api.FetchX509SVID(ctx, &workload.X509SVIDRequest{}))
		},
		"FetchX509Bundles": func(ctx context.Context) error {
			return firstOf(api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{}))
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"orders"}})
			return err
		},
		"FetchJWTBundles": func(ctx context.Context) error {
			return firstOf(api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{}))
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			got, err := api.FetchJWTSVID(metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true"), &workload.JWTSVIDRequest{Audience: []string{"orders"}})
			if err != nil {
				return err
			}
			_, err = api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "orders", Svid: got.GetSvids()[0].GetSvid()})
			return err
		},
		"Local.Watch": func(ctx context.Context) error {
			return firstOf(local.Watch(ctx, &agentpb.WatchRequest{}))
		},
		"Local.Authorize": func(ctx context.Context) error {
			_, err := local.Authorize(ctx, &agentpb.AuthorizeRequest{Source: "spiffe://dev.local/web", Protocol: "tcp"})
			return err
		},
	}
}

func TestEveryCallNeedsTheSecurityHeader(t *testing.T) {
	d := stage.Dev(t)
	d.Entry("/me")
	all := calls(dialSocket(t, d.WorkloadAPI))
	for name, md := range map[string]metadata.MD{
		"absent":     {},
		"capital":    {"workload.spiffe.io": {"True"}},
		"upper case": {"workload.spiffe.io": {"TRUE"}},
		"two values": {"workload.spiffe.io": {"true", "true"}},
		"empty":      {"workload.spiffe.io": {""}},
		"other key":  {"workload-spiffe-io": {"true"}},
	} {
		for rpc, call := range all {
			ctx := metadata.NewOutgoingContext(t.Context(), md)
			if err := call(ctx); status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s with the header %s: %v; want InvalidArgument", rpc, name, err)
			}
		}
	}
	for rpc, call := range all {
		ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"))
		if err := call(ctx); err != nil {
			t.Errorf("%s with the header: %v", rpc, err)
		}
		cancel()
	}
}

func TestMandatoryFieldsAndForeignIdentities(t *testing.T) {
	d := stage.Dev(t)
	d.Entry("/me")
	api := workload.NewSpiffeWorkloadAPIClient(dialSocket(t, d.WorkloadAPI))
	ctx := metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true")
	for name, tc := range map[string]struct {
		req  *workload.JWTSVIDRequest
		want codes.Code
	}{
		"no audience":      {&workload.JWTSVIDRequest{}, codes.InvalidArgument},
		"empty audience":   {&workload.JWTSVIDRequest{Audience: []string{""}}, codes.InvalidArgument},
		"malformed ID":     {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://dev.local//x"}, codes.InvalidArgument},
		"somebody else":    {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://dev.local/other"}, codes.PermissionDenied},
		"its own identity": {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://dev.local/me"}, codes.OK},
	} {
		if _, err := api.FetchJWTSVID(ctx, tc.req); status.Code(err) != tc.want {
			t.Errorf("FetchJWTSVID with %s: %v; want %s", name, err, tc.want)
		}
	}
	if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "not.a.token"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("ValidateJWTSVID of rubbish: %v; want InvalidArgument", err)
	}
}

// Without an entry the answer is PermissionDenied, with the reason in it.
func TestStrangersAreDenied(t *testing.T) {
	d := stage.Dev(t)
	api := workload.NewSpiffeWorkloadAPIClient(dialSocket(t, d.WorkloadAPI))
	ctx := metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true")
	err := firstOf(api.FetchX509SVID(ctx, &workload.X509SVIDRequest{}))
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "explain identity") {
		t.Errorf("error = %v; want PermissionDenied that says how to go on", err)
	}
}

func TestPublicSocketReflectsItsServices(t *testing.T) {
	d := stage.Dev(t)
	cc := dialSocket(t, d.WorkloadAPI)
	stream, err := reflectionpb.NewServerReflectionClient(cc).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
	}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var services []string
	for _, s := range resp.GetListServicesResponse().GetService() {
		services = append(services, s.GetName())
	}
	for _, want := range []string{"SpiffeWorkloadAPI", "merlon.agent.v1.Local", "grpc.health.v1.Health"} {
		if !slices.Contains(services, want) {
			t.Errorf("services = %v; want %s among them", services, want)
		}
	}
	if slices.Contains(services, "merlon.agent.v1.Debug") {
		t.Error("the debug service is on the public socket")
	}
	health, err := healthpb.NewHealthClient(cc).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || health.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health = %v, %v; want SERVING", health.GetStatus(), err)
	}
}
