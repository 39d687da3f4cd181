// Bounds on open calls and on the records of callers that may do nothing.

package api

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/sdk/svid"
)

func TestCallsAreCountedPerCaller(t *testing.T) {
	s, _ := newService(t)
	from := func(p *svid.Peer) context.Context {
		return peer.NewContext(t.Context(), &peer.Peer{AuthInfo: tlsInfo{Peer: p}})
	}
	agent := from(peerOf(t, "spiffe://shop.test/agent/n1", 1, 1))
	call, end := context.WithCancel(from(nil))
	defer end()
	for range maxCalls {
		ctx, err := s.tap(call, &tap.Info{})
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := ctx.Deadline(); !ok {
			t.Fatal("a call of nobody has no deadline")
		}
	}
	if _, err := s.tap(call, &tap.Info{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one more: %v; want ResourceExhausted", err)
	}
	ctx, err := s.tap(agent, &tap.Info{})
	if err != nil {
		t.Errorf("an agent while nobody has his share: %v", err)
	}
	if _, ok := ctx.Deadline(); ok {
		t.Error("an agent's Sync has a deadline")
	}
	end()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		again, over := context.WithCancel(from(nil))
		_, err := s.tap(again, &tap.Info{})
		over()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("calls that ended still count")
		}
	}
}

// unrecorded reads the counter of refusals that left no record.
func unrecorded(t *testing.T, s *Service) float64 {
	t.Helper()
	families, err := s.opts.Metrics.(*prometheus.Registry).Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "merlon_audit_unrecorded_refusals_total" {
			return f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatal("no counter of unrecorded refusals")
	return 0
}

// Any workload can be refused as often as it likes, and a full disk would stop
// the whole trust domain.
func TestRefusalsOfThePowerlessAreBounded(t *testing.T) {
	s, agent := newService(t)
	s.shares.powerless.AllowN(time.Now(), refusalsBurst)
	s.shares.nobody.AllowN(time.Now(), refusalsBurst)
	cause := status.Error(codes.PermissionDenied, "no")
	for range 2 * refusalsPerSecond {
		_ = s.refuse(t.Context(), s.PeerCaller(peerOf(t, "spiffe://shop.test/web", 1, 1)), audit.Record{Detail: "x"}, cause)
	}
	if n := unrecorded(t, s); n < refusalsPerSecond/2 {
		t.Errorf("%v refusals of a workload left unrecorded; want most of %d", n, 2*refusalsPerSecond)
	}
	before := unrecorded(t, s)
	if err := s.refuse(t.Context(), s.PeerCaller(peerOf(t, agent.ID.String(), agent.Handle, agent.Revision)), audit.Record{Detail: "x"}, cause); status.Code(err) != codes.PermissionDenied {
		t.Errorf("refuse() = %v; want its argument", err)
	}
	if unrecorded(t, s) != before {
		t.Error("the refusal of an agent was not recorded")
	}
}

// What is served on the socket alone must not be listed for the TLS port, where
// the table is read while the socket's server is still being made.
func TestServersDoNotShareATable(t *testing.T) {
	s, _ := newService(t)
	var onSocket bool
	srv := s.SocketServer(func(r grpc.ServiceRegistrar) {
		healthgrpc.RegisterHealthServer(r, healthgrpc.UnimplementedHealthServer{})
		onSocket = true
	})
	defer srv.Stop()
	if whom := accessTable()[healthgrpc.Health_Check_FullMethodName].whom(); !onSocket || whom != "" {
		t.Errorf("a fresh table opens the socket's health service to %v", whom)
	}
	if _, ok := accessTable().permits(capb.Node_Attest_FullMethodName, Anonymous()); !ok {
		t.Error("a fresh table lacks Attest")
	}
}
