// What stands before any policy, and the ring of decisions.

package local

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/policyfeed"
	"merlon.dev/ca/capb"
	"merlon.dev/policy"
	"merlon.dev/policy/decisionlog"
)

func newServer(t *testing.T, denyStale bool) (*Server, *cache.Cache) {
	t.Helper()
	c := cache.New(cache.Options{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.test"),
		Logger:      slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	return New(Options{
		Callers: &endpoint.Callers{Cache: c}, Policy: func() *policyfeed.Snapshot { return &policyfeed.Snapshot{} }, AgentID: func() spiffeid.ID { return spiffeid.ID{} },
		Decisions:        decisionlog.NewRecorder(decisionlog.Options{}),
		RevocationMaxAge: 5 * time.Minute, DenyStale: denyStale, PolicyAsOf: c.Heard,
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}), c
}

func TestStaleRevocations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &policy.Input{Source: "spiffe://example.test/web"}
		want := func(s *Server, reason policy.Reason) {
			t.Helper()
			if d := s.decide(context.Background(), in, nil); d.Reason != reason || d.Allow {
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

func TestStalePolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := newServer(t, false)
		if err := c.Apply(t.Context(), &capb.SyncResponse{Synced: true}); err != nil {
			t.Fatal(err)
		}
		s.o.PolicyMaxAge = time.Hour
		want := func(reason policy.Reason) {
			t.Helper()
			if d := s.decide(context.Background(), &policy.Input{Source: "spiffe://example.test/web"}, nil); d.Reason != reason || d.Allow {
				t.Errorf("decide() = %+v; want %s", d, reason)
			}
		}
		time.Sleep(2 * time.Hour)
		want(policy.NoBundle) // what is in use stays in force
		s.o.DenyStalePolicy = true
		want(policy.StalePolicy)
		if err := c.Apply(t.Context(), &capb.SyncResponse{Synced: true}); err != nil {
			t.Fatal(err)
		}
		want(policy.NoBundle)
		time.Sleep(time.Hour)
		want(policy.NoBundle)
		time.Sleep(time.Nanosecond)
		want(policy.StalePolicy)
	})
}

func TestWhyAMatchHasNoSVID(t *testing.T) {
	handed, own := &cache.Entry{ID: "e1", AgentKey: true}, &cache.Entry{ID: "e2", OwnKey: true}
	for name, tt := range map[string]struct {
		matches []*cache.Entry
		waiting []string
		want    string
	}{
		"it has one, or has not asked": {[]*cache.Entry{handed}, []string{"e3"}, ""},
		"the CA has not issued it":     {[]*cache.Entry{handed}, []string{"e1", "e3"}, endpoint.CAUnavailable},
		"beside one of its own key":    {[]*cache.Entry{own, handed}, []string{"e1"}, endpoint.CAUnavailable},
		"its own key alone":            {[]*cache.Entry{own}, nil, endpoint.ByWorkload},
	} {
		reason, hint := whyNoSVID(tt.matches, tt.waiting)
		if reason != tt.want || (hint == "") != (reason == "") {
			t.Errorf("%s: reason %q, hint %q; want %q", name, reason, hint, tt.want)
		}
	}
}

func decisionNumber(i int) policy.DecisionID { return policy.DecisionID{byte(i >> 8), byte(i)} }

func TestTheLastDecisionsAreKept(t *testing.T) {
	d := newDecisions(nil)
	for i := range maxDenied + 5 {
		d.add(&policy.Input{Method: fmt.Sprint(i)}, policy.Decision{DecisionID: decisionNumber(i)}, time.Time{}, false)
	}
	// Calls that are allowed have room of their own.
	for i := range 2 * maxAllowed {
		d.add(&policy.Input{Method: fmt.Sprint(i)}, policy.Decision{Allow: true, DecisionID: decisionNumber(20_000 + i)}, time.Time{}, false)
	}
	// Nobody replaces a record, not by another verdict either.
	d.add(&policy.Input{Method: "forged"}, policy.Decision{Allow: true, DecisionID: decisionNumber(5)}, time.Time{}, false)
	d.add(&policy.Input{Method: "forged"}, policy.Decision{DecisionID: decisionNumber(20_000 + maxAllowed)}, time.Time{}, false)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for i, want := range map[int]string{
		0: "", 4: "", 5: "5", maxDenied + 4: fmt.Sprint(maxDenied + 4), maxDenied + 5: "",
		20_000 + maxAllowed - 1: "", 20_000 + maxAllowed: fmt.Sprint(maxAllowed), 20_000 + 2*maxAllowed - 1: fmt.Sprint(2*maxAllowed - 1),
	} {
		rec, ok := d.await(ctx, decisionNumber(i))
		if ok != (want != "") || rec.input.Method != want {
			t.Errorf("await(%d) = %q, %v; want %q", i, rec.input.Method, ok, want)
		}
	}
	if len(d.denied.byID) != maxDenied || len(d.allowed.byID) != maxAllowed {
		t.Errorf("%d and %d IDs are known; want %d and %d", len(d.denied.byID), len(d.allowed.byID), maxDenied, maxAllowed)
	}
}

// T37: only what somebody has found harmless is kept.
func TestHeadersAreKeptByAllowList(t *testing.T) {
	d := newDecisions([]string{"Accept", "big"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	kept := func(number int, headers policy.HeaderMap) record {
		t.Helper()
		d.add(&policy.Input{Headers: headers}, policy.Decision{DecisionID: decisionNumber(number)}, time.Time{}, false)
		rec, ok := d.await(ctx, decisionNumber(number))
		if !ok {
			t.Fatal("the record is not there")
		}
		return rec
	}
	headers := map[string][]string{"accept": {"x", "y"}, "x-session": {"canary", "canary"}, "cookie": {"canary"}}
	rec := kept(1, headers)
	if got, want := fmt.Sprint(rec.input.HeaderMap()), "map[accept:[x y] cookie:[(masked)] x-session:[(masked)]]"; got != want || fmt.Sprint(d.masked(&rec)) != "[cookie x-session]" || rec.shortened {
		t.Errorf("kept %s, masked %v; want %s", got, d.masked(&rec), want)
	}
	if headers["cookie"][0] != "canary" {
		t.Error("the call itself was changed")
	}
	if rec := kept(2, map[string][]string{"big": {string(make([]byte, maxHeaderBytes))}}); len(rec.input.HeaderMap()) != 0 || !rec.shortened {
		t.Errorf("kept %d headers of too many bytes, shortened: %v", len(rec.input.HeaderMap()), rec.shortened)
	}
}

// T37: nor are the claims of a token, and nothing that a policy's author can make
// large.
func TestNeitherClaimsNorResponsesAreKept(t *testing.T) {
	d := newDecisions(nil)
	d.add(&policy.Input{JWT: map[string]any{"email": "canary"}}, policy.Decision{DecisionID: decisionNumber(1), Response: &policy.Response{Body: "long"}}, time.Time{}, false)
	rec, ok := d.await(t.Context(), decisionNumber(1))
	if !ok || rec.input.JWT != nil || !rec.claims || rec.decision.Response != nil {
		t.Errorf("kept %v %+v", ok, rec)
	}
}

// T38: ten thousand denials of calls with long paths are not the agent's memory.
func TestLongStringsAreCut(t *testing.T) {
	d := newDecisions(nil)
	long := strings.Repeat("/ä", 100_000)
	d.add(&policy.Input{Source: long, Method: long, Path: long, Query: long, Host: long, SourceAddress: long, DestinationAddress: long, SourceSerial: long},
		policy.Decision{DecisionID: decisionNumber(1)}, time.Time{}, false)
	rec, ok := d.await(t.Context(), decisionNumber(1))
	in := rec.input
	all := in.Source + in.Method + in.Path + in.Query + in.Host + in.SourceAddress + in.DestinationAddress + in.SourceSerial
	if !ok || !rec.shortened || len(all) > 7*maxStringBytes || !utf8.ValidString(all) || !strings.HasPrefix(in.Path, "/ä/") {
		t.Errorf("%d bytes are kept, shortened: %v", len(all), rec.shortened)
	}
}

func BenchmarkKeepDenial(b *testing.B) {
	d := newDecisions([]string{"accept"})
	in := &policy.Input{Source: "spiffe://example.test/web", Headers: policy.HeaderMap{"accept": {"x"}, "cookie": {"y"}}}
	b.ReportAllocs()
	for i := range b.N {
		d.add(in, policy.Decision{DecisionID: policy.DecisionID{byte(i >> 24), byte(i >> 16), byte(i >> 8), byte(i)}}, time.Time{}, false)
	}
}
