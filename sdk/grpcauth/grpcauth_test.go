// Every call is decided, its method being the bytes that were sent, and the
// streams of a revoked peer end.

package grpcauth_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	"merlon.dev/sdk/sdktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// service counts its calls and answers who the caller is.
type service struct {
	testgrpc.UnimplementedTestServiceServer
	calls atomic.Int32
	md    chan metadata.MD // if not nil: the metadata that handlers see
}

func (s *service) UnaryCall(ctx context.Context, _ *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	s.calls.Add(1)
	peer, ok := sdk.PeerFromContext(ctx)
	decision, decided := sdk.DecisionFromContext(ctx)
	if !ok || !decided || !decision.Allow {
		return nil, status.Error(codes.Internal, "no peer or decision")
	}
	if s.md != nil {
		md, _ := metadata.FromIncomingContext(ctx)
		s.md <- md
	}
	return &testgrpc.SimpleResponse{Username: peer.ID.String()}, nil
}

func (s *service) FullDuplexCall(stream testgrpc.TestService_FullDuplexCallServer) error {
	s.calls.Add(1)
	if _, ok := sdk.PeerFromContext(stream.Context()); !ok {
		return status.Error(codes.Internal, "no peer")
	}
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		if err := stream.Send(&testgrpc.StreamingOutputCallResponse{}); err != nil {
			return err
		}
	}
}

func start(t testing.TB, id *sdk.Identity, s *service) string {
	t.Helper()
	return startService(t, id, s, grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
		s.calls.Add(1)
		return nil
	}))
}

// startService serves s behind options that stand in front of ours.
func startService(t testing.TB, id *sdk.Identity, s testgrpc.TestServiceServer, before ...grpc.ServerOption) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(append(before, grpcauth.ServerOptions(id)...)...)
	testgrpc.RegisterTestServiceServer(srv, s)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(lis) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return lis.Addr().String()
}

func connect(t testing.TB, id *sdk.Identity, to sdk.Target, address string) testgrpc.TestServiceClient {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+address, grpcauth.DialOptions(id, to)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return testgrpc.NewTestServiceClient(cc)
}

func limited(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// T19: a connection is not a permission.
func TestEachCallOnOneConnectionIsDecided(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	s := &service{}
	c := connect(t, td.Workload("web"), sdk.Service("orders"), start(t, td.Workload("orders"), s))
	res, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
	if err != nil || res.GetUsername() != "spiffe://sdktest.test/web" {
		t.Fatalf("UnaryCall = %v, %v", res, err)
	}
	td.Deny("web", "orders")
	_, err = c.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
	wantDenied(t, err, policy.DenyRule)
	stream, err := c.FullDuplexCall(limited(t))
	if err == nil {
		_, err = stream.Recv()
	}
	wantDenied(t, err, policy.DenyRule)
	td.Forget("web", "orders")
	_, err = c.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
	wantDenied(t, err, policy.NoGrant)
	if n := s.calls.Load(); n != 1 {
		t.Errorf("%d calls were served; want 1", n)
	}
	td.Allow("web", "orders")
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); err != nil {
		t.Errorf("allowed again: %v", err)
	}
}

// Also one of an agent that is newer than the service.
func TestEveryReasonReachesTheCaller(t *testing.T) {
	td := sdktest.New(t)
	c := connect(t, td.Workload("web"), sdk.Service("orders"), start(t, td.Workload("orders"), &service{}))
	for _, reason := range append(policy.Reasons(), "SOMETHING_NEW") {
		if reason == policy.Allowed {
			continue
		}
		td.Decide(func(*policy.Input) policy.Decision { return policy.Decision{Reason: reason} })
		_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
		wantDenied(t, err, reason)
	}
}

func wantDenied(t *testing.T, err error, reason policy.Reason) {
	t.Helper()
	var denied *sdk.DeniedError
	if !errors.As(err, &denied) {
		t.Fatalf("%v; want a *sdk.DeniedError", err)
	}
	if denied.Reason != reason || len(denied.DecisionID) != 24 || denied.Hint == "" {
		t.Errorf("%+v; want reason %s, a decision ID and a hint", denied, reason)
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("status %v; want PermissionDenied", status.Code(err))
	}
}

func TestDenialIsAnErrorInfoOnTheWire(t *testing.T) {
	td := sdktest.New(t)
	address := start(t, td.Workload("orders"), &service{})
	web := td.Workload("web")
	// A client of another make: only the TLS is ours.
	cc, err := grpc.NewClient("passthrough:///"+address, grpcauth.DialOptions(web, sdk.Service("orders"))[0])
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	_, err = testgrpc.NewTestServiceClient(cc).UnaryCall(limited(t), &testgrpc.SimpleRequest{})
	st := status.Convert(err)
	if st.Code() != codes.PermissionDenied || len(st.Details()) != 1 {
		t.Fatalf("%v %v", st, st.Details())
	}
	info, ok := st.Details()[0].(*errdetails.ErrorInfo)
	if !ok || info.GetReason() != "NO_GRANT" || info.GetDomain() != "merlon.dev" || info.GetMetadata()["decision_id"] == "" || info.GetMetadata()["hint"] == "" {
		t.Errorf("details: %v", info)
	}
}

