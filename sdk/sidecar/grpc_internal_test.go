// gRPC through both sidecars, with grpc-go at both ends: everything that a call can be
// comes through, and nothing that the policy does not allow.

package sidecar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
)

// grpcApp is an app that is a gRPC server without any identity of its own.
type grpcApp struct {
	testgrpc.UnimplementedTestServiceServer
	calls  atomic.Int64
	ended  atomic.Int64 // streams that have
	last   atomic.Pointer[metadata.MD]
	server *grpc.Server
	addr   string
}

func newGRPCApp(t testing.TB, opts ...grpc.ServerOption) *grpcApp {
	return newGRPCAppWith(t, func(*grpcApp) {}, opts...)
}

// newGRPCAppWith has register add services.
func newGRPCAppWith(t testing.TB, register func(*grpcApp), opts ...grpc.ServerOption) *grpcApp {
	lis := listen(t)
	a := &grpcApp{server: grpc.NewServer(opts...), addr: lis.Addr().String()}
	testgrpc.RegisterTestServiceServer(a.server, a)
	register(a)
	done := make(chan struct{})
	go func() { defer close(done); a.server.Serve(lis) }()
	t.Cleanup(func() { a.server.Stop(); <-done })
	return a
}

func (a *grpcApp) came(ctx context.Context) {
	a.calls.Add(1)
	md, _ := metadata.FromIncomingContext(ctx)
	a.last.Store(&md)
}

func (a *grpcApp) UnaryCall(ctx context.Context, req *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	a.came(ctx)
	if s := req.GetResponseStatus(); s != nil {
		return nil, status.Error(codes.Code(s.GetCode()), s.GetMessage())
	}
	grpc.SetHeader(ctx, metadata.Pairs("x-app", "head"))
	grpc.SetTrailer(ctx, metadata.Pairs("x-app", "tail", "x-app-bin", "\x00\xff"))
	return &testgrpc.SimpleResponse{Payload: &testgrpc.Payload{Body: append(req.GetPayload().GetBody(), make([]byte, req.GetResponseSize())...)}}, nil
}

// EmptyCall waits for its end.
func (a *grpcApp) EmptyCall(ctx context.Context, _ *testgrpc.Empty) (*testgrpc.Empty, error) {
	a.came(ctx)
	<-ctx.Done()
	a.ended.Add(1)
	return nil, ctx.Err()
}

func (a *grpcApp) StreamingOutputCall(req *testgrpc.StreamingOutputCallRequest, stream testgrpc.TestService_StreamingOutputCallServer) error {
	a.came(stream.Context())
	defer a.ended.Add(1)
	for _, p := range req.GetResponseParameters() {
		if err := stream.Send(&testgrpc.StreamingOutputCallResponse{Payload: &testgrpc.Payload{Body: make([]byte, p.GetSize())}}); err != nil {
			return err
		}
	}
	return nil
}

func (a *grpcApp) StreamingInputCall(stream testgrpc.TestService_StreamingInputCallServer) error {
	a.came(stream.Context())
	var sum int
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&testgrpc.StreamingInputCallResponse{AggregatedPayloadSize: int32(sum)})
		}
		if err != nil {
			return err
		}
		sum += len(req.GetPayload().GetBody())
	}
}

// FullDuplexCall sends back what comes.
func (a *grpcApp) FullDuplexCall(stream testgrpc.TestService_FullDuplexCallServer) error {
	a.came(stream.Context())
	defer a.ended.Add(1)
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := stream.Send(&testgrpc.StreamingOutputCallResponse{Payload: req.GetPayload()}); err != nil {
			return err
		}
	}
}

// grpcClient is a client without any identity of its own.
func grpcClient(t testing.TB, address string, opts ...grpc.DialOption) testgrpc.TestServiceClient {
	opts = append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))
	cc, err := grpc.NewClient("passthrough:///"+address, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return testgrpc.NewTestServiceClient(cc)
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func payload(n int) *testgrpc.Payload { return &testgrpc.Payload{Body: bytes.Repeat([]byte("x"), n)} }

func TestGRPCUnary(t *testing.T) {
	app := newGRPCApp(t)
	p := startPair(t, "grpc", app.addr)
	c := grpcClient(t, p.outbound.addrs[0])
	var head, tail metadata.MD
	ctx := metadata.AppendToOutgoingContext(within(t),
		"x-own", "1", "x-own", "2", "x-own-bin", "\x00\x01", "x-spiffe-id", "spiffe://sdktest.test/admin", "x-forwarded-client-cert", "URI=spiffe://sdktest.test/admin", "x_spiffe_id", "forged")
	reply, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{Payload: payload(10), ResponseSize: 5}, grpc.Header(&head), grpc.Trailer(&tail))
	if err != nil || len(reply.GetPayload().GetBody()) != 15 {
		t.Fatalf("UnaryCall = %v, %v", reply, err)
	}
	if fmt.Sprintf("%q %q %q", head["x-app"], tail["x-app"], tail["x-app-bin"]) != `["head"] ["tail"] ["\x00\xff"]` {
		t.Errorf("header %v, trailer %v", head, tail)
	}
	md := *app.last.Load()
	id := p.td.ID("web").String()
	if fmt.Sprintf("%q %q %q %q", md["x-own"], md["x-own-bin"], md["x-spiffe-id"], md["x_spiffe_id"]) != `["1" "2"] ["\x00\x01"] ["`+id+`"] []` {
		t.Errorf("the app saw %v", md)
	}
	if xfcc := md["x-forwarded-client-cert"]; len(xfcc) != 1 || !strings.HasSuffix(xfcc[0], ";URI="+id) {
		t.Errorf("x-forwarded-client-cert %q", xfcc)
	}
	_, err = c.UnaryCall(within(t), &testgrpc.SimpleRequest{ResponseStatus: &testgrpc.EchoStatus{Code: int32(codes.DataLoss), Message: "gone: ä%\n"}})
	if st := status.Convert(err); st.Code() != codes.DataLoss || st.Message() != "gone: ä%\n" {
		t.Errorf("status %v", st)
	}
	lines := p.inbound.logged(2)
	if l := lines[0]; l["source"] != id || l["path"] != "/grpc.testing.TestService/UnaryCall" || l["reason"] != string(policy.Allowed) || l["grpc_status"] != "0" || l["status"] != 200.0 {
		t.Errorf("access log: %v", l)
	}
	if l := lines[1]; l["grpc_status"] != "15" {
		t.Errorf("access log: %v", l)
	}
	p.outbound.logged(2)
}

