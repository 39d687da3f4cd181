// A connection that is used again carries nobody else's authority: not to another
// server, not of another caller in the same process, not past a change of the policy.

package grpcauth_test

import (
	"errors"
	"sync"
	"testing"

	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

func TestReuseNeverCrossesTargets(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.Allow("web", "refunds")
	s := &service{}
	address := start(t, td.Workload("orders"), s)
	web := td.Workload("web")
	orders := connect(t, web, sdk.Service("orders"), address)
	if _, err := orders.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); err != nil {
		t.Fatal(err)
	}
	// The same address and target string, an open connection, another identity that is
	// expected.
	refunds := connect(t, web, sdk.Service("refunds"), address)
	if res, err := refunds.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); err == nil {
		t.Errorf("UnaryCall = %v; the server is not refunds", res)
	}
	if _, err := orders.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); err != nil {
		t.Errorf("the first client: %v", err)
	}
	if n := s.calls.Load(); n != 2 {
		t.Errorf("%d calls were served; want 2", n)
	}
}

// Several identities of one process, with the same target string, at the same time.
func TestReuseNeverCrossesCallers(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.Allow("shop", "orders")
	s := &service{}
	address := start(t, td.Workload("orders"), s)
	const calls = 20
	var callers sync.WaitGroup
	for _, name := range []string{"web", "intruder", "shop", "web"} {
		client := connect(t, td.Workload(name), sdk.Service("orders"), address)
		callers.Go(func() {
			for range calls {
				res, err := client.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
				switch want := "spiffe://sdktest.test/" + name; {
				case name == "intruder":
					if denied, ok := errors.AsType[*sdk.DeniedError](err); !ok || denied.Reason != policy.NoGrant {
						t.Errorf("the intruder: UnaryCall = %v, %v; want NO_GRANT", res, err)
					}
				case err != nil || res.GetUsername() != want:
					t.Errorf("%s: UnaryCall = %v, %v; want %s", name, res, err, want)
				}
			}
		})
	}
	callers.Wait()
	if n := s.calls.Load(); n != 3*calls {
		t.Errorf("%d calls were served; want %d", n, 3*calls)
	}
}

// T19, with the proof that it is one connection.
func TestPolicyChangeHoldsForTheNextCallOnTheConnection(t *testing.T) {
	td := sdktest.New(t)
	sources := make(map[string]bool) // addresses, of calls one after the other
	decide := func(d policy.Decision) {
		td.Decide(func(in *policy.Input) policy.Decision {
			sources[in.SourceAddress] = true
			return d
		})
	}
	allowed := policy.Decision{Allow: true, Reason: policy.Allowed}
	decide(allowed)
	c := connect(t, td.Workload("web"), sdk.Service("orders"), start(t, td.Workload("orders"), &service{}))
	for range 3 {
		decide(allowed)
		if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); err != nil {
			t.Errorf("allowed: %v", err)
		}
		decide(policy.Decision{Reason: policy.DenyRule})
		_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
		wantDenied(t, err, policy.DenyRule)
		decide(policy.Decision{Reason: policy.NoGrant})
		stream, err := c.FullDuplexCall(limited(t))
		if err == nil {
			_, err = stream.Recv()
		}
		wantDenied(t, err, policy.NoGrant)
	}
	if len(sources) != 1 {
		t.Errorf("calls came from %v; want one connection", sources)
	}
}
