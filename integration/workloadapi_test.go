// The Workload API by the letter of the standard, from outside (SECURITY.md E1 to
// E3, E6 to E10, E12 to E18, E20, W15): metadata on every RPC, what is in an
// answer, reflection, error codes.

package integration_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

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

// W15, E6: what the agent does not offer is said to be unknown, once the header
// is there.
func TestWITAndUnknownCallsAreUnimplemented(t *testing.T) {
	d := stage.Dev(t)
	d.Entry("/me")
	cc := dialSocket(t, d.WorkloadAPI)
	api := workload.NewSpiffeWorkloadAPIClient(cc)
	withHeader := metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true")
	for name, call := range map[string]func(context.Context) error{
		"FetchWITSVID": func(ctx context.Context) error { return firstOf(api.FetchWITSVID(ctx, &workload.WITSVIDRequest{})) },
		"FetchWITBundles": func(ctx context.Context) error {
			return firstOf(api.FetchWITBundles(ctx, &workload.WITBundlesRequest{}))
		},
		"a method that there is not": func(ctx context.Context) error {
			return cc.Invoke(ctx, "/SpiffeWorkloadAPI/FetchSSHSVID", &workload.JWTSVIDRequest{}, &workload.JWTSVIDResponse{})
		},
		"a service that there is not": func(ctx context.Context) error {
			return cc.Invoke(ctx, "/spiffe.Workload/FetchJWTSVID", &workload.JWTSVIDRequest{}, &workload.JWTSVIDResponse{})
		},
	} {
		if err := call(withHeader); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s = %v; want Unimplemented", name, err)
		}
	}
}

// E7, E20: the service has the standard's name, without a package, and exactly
// its calls. What is Merlon's own is in other services.
func TestWorkloadAPIIsNotExtended(t *testing.T) {
	d := stage.Dev(t)
	stream, err := reflectionpb.NewServerReflectionClient(dialSocket(t, d.WorkloadAPI)).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "SpiffeWorkloadAPI"},
	}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	calls := map[string]bool{} // name → is a stream
	for _, raw := range resp.GetFileDescriptorResponse().GetFileDescriptorProto() {
		var file descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(raw, &file); err != nil {
			t.Fatal(err)
		}
		for _, service := range file.GetService() {
			if service.GetName() != "SpiffeWorkloadAPI" || file.GetPackage() != "" {
				t.Errorf("service %s.%s beside the standard's", file.GetPackage(), service.GetName())
			}
			for _, m := range service.GetMethod() {
				calls[m.GetName()] = m.GetServerStreaming()
			}
		}
	}
	want := map[string]bool{
		"FetchX509SVID": true, "FetchX509Bundles": true, "FetchJWTSVID": false, "FetchJWTBundles": true,
		"ValidateJWTSVID": false, "FetchWITSVID": true, "FetchWITBundles": true,
	}
	if !maps.Equal(calls, want) {
		t.Errorf("calls = %v; want the standard's %v", calls, want)
	}
}

// E3, E9, E10, E13, E14, E18: a client without any of our code gets every
// identity at once, in the order of registration, whole, each hint once.
func TestAnswersAreWhole(t *testing.T) {
	d := stage.Dev(t)
	d.Entry("/first", "--hint", "internal")
	d.Entry("/second", "--hint", "internal")
	d.Entry("/third", "--hint", "external")
	cc, err := grpc.NewClient("unix:"+strings.TrimPrefix(d.WorkloadAPI, "unix://"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	api := workload.NewSpiffeWorkloadAPIClient(cc)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true")
	stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range m.GetSvids() {
		got = append(got, s.GetSpiffeId()+" "+s.GetHint())
		checkX509SVID(t, s)
	}
	want := []string{d.ID("/first") + " internal", d.ID("/second") + " ", d.ID("/third") + " external"}
	if !slices.Equal(got, want) {
		t.Errorf("SVIDs and hints = %q; want %q", got, want)
	}
	jwts, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"orders"}})
	if err != nil {
		t.Fatal(err)
	}
	got = nil
	for _, s := range jwts.GetSvids() {
		got = append(got, s.GetSpiffeId()+" "+s.GetHint())
	}
	if !slices.Equal(got, want) {
		t.Errorf("JWT-SVIDs and hints = %q; want %q", got, want)
	}
	checkBundles(ctx, t, d, api)
}

