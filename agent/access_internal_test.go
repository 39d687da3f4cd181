// Deny by default: nothing is served on the public socket that is not listed.

package agent

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/endpoint"
)

func TestEveryRPCOfThePublicSocketIsListed(t *testing.T) {
	dir := t.TempDir()
	a, err := New(Config{
		TrustDomain: "example.test", CAAddress: Addresses{"127.0.0.1:1"}, DataDir: filepath.Join(dir, "data"),
		PublicSocket: filepath.Join(dir, "public", "api.sock"), AdminSocket: filepath.Join(dir, "admin", "admin.sock"),
		JoinToken: "token", RootHash: strings.Repeat("0", 64), Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer a.attestor.Close()
	served := map[string]bool{}
	for service, info := range a.publicServer(endpoint.NewLimit(maxConnectionsPerUser)).GetServiceInfo() {
		for _, m := range info.Methods {
			served["/"+service+"/"+m.Name] = true
		}
	}
	admitted := func(method string) codes.Code {
		_, err := endpoint.Unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: method}, func(_ context.Context, _ any) (any, error) { return nil, nil })
		return status.Code(err)
	}
	for method := range served {
		// Without the header that most ask for.
		if code := admitted(method); code != codes.OK && code != codes.InvalidArgument {
			t.Errorf("%s: %v; it is not listed", method, code)
		}
	}
	for _, method := range []string{"/merlon.agent.v1.Debug/ExplainDecision", "/envoy.service.auth.v3.Authorization/Other", ""} {
		if code := admitted(method); code != codes.PermissionDenied {
			t.Errorf("%q, which is not listed: %v; want PermissionDenied", method, code)
		}
	}
	if !served["/envoy.service.auth.v3.Authorization/Check"] || len(served) < 20 {
		t.Errorf("%d methods are served; Check: %v", len(served), served["/envoy.service.auth.v3.Authorization/Check"])
	}
}
