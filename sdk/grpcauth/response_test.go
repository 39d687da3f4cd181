// What a policy has sent beside its decision arrives over gRPC, too.

package grpcauth_test

import (
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

func TestAllowedCallsCarryWhatThePolicyAdds(t *testing.T) {
	td := sdktest.New(t)
	td.Decide(func(*policy.Input) policy.Decision {
		return policy.Decision{Allow: true, Reason: policy.Allowed, Response: &policy.Response{
			Headers:         []policy.HeaderField{{Name: "x-role", Value: "reader"}},
			ResponseHeaders: []policy.HeaderField{{Name: "x-policy", Value: "seen"}},
			RemoveHeaders:   []string{"x-debug"},
		}}
	})
	s := &service{md: make(chan metadata.MD, 1)}
	c := connect(t, td.Workload("web"), sdk.Service("orders"), start(t, td.Workload("orders"), s))
	var header metadata.MD
	ctx := metadata.AppendToOutgoingContext(limited(t), "x-role", "admin", "x-debug", "1", "x-other", "o")
	if _, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{}, grpc.Header(&header)); err != nil {
		t.Fatal(err)
	}
	md := <-s.md
	if got := md.Get("x-role"); len(got) != 1 || got[0] != "reader" || len(md.Get("x-debug")) > 0 || len(md.Get("x-other")) != 1 {
		t.Errorf("the handler saw %v", md)
	}
	if got := header.Get("x-policy"); len(got) != 1 || got[0] != "seen" {
		t.Errorf("the caller saw %v", header)
	}
}

func TestDenialsHaveThePolicysCode(t *testing.T) {
	td := sdktest.New(t)
	var response *policy.Response
	td.Decide(func(*policy.Input) policy.Decision {
		return policy.Decision{Reason: policy.NoGrant, Response: response}
	})
	s := &service{}
	c := connect(t, td.Workload("web"), sdk.Service("orders"), start(t, td.Workload("orders"), s))
	for httpStatus, want := range map[int]codes.Code{
		0: codes.PermissionDenied, 200: codes.PermissionDenied, 302: codes.PermissionDenied, 400: codes.InvalidArgument, 401: codes.Unauthenticated,
		403: codes.PermissionDenied, 404: codes.NotFound, 418: codes.PermissionDenied, 429: codes.ResourceExhausted, 500: codes.Internal,
		501: codes.Unimplemented, 503: codes.Unavailable, 504: codes.DeadlineExceeded,
	} {
		response = &policy.Response{Status: httpStatus, Body: "log in\nfirst", Headers: []policy.HeaderField{{Name: "x-login", Value: "there"}}}
		var header metadata.MD
		_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.Header(&header))
		if got := status.Code(err); got != want {
			t.Errorf("http_status %d is %v; want %v", httpStatus, got, want)
		}
		denied, ok := sdk.DeniedFromStatus(err)
		if !ok || denied.Status != httpStatus || denied.Message != "log in\nfirst" || denied.Reason != policy.NoGrant {
			t.Errorf("%v: %+v", err, denied)
		}
		if got := header.Get("x-login"); len(got) != 1 || got[0] != "there" {
			t.Errorf("the caller saw %v", header)
		}
	}
	if s.calls.Load() > 0 {
		t.Error("a denied call was served")
	}
}
