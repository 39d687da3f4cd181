// Calls under way when the policy changes.

package grpcauth_test

import (
	"context"
	"errors"
	"io"
	"runtime"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// slow has handlers that last until they are told, and say how they ended.
type slow struct {
	testgrpc.UnimplementedTestServiceServer
	begun chan struct{}
	ended chan error
}

func (s *slow) UnaryCall(ctx context.Context, _ *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	s.begun <- struct{}{}
	<-ctx.Done()
	s.ended <- context.Cause(ctx)
	return &testgrpc.SimpleResponse{Username: "what nobody may see"}, nil
}

// FullDuplexCall waits for its client.
func (s *slow) FullDuplexCall(stream testgrpc.TestService_FullDuplexCallServer) error {
	s.begun <- struct{}{}
	_, err := stream.Recv()
	s.ended <- err
	return nil
}

// StreamingOutputCall sends without end.
func (s *slow) StreamingOutputCall(_ *testgrpc.StreamingOutputCallRequest, stream testgrpc.TestService_StreamingOutputCallServer) error {
	s.begun <- struct{}{}
	for {
		if err := stream.Send(&testgrpc.StreamingOutputCallResponse{}); err != nil {
			s.ended <- err
			return nil
		}
		time.Sleep(time.Millisecond)
	}
}

// A policy that stops allowing a call ends it, in the service by itself and by the
// agent's word.
func TestPolicyEndsCallsUnderWay(t *testing.T) {
	calls := map[string]func(context.Context, testgrpc.TestServiceClient) error{
		"a long call": func(ctx context.Context, c testgrpc.TestServiceClient) error {
			_, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{})
			return err
		},
		"a stream that waits": func(ctx context.Context, c testgrpc.TestServiceClient) error {
			s, err := c.FullDuplexCall(ctx)
			if err == nil {
				_, err = s.Recv()
			}
			return err
		},
		"a stream that sends": func(ctx context.Context, c testgrpc.TestServiceClient) error {
			s, err := c.StreamingOutputCall(ctx, &testgrpc.StreamingOutputCallRequest{})
			for err == nil {
				_, err = s.Recv()
			}
			return err
		},
	}
	for name, call := range calls {
		for how, compiled := range map[string]bool{"compiled": true, "by the agent": false} {
			t.Run(name+", "+how, func(t *testing.T) {
				td := sdktest.New(t)
				td.Allow("web", "orders")
				td.Allow("cart", "orders")
				if compiled {
					td.CompilePolicy()
				}
				s := &slow{begun: make(chan struct{}, 2), ended: make(chan error, 2)}
				address := startService(t, td.Workload("orders"), s)
				got := make(chan error, 2)
				other, stopOther := context.WithCancel(limited(t))
				go func() { got <- call(limited(t), connect(t, td.Workload("web"), sdk.Service("orders"), address)) }()
				<-s.begun
				go func() { got <- call(other, connect(t, td.Workload("cart"), sdk.Service("orders"), address)) }()
				<-s.begun
				td.Deny("web", "orders")
				wantDenied(t, <-got, policy.DenyRule)
				if err := <-s.ended; status.Code(err) != codes.PermissionDenied {
					t.Errorf("the handler ended with %v; want the denial", err)
				}
				// Nobody else's call ends.
				td.Allow("eve", "orders")
				select {
				case err := <-got:
					t.Errorf("the call of another ended: %v", err)
				case <-time.After(50 * time.Millisecond):
				}
				stopOther()
				if err := <-got; status.Code(err) != codes.Canceled {
					t.Errorf("the call of another: %v", err)
				}
			})
		}
	}
}

// A client that does not read cannot hold a stream open: its connection is cut.
func TestPolicyEndsAStreamThatNobodyReads(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	s := &slow{begun: make(chan struct{}, 1), ended: make(chan error, 1)}
	c := connect(t, td.Workload("web"), sdk.Service("orders"), startService(t, td.Workload("orders"), &floods{slow: s}))
	stream, err := c.StreamingOutputCall(limited(t), &testgrpc.StreamingOutputCallRequest{})
	if err != nil {
		t.Fatal(err)
	}
	<-s.begun
	td.Deny("web", "orders")
	<-s.ended
	for err == nil {
		_, err = stream.Recv() // what came before
	}
	if code := status.Code(err); errors.Is(err, io.EOF) || code != codes.PermissionDenied && code != codes.Unavailable {
		t.Errorf("the stream ended with %v", err)
	}
}

// floods sends more than anybody holds.
type floods struct{ *slow }

func (s *floods) StreamingOutputCall(_ *testgrpc.StreamingOutputCallRequest, stream testgrpc.TestService_StreamingOutputCallServer) error {
	s.begun <- struct{}{}
	for {
		if err := stream.Send(&testgrpc.StreamingOutputCallResponse{Payload: &testgrpc.Payload{Body: make([]byte, 1<<20)}}); err != nil {
			s.ended <- err
			return nil
		}
	}
}

// What a handler panics with is the server's business, as without us.
func TestPanicsAreTheServers(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	caught := make(chan any, 1)
	address := startService(t, td.Workload("orders"), &panics{}, recovering(caught))
	stream, err := connect(t, td.Workload("web"), sdk.Service("orders"), address).FullDuplexCall(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Internal {
		t.Errorf("Recv = %v", err)
	}
	if text, ok := (<-caught).(string); !ok || len(text) < len("boom\n\ngoroutine") || text[:4] != "boom" {
		t.Errorf("the server caught %q", text)
	}
}

type panics struct {
	testgrpc.UnimplementedTestServiceServer
}

func (*panics) FullDuplexCall(testgrpc.TestService_FullDuplexCallServer) error { panic("boom") }

// A handler that ends its goroutine, as tests in it do that fail, has not answered.
func TestGoexitIsNoWholeAnswer(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	address := startService(t, td.Workload("orders"), &exits{})
	stream, err := connect(t, td.Workload("web"), sdk.Service("orders"), address).FullDuplexCall(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Internal {
		t.Errorf("Recv = %v; want Internal", err)
	}
}

type exits struct {
	testgrpc.UnimplementedTestServiceServer
}

func (*exits) FullDuplexCall(testgrpc.TestService_FullDuplexCallServer) error {
	runtime.Goexit()
	return nil
}

// recovering turns a panic into an error, and keeps what it was.
func recovering(caught chan<- any) grpc.ServerOption {
	return grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
		defer func() {
			if r := recover(); r != nil {
				caught <- r
				err = status.Error(codes.Internal, "it panicked")
			}
		}()
		return next(srv, stream)
	})
}