// T13, T16.
func TestPolicySeesMetadataAndHandlersNoForgedIdentity(t *testing.T) {
	td := sdktest.New(t)
	seen := make(chan *policy.Input, 1)
	td.Decide(func(in *policy.Input) policy.Decision {
		seen <- in
		return policy.Decision{Allow: true, Reason: policy.Allowed}
	})
	s := &service{md: make(chan metadata.MD, 1)}
	address := start(t, td.Workload("orders"), s)
	c := connect(t, td.Workload("web"), sdk.Service("orders"), address)
	ctx := metadata.AppendToOutgoingContext(limited(t),
		"x-role", "a", "X-Role", "b", "x-spiffe-id", "spiffe://sdktest.test/admin", "x_forwarded_client_cert", "c", "x-bin", "\xff\x00")
	if _, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{}); err != nil {
		t.Fatal(err)
	}
	got := <-seen
	for _, name := range []string{"content-type", "user-agent", "grpc-accept-encoding"} {
		delete(got.HeaderMap(), name)
	}
	want := &policy.Input{
		Source: "spiffe://sdktest.test/web", Destination: "spiffe://sdktest.test/orders",
		Protocol: policy.GRPC, Method: "POST", Path: "/grpc.testing.TestService/UnaryCall", Host: address,
		Headers:            policy.HeaderMap{"x-role": {"a", "b"}, "x-bin": {"/wA"}},
		SourceAddress:      got.SourceAddress,
		DestinationAddress: address,
		SourceSerial:       got.SourceSerial,
	}
	if !cmp.Equal(got, want) || got.SourceAddress == "" || got.SourceSerial == "" {
		t.Errorf("the policy saw (-got +want):\n%s", cmp.Diff(got, want))
	}
	md := <-s.md
	if len(md["x-spiffe-id"])+len(md["x_forwarded_client_cert"]) > 0 || len(md["x-role"]) != 2 || len(md["x-bin"]) != 1 || md["x-bin"][0] != "\xff\x00" {
		t.Errorf("the handler saw %v", md)
	}
}

// open starts a stream and sees it work.
func open(t *testing.T, c testgrpc.TestServiceClient) testgrpc.TestService_FullDuplexCallClient {
	t.Helper()
	stream, err := c.FullDuplexCall(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&testgrpc.StreamingOutputCallRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	return stream
}

func TestStreamsAreCut(t *testing.T) {
	for name, event := range map[string]func(*sdktest.TD){
		"client revoked": func(td *sdktest.TD) { td.Revoke("web") },
		"server revoked": func(td *sdktest.TD) { td.Revoke("orders") },
		"root removed":   func(td *sdktest.TD) { td.RemoveRoot() },
	} {
		t.Run(name, func(t *testing.T) {
			td := sdktest.New(t)
			td.Allow("web", "orders")
			c := connect(t, td.Workload("web"), sdk.Service("orders"), start(t, td.Workload("orders"), &service{}))
			stream := open(t, c)
			start := time.Now()
			event(td)
			_, err := stream.Recv() // ends after 20 s by its deadline, if nothing cuts it
			if status.Code(err) != codes.Unavailable {
				t.Errorf("Recv = %v; want Unavailable, from the cut", err)
			}
			t.Logf("cut after %v", time.Since(start))
		})
	}
}

func TestExpiryCutsAStream(t *testing.T) {
	t.Parallel()
	td := sdktest.New(t)
	td.Allow("web", "orders")
	orders := td.Workload("orders")
	td.SetTTL(3 * time.Second)
	web := td.Workload("web")
	own, err := web.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	stream := open(t, connect(t, web, sdk.Service("orders"), start(t, orders, &service{})))
	_, err = stream.Recv()
	if early := time.Until(own.Certificates[0].NotAfter); status.Code(err) != codes.Unavailable || early > 0 {
		t.Errorf("Recv = %v, %v before expiry; want Unavailable after it", err, early)
	}
}

func TestAgentAwayDeniesAndBackWorks(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	c := connect(t, td.Workload("web"), sdk.Service("orders"), start(t, td.Workload("orders"), &service{}))
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); err != nil {
		t.Fatal(err)
	}
	td.StopAgent("orders")
	_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
	wantDenied(t, err, policy.AgentUnavailable)
	td.StartAgent("orders")
	eventually(t, "calls work again", func() bool {
		_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
		return err == nil
	})
}

func TestClientAcceptsNoOtherServer(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	s := &service{}
	address := start(t, td.Workload("orders"), s)
	web := td.Workload("web")
	for name, to := range map[string]sdk.Target{"zero": {}, "other": sdk.Service("refunds"), "malformed": sdk.ID("orders")} {
		if _, err := connect(t, web, to, address).UnaryCall(limited(t), &testgrpc.SimpleRequest{}); err == nil {
			t.Errorf("%s target: connected", name)
		}
	}
	if n := s.calls.Load(); n != 0 {
		t.Errorf("%d calls were served", n)
	}
}

func TestServerNeedsOurCredentials(t *testing.T) {
	td := sdktest.New(t)
	td.Decide(func(*policy.Input) policy.Decision { return policy.Decision{Allow: true, Reason: policy.Allowed} })
	own := td.SVID("orders")
	lis, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert, NextProtos: []string{"h2"},
		Certificates: []tls.Certificate{{Certificate: [][]byte{own.Certificates[0].Raw}, PrivateKey: own.PrivateKey}},
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpcauth.ServerOptions(td.Workload("orders"))[1:]...) // all but the credentials
	s := &service{}
	testgrpc.RegisterTestServiceServer(srv, s)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(lis) }()
	defer func() { srv.Stop(); <-done }()
	_, err = connect(t, td.Workload("web"), sdk.Service("orders"), lis.Addr().String()).UnaryCall(limited(t), &testgrpc.SimpleRequest{})
	wantDenied(t, err, policy.NoIdentity)
	if s.calls.Load() != 0 {
		t.Error("the call was served")
	}
}