// checkX509SVID reads one as the standard has it: leaf first, PKCS#8 key of the
// leaf, trust bundle of its own trust domain.
func checkX509SVID(t *testing.T, s *workload.X509SVID) {
	t.Helper()
	chain, err := x509.ParseCertificates(s.GetX509Svid())
	if err != nil || len(chain) == 0 {
		t.Fatalf("X509-SVID: %d certificates, %v", len(chain), err)
	}
	key, err := x509.ParsePKCS8PrivateKey(s.GetX509SvidKey())
	if err != nil {
		t.Fatalf("key: %v", err)
	}
	public, ok := key.(*ecdsa.PrivateKey)
	if !ok || !public.PublicKey.Equal(chain[0].PublicKey) {
		t.Errorf("the key of %s is not that of the first certificate", s.GetSpiffeId())
	}
	if len(chain[0].URIs) != 1 || chain[0].URIs[0].String() != s.GetSpiffeId() {
		t.Errorf("the first certificate is of %v; want %s", chain[0].URIs, s.GetSpiffeId())
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	bundle, err := x509.ParseCertificates(s.GetBundle())
	if err != nil || len(bundle) == 0 {
		t.Fatalf("trust bundle: %d certificates, %v", len(bundle), err)
	}
	for _, c := range bundle {
		roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Errorf("%s does not verify with its trust bundle: %v", s.GetSpiffeId(), err)
	}
}

// checkBundles: at least the own trust domain's, under its SPIFFE ID, and JWT
// keys only among JWT keys.
func checkBundles(ctx context.Context, t *testing.T, d *stage.Domain, api workload.SpiffeWorkloadAPIClient) {
	t.Helper()
	x509s, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := x509s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if roots, err := x509.ParseCertificates(m.GetBundles()[d.ID("")]); err != nil || len(roots) == 0 {
		t.Errorf("X.509 trust bundles = %d, %d roots of %s, %v", len(m.GetBundles()), len(roots), d.ID(""), err)
	}
	jwts, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	j, err := jwts.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Keys []struct {
			Use string `json:"use"`
			Kid string `json:"kid"`
		} `json:"keys"`
	}
	if err := json.Unmarshal(j.GetBundles()[d.ID("")], &set); err != nil || len(set.Keys) == 0 {
		t.Fatalf("JWT trust bundle: %d keys, %v", len(set.Keys), err)
	}
	for _, key := range set.Keys {
		if key.Use != "jwt-svid" || key.Kid == "" {
			t.Errorf("a key %q for %q is among the JWT keys; want only those for jwt-svid, with an ID", key.Kid, key.Use)
		}
	}
}

// E1: nothing of the agent but its health listens on a network.
func TestTheWorkloadAPIIsOnNoNetwork(t *testing.T) {
	d := stage.Separate(t)
	stage.Eventually(t, "the agent listens", func() error {
		ports := listening(t, d.Agent.PID())
		if len(ports) != 1 || ports[0] != d.AgentHealth {
			return fmt.Errorf("the agent listens on %v; want %s alone", ports, d.AgentHealth)
		}
		return nil
	})
}

// listening are the TCP ports on which a process listens, of whatever address.
func listening(t *testing.T, pid int) (ports []string) {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	inodes := map[string]bool{}
	for _, fd := range fds {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()))
		if inode, ok := strings.CutPrefix(link, "socket:["); ok && err == nil {
			inodes[strings.TrimSuffix(inode, "]")] = true
		}
	}
	const listens = "0A"
	for _, table := range []string{"tcp", "tcp6"} {
		content, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(content)) {
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != listens || !inodes[f[9]] {
				continue
			}
			_, hex, _ := strings.Cut(f[1], ":")
			port, err := strconv.ParseUint(hex, 16, 16)
			if err != nil {
				t.Fatal(err)
			}
			ports = append(ports, fmt.Sprintf("127.0.0.1:%d", port))
		}
	}
	return ports
}
