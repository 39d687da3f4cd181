// T28, on the wire: what a caller is told, and what the agent hears of it, where the
// policy of the called service is too old.

package agent_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"

	"google.golang.org/grpc"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	"merlon.dev/sdk/httpauth"
)

// echo answers every call.
type echo struct {
	testgrpc.UnimplementedTestServiceServer
}

func (echo) UnaryCall(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	return &testgrpc.SimpleResponse{}, nil
}

// callItself serves HTTP and gRPC as id, and gives a call of each, as id, too.
func callItself(t *testing.T, id *sdk.Identity) map[string]func() error {
	t.Helper()
	listen := func() net.Listener {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return lis
	}
	overHTTP, overGRPC := listen(), listen()
	web := &http.Server{
		ReadHeaderTimeout: time.Minute, TLSConfig: id.ServerTLS(), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		Handler: httpauth.Handler(id, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})),
	}
	rpc := grpc.NewServer(grpcauth.ServerOptions(id)...)
	testgrpc.RegisterTestServiceServer(rpc, echo{})
	done := make(chan struct{}, 2)
	go func() { _ = web.ServeTLS(overHTTP, "", ""); done <- struct{}{} }()
	go func() { _ = rpc.Serve(overGRPC); done <- struct{}{} }()
	client := httpauth.Client(id, sdk.Service("me"))
	cc, err := grpc.NewClient("passthrough:///"+overGRPC.Addr().String(), grpcauth.DialOptions(id, sdk.Service("me"))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		cc.Close()
		web.Close()
		rpc.Stop()
		<-done
		<-done
	})
	return map[string]func() error{
		"HTTP": func() error {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+overHTTP.Addr().String()+"/", nil)
			if err != nil {
				return err
			}
			res, err := client.Do(req)
			if err != nil {
				return err
			}
			return res.Body.Close()
		},
		"gRPC": func() error {
			_, err := testgrpc.NewTestServiceClient(cc).UnaryCall(t.Context(), &testgrpc.SimpleRequest{})
			return err
		},
	}
}

// The node's CA is a nested one, which has not heard of the one above for long when the
// agent comes; then it has.
func TestStalePolicyIsSaidOnTheWire(t *testing.T) {
	const me = "spiffe://" + td + "/me"
	for name, test := range map[string]struct{ file, policy string }{
		"decided in the service": {"grants.yaml", "grants:\n  - {id: h, from: [" + me + "], to: [" + me + "], http: {}}\n  - {id: g, from: [" + me + "], to: [" + me + "], grpc: {}}\n"},
		"decided by the agent":   {"own.rego", "package authz\n\nallow if time.now_ns() > 0\n"},
	} {
		t.Run(name, func(t *testing.T) {
			ca, key := fakeca.New(t, td), newPolicyKey(t)
			ca.PutEntry(ca.Entry("e1", "/me", uidSelector))
			ca.PublishPolicy(key.bundleOf(test.file, test.policy, 1), key.announcement(1))
			ca.Nest(48 * time.Hour)
			cfg := newConfig(t, ca)
			cfg.PolicyOnStale = "deny"
			n := start(t, cfg)
			eventually(t, "the policy is active", func() bool { return n.metric(t, "merlon_agent_policy_generation") == "1" })
			id, err := sdk.Open(t.Context(), sdk.WithAgentAddress(n.socket), sdk.WithLogger(slog.New(slog.DiscardHandler)))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { id.Close() })
			calls := callItself(t, id)
			debug, ctx := n.debug(t)
			for protocol, call := range calls {
				var denied *sdk.DeniedError
				eventually(t, "a call over "+protocol+" is denied as stale", func() bool {
					err := call()
					// Until it hears of the policy's age the service knows of none.
					return errors.As(err, &denied) && denied.Reason != policy.NoBundle
				})
				if denied.Reason != policy.StalePolicy || denied.DecisionID == "" {
					t.Errorf("%s: %+v; want STALE_POLICY", protocol, denied)
				}
				eventually(t, "the agent knows of the denial over "+protocol, func() bool {
					m, err := debug.ExplainDecision(ctx, &agentpb.ExplainDecisionRequest{DecisionId: denied.DecisionID})
					return err == nil && m.GetDecision().GetReason() == string(policy.StalePolicy)
				})
			}
			if n := n.metric(t, `merlon_agent_decisions_total{reason="STALE_POLICY"}`); n == "0" {
				t.Error("the agent counts no STALE_POLICY")
			}
			ca.PutEntry(ca.Entry("e2", "/more", uidSelector)) // news, which services hear of at once
			for protocol, call := range calls {
				eventually(t, "a call over "+protocol+" is allowed", func() bool { return call() == nil })
			}
		})
	}
}
