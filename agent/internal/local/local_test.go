// What stands before any policy, and the ring of decisions.

package local

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/ca/capb"
	"merlon.dev/policy"
	"merlon.dev/policy/engine"
)

func newServer(t *testing.T, denyStale bool) (*Server, *cache.Cache) {
	t.Helper()
	c := cache.New(cache.Options{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.test"),
		Logger:      slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	return New(Options{
		Callers: &endpoint.Callers{Cache: c}, Engine: func() *engine.Engine { return nil },
		RevocationMaxAge: 5 * time.Minute, DenyStale: denyStale,
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}), c
}

func TestStaleRevocations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &policy.Input{Source: "spiffe://example.test/web"}
		want := func(s *Server, reason policy.Reason) {
			t.Helper()
			if d := s.decide(context.Background(), in); d.Reason != reason || d.Allow {
				t.Errorf("decide() = %+v; want %s", d, reason)
			}
		}
		s, c := newServer(t, true)
		want(s, policy.StaleRevocations) // never heard
		if err := c.Apply(t.Context(), &capb.SyncResponse{Synced: true}); err != nil {
			t.Fatal(err)
		}
		want(s, policy.NoBundle)
		time.Sleep(5 * time.Minute)
		want(s, policy.NoBundle)
		time.Sleep(time.Second)
		want(s, policy.StaleRevocations)
		// The heartbeat of a replica that cannot reach its store, and that of one
		// that can.
		if err := c.Apply(t.Context(), &capb.SyncResponse{Synced: true, Stale: true}); err != nil {
			t.Fatal(err)
		}
		want(s, policy.StaleRevocations)
		if err := c.Apply(t.Context(), &capb.SyncResponse{Synced: true}); err != nil {
			t.Fatal(err)
		}
		want(s, policy.NoBundle)
		keep, _ := newServer(t, false)
		want(keep, policy.NoBundle)
	})
}

func TestRingKeepsTheLastDecisions(t *testing.T) {
	r := newRing()
	for i := range ringSize + 5 {
		r.add(&policy.Input{Method: fmt.Sprint(i)}, policy.Decision{DecisionID: policy.DecisionID{byte(i >> 8), byte(i)}}, time.Time{})
	}
	for i, want := range map[int]bool{0: false, 4: false, 5: true, ringSize + 4: true, ringSize + 5: false} {
		rec, ok := r.find(policy.DecisionID{byte(i >> 8), byte(i)})
		if ok != want || ok && rec.input.Method != fmt.Sprint(i) {
			t.Errorf("find(%d) = %v, %v; want %v", i, rec.input.Method, ok, want)
		}
	}
	if len(r.byID) != ringSize {
		t.Errorf("%d IDs are known; want %d", len(r.byID), ringSize)
	}
}

func TestKeptHeadersAreBounded(t *testing.T) {
	headers := map[string][]string{"accept": {"x"}, "cookie": {"canary"}}
	kept, shortened := keepHeaders(headers)
	if !shortened || kept["cookie"][0] != masked || kept["accept"][0] != "x" || headers["cookie"][0] != "canary" {
		t.Errorf("keepHeaders() = %v, %v; want the cookie masked, and the input as it was", kept, shortened)
	}
	if kept, shortened := keepHeaders(map[string][]string{"x": {string(make([]byte, maxHeaderBytes))}}); len(kept) != 0 || !shortened {
		t.Errorf("keepHeaders(too much) = %d headers, %v; want none", len(kept), shortened)
	}
}