func TestGRPCThatIsDeniedReachesNobody(t *testing.T) {
	app := newGRPCApp(t)
	for _, compiled := range []bool{false, true} {
		t.Run(fmt.Sprintf("compiled=%v", compiled), func(t *testing.T) {
			p := startPair(t, "grpc", app.addr)
			p.td.Deny("web", "orders")
			if compiled {
				p.td.CompilePolicy()
			}
			before := app.calls.Load()
			c := grpcClient(t, p.outbound.addrs[0])
			_, err := c.UnaryCall(within(t), &testgrpc.SimpleRequest{Payload: payload(100_000)})
			denied, ok := denial.FromStatus(err)
			if !ok || denied.Reason != policy.DenyRule || status.Code(err) != codes.PermissionDenied {
				t.Fatalf("err = %v", err)
			}
			if n := app.calls.Load() - before; n != 0 {
				t.Errorf("the app saw %d calls", n)
			}
			l := p.inbound.logged(1)[0]
			if l["reason"] != string(policy.DenyRule) || l["decision_id"] != denied.DecisionID || l["upstream"] != nil {
				t.Errorf("access log: %v", l)
			}
		})
	}
}

func TestGRPCStreams(t *testing.T) {
	app := newGRPCApp(t)
	p := startPair(t, "grpc", app.addr)
	c := grpcClient(t, p.outbound.addrs[0])
	ctx := within(t)

	both, err := c.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 { // one after the other: nothing waits for more
		if err := both.Send(&testgrpc.StreamingOutputCallRequest{Payload: payload(i)}); err != nil {
			t.Fatal(err)
		}
		if got, err := both.Recv(); err != nil || len(got.GetPayload().GetBody()) != i {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	both.CloseSend()
	if _, err := both.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("the stream's end: %v", err)
	}

	in, err := c.StreamingInputCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	sum := 0
	for i := range 100 {
		in.Send(&testgrpc.StreamingInputCallRequest{Payload: payload(1000 * i)})
		sum += 1000 * i
	}
	if got, err := in.CloseAndRecv(); err != nil || int(got.GetAggregatedPayloadSize()) != sum {
		t.Errorf("%v, %v; want %d", got, err, sum)
	}

	out, err := c.StreamingOutputCall(ctx, &testgrpc.StreamingOutputCallRequest{ResponseParameters: parameters(100, 30_000)})
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n++ {
		got, err := out.Recv()
		if errors.Is(err, io.EOF) && n == 100 {
			break
		}
		if err != nil || len(got.GetPayload().GetBody()) != 30_000 {
			t.Fatalf("message %d: %v", n, err)
		}
	}
}

func parameters(n, size int) (all []*testgrpc.ResponseParameters) {
	for range n {
		all = append(all, &testgrpc.ResponseParameters{Size: int32(size)})
	}
	return all
}

func TestGRPCLargeMessages(t *testing.T) {
	app := newGRPCApp(t, grpc.MaxRecvMsgSize(64<<20))
	p := startPair(t, "grpc", app.addr)
	c := grpcClient(t, p.outbound.addrs[0], grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	want := payload(20 << 20)
	for i := range want.GetBody() {
		want.Body[i] = byte(i * 7 >> 3)
	}
	got, err := c.UnaryCall(within(t), &testgrpc.SimpleRequest{Payload: want})
	if err != nil || !bytes.Equal(got.GetPayload().GetBody(), want.GetBody()) {
		t.Fatalf("20 MiB there and back: %v", err)
	}
}

func TestGRPCDeadlineAndCancellation(t *testing.T) {
	app := newGRPCApp(t)
	p := startPair(t, "grpc", app.addr)
	c := grpcClient(t, p.outbound.addrs[0])
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if _, err := c.EmptyCall(ctx, &testgrpc.Empty{}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("err = %v", err)
	}
	await(t, "the app to see the deadline", func() bool { return app.ended.Load() == 1 })
	ctx, cancel = context.WithCancel(context.Background())
	go func() {
		await(t, "the call", func() bool { return app.calls.Load() == 2 })
		cancel()
	}()
	if _, err := c.EmptyCall(ctx, &testgrpc.Empty{}); status.Code(err) != codes.Canceled {
		t.Errorf("err = %v", err)
	}
	await(t, "the app to see the cancellation", func() bool { return app.ended.Load() == 2 })
	for _, l := range p.inbound.logged(2) {
		if l["reason"] != string(policy.Allowed) {
			t.Errorf("access log: %v", l)
		}
	}
}

// A caller that does not read its stream holds up neither others nor, for good, itself.
func TestGRPCSlowReader(t *testing.T) {
	app := newGRPCApp(t)
	p := startPair(t, "grpc", app.addr)
	// Else gRPC makes the window as large as what it measures, up to 16 MB for a stream.
	slow := grpcClient(t, p.outbound.addrs[0], grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))
	var streams []testgrpc.TestService_StreamingOutputCallClient
	for range 20 { // more than a connection's window is held back
		s, err := slow.StreamingOutputCall(within(t), &testgrpc.StreamingOutputCallRequest{ResponseParameters: parameters(100, 20_000)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
	}
	quick := grpcClient(t, p.outbound.addrs[0])
	for range 100 {
		if _, err := quick.UnaryCall(within(t), &testgrpc.SimpleRequest{ResponseSize: 10_000}); err != nil {
			t.Fatal(err)
		}
	}
	if n := app.ended.Load(); n != 0 {
		t.Errorf("%d streams of 2 MB ended that nobody reads", n)
	}
	for i, s := range streams {
		for n := 1; ; n++ {
			_, err := s.Recv()
			if errors.Is(err, io.EOF) && n == 100 {
				break
			}
			if err != nil {
				t.Fatalf("stream %d, message %d: %v", i, n, err)
			}
		}
	}
}

func TestGRPC1000StreamsAtOnce(t *testing.T) {
	app := newGRPCApp(t)
	p := startPairWith(t, "grpc", app.addr, func(c *Config) { c.MaxStreams = 1000 })
	p.td.CompilePolicy() // a loaded machine's agent does not answer a thousand questions in time
	await(t, "the compiled policy", p.inbound.sidecar.id.DecidesHere)
	c := grpcClient(t, p.outbound.addrs[0])
	ctx := within(t)
	streams := make([]testgrpc.TestService_FullDuplexCallClient, 1000)
	var all sync.WaitGroup
	for i := range streams {
		s, err := c.FullDuplexCall(ctx)
		if err != nil {
			t.Fatal(err)
		}
		streams[i] = s
	}
	for round := range 3 {
		for i, s := range streams {
			all.Go(func() {
				if err := s.Send(&testgrpc.StreamingOutputCallRequest{Payload: payload(i)}); err != nil {
					t.Errorf("stream %d: %v", i, err)
				} else if got, err := s.Recv(); err != nil || len(got.GetPayload().GetBody()) != i {
					t.Errorf("stream %d, round %d: %v", i, round, err)
				}
			})
		}
		all.Wait()
	}
	if n := app.calls.Load(); n != 1000 {
		t.Errorf("the app saw %d calls", n)
	}
}

func TestGRPCStreamEndsWhenItsGroundGoes(t *testing.T) {
	for name, tt := range map[string]struct {
		remove func(p *pair)
		code   codes.Code
	}{
		"policy":     {func(p *pair) { p.td.Deny("web", "orders") }, codes.PermissionDenied},
		"revocation": {func(p *pair) { p.td.Revoke("web") }, codes.Unavailable},
		"root":       {func(p *pair) { p.td.RemoveRoot() }, codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			app := newGRPCApp(t)
			p := startPair(t, "grpc", app.addr)
			c := grpcClient(t, p.outbound.addrs[0])
			s, err := c.FullDuplexCall(within(t))
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Send(&testgrpc.StreamingOutputCallRequest{Payload: payload(1)}); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			tt.remove(p)
			_, err = s.Recv()
			if status.Code(err) != tt.code {
				t.Errorf("err = %v; want %v", err, tt.code)
			}
			if tt.code == codes.PermissionDenied {
				if denied, ok := denial.FromStatus(err); !ok || denied.Reason != policy.DenyRule {
					t.Errorf("err = %v", err)
				}
			}
			await(t, "the app's stream to end", func() bool { return app.ended.Load() == 1 })
		})
	}
}

func TestGRPCWithoutAnApp(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lis.Close() // nobody listens there
	p := startPair(t, "grpc", lis.Addr().String())
	c := grpcClient(t, p.outbound.addrs[0])
	if _, err := c.UnaryCall(within(t), &testgrpc.SimpleRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("err = %v", err)
	}
	if l := p.inbound.logged(1)[0]; l["err"] == nil || l["reason"] != string(policy.Allowed) {
		t.Errorf("access log: %v", l)
	}
}
