// Compiled policy for a service, and the record of what it decided by it.

package agent_test

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/policy"
	"merlon.dev/policy/program"
	"merlon.dev/sdk"
)

func TestWatchPolicySendsTheCallersProgramsOnly(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	ca.PutEntry(ca.Entry("e2", "/other", "unix:uid:4711"))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	cc, ctx := conn(t, n.socket)
	stream, err := agentpb.NewLocalClient(cc).WatchPolicy(ctx, &agentpb.WatchPolicyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := func(generation uint64, destinations ...string) *agentpb.WatchPolicyResponse {
		t.Helper()
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range m.GetPrograms() {
			got = append(got, strings.TrimPrefix(p.GetDestination(), "spiffe://"+td))
		}
		if m.GetPolicyGeneration() != generation || !slices.Equal(got, destinations) {
			t.Fatalf("generation %d with programs for %q; want %d and %q", m.GetPolicyGeneration(), got, generation, destinations)
		}
		return m
	}
	next(0)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	p, err := program.Decode(next(1, "/orders").GetPrograms()[0].GetEncoded())
	if err != nil {
		t.Fatal(err)
	}
	read := &policy.Input{Source: "spiffe://" + td + "/web", Destination: "spiffe://" + td + "/orders", Protocol: policy.HTTP, Method: "GET", Path: "/orders"}
	if v := p.Decide(read, time.Now()); v.RuleID != "web-reads" {
		t.Errorf("the program says %+v", v)
	}
	ca.PutEntry(ca.Entry("e3", "/stock", uidSelector))
	next(1, "/orders", "/stock")
	ca.DeleteEntry("e1")
	next(1, "/stock")
	ca.PublishPolicy(key.bundle(strings.ReplaceAll(grants, "/orders]", "/stock]"), 2), key.announcement(2))
	if p, err = program.Decode(next(2, "/stock").GetPrograms()[0].GetEncoded()); err != nil || p.Generation() != 2 {
		t.Errorf("program of generation %d, %v", p.Generation(), err)
	}
	ca.DeleteEntry("e3")
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("without an identity: %v", err)
	}
}

func TestReportedDecisionsAreExplained(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	n.policyIs(t, 1)
	record := func(change func(*agentpb.DecisionRecord)) *agentpb.DecisionRecord {
		rec := &agentpb.DecisionRecord{
			Decision:  &agentpb.Decision{Reason: "METHOD", LetThrough: true, DecisionId: policy.NewDecisionID().String(), PolicyGeneration: 1},
			Input:     &agentpb.AuthorizeRequest{Destination: "spiffe://" + td + "/orders", Source: "spiffe://" + td + "/web", Protocol: "http", Method: "POST", Path: "/orders"},
			DecidedAt: timestamppb.Now(),
		}
		change(rec)
		return rec
	}
	cc, ctx := conn(t, n.socket)
	report := func(m *agentpb.ReportRequest) error {
		t.Helper()
		stream, err := agentpb.NewLocalClient(cc).Report(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
		_, err = stream.CloseAndRecv()
		return err
	}
	good := record(func(*agentpb.DecisionRecord) {})
	debug, adminCtx := n.debug(t)
	// The question may come before the record.
	explained := make(chan error, 1)
	go func() {
		m, err := debug.ExplainDecision(adminCtx, &agentpb.ExplainDecisionRequest{DecisionId: good.GetDecision().GetDecisionId()})
		if err == nil && !strings.Contains(strings.Join(m.GetDetails(), "\n"), "grant web-reads: method POST not in [GET]") {
			t.Errorf("explained as %v", m)
		}
		explained <- err
	}()
	if err := report(&agentpb.ReportRequest{Records: []*agentpb.DecisionRecord{good}, Decided: map[string]uint64{"METHOD": 1, "ALLOWED": 41}, Dropped: 3}); err != nil {
		t.Fatal(err)
	}
	if err := <-explained; err != nil {
		t.Error(err)
	}
	// Nobody replaces what is on record.
	forged := record(func(rec *agentpb.DecisionRecord) {
		rec.Decision.DecisionId = good.GetDecision().GetDecisionId()
		rec.Input.Path = "/forged"
	})
	if err := report(&agentpb.ReportRequest{Records: []*agentpb.DecisionRecord{forged}}); err != nil {
		t.Fatal(err)
	}
	m, err := debug.ExplainDecision(adminCtx, &agentpb.ExplainDecisionRequest{DecisionId: good.GetDecision().GetDecisionId()})
	if err != nil || m.GetInput().GetPath() != "/orders" {
		t.Errorf("after a forgery: %v, %v", m, err)
	}
	if d := m.GetDecision(); d.GetAllow() || !d.GetLetThrough() {
		t.Errorf("%v; want a denial that was let through", d)
	}
	for name, tt := range map[string]struct {
		m    *agentpb.ReportRequest
		code codes.Code
	}{
		"of another destination": {&agentpb.ReportRequest{Records: []*agentpb.DecisionRecord{record(func(rec *agentpb.DecisionRecord) { rec.Input.Destination = "spiffe://" + td + "/other" })}}, codes.PermissionDenied},
		"with no such reason":    {&agentpb.ReportRequest{Records: []*agentpb.DecisionRecord{record(func(rec *agentpb.DecisionRecord) { rec.Decision.Reason = "BECAUSE" })}}, codes.InvalidArgument},
		"with a bad decision ID": {&agentpb.ReportRequest{Records: []*agentpb.DecisionRecord{record(func(rec *agentpb.DecisionRecord) { rec.Decision.DecisionId = "x\ny" })}}, codes.InvalidArgument},
		"without a time":         {&agentpb.ReportRequest{Records: []*agentpb.DecisionRecord{record(func(rec *agentpb.DecisionRecord) { rec.DecidedAt = nil })}}, codes.InvalidArgument},
		"counting a bad reason":  {&agentpb.ReportRequest{Decided: map[string]uint64{"a\nb": 1}}, codes.InvalidArgument},
		"too long":               {&agentpb.ReportRequest{Records: slices.Repeat([]*agentpb.DecisionRecord{{}}, 2000)}, codes.InvalidArgument},
	} {
		if err := report(tt.m); status.Code(err) != tt.code {
			t.Errorf("a report %s: %v; want %v", name, err, tt.code)
		}
	}
}

// A policy without a compiled form: a service keeps what the agent decided, for calls
// that agree in what the policy reads, and goes on by that when the agent is gone.
func TestServicesKeepWhatTheAgentDecided(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key := newPolicyKey(t)
	const byPort = "package authz\n\nallow if input.attributes.request.http.method == \"GET\"\n\ndeny if input.attributes.source.address.socketAddress.portValue == 1\n\ndeny if input.attributes.request.http.headers[\"x-debug\"] == \"on\"\n"
	ca.PublishPolicy(key.bundleOf("own.rego", byPort, 1), key.announcement(1))
	n.policyIs(t, 1)
	id, err := sdk.Open(t.Context(), sdk.WithAgentAddress(n.socket), sdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	defer id.Close()
	call := func(path, debug string) *policy.Input {
		return &policy.Input{
			Source: "spiffe://" + td + "/web", Protocol: policy.HTTP, Method: "GET", Path: path,
			SourceAddress: "127.0.0.1:2", Headers: policy.HeaderMap{"x-debug": {debug}, "x-request-id": {fmt.Sprint(time.Now().UnixNano())}},
		}
	}
	want := func(what string, in *policy.Input, reason policy.Reason) {
		t.Helper()
		if d := id.Authorize(t.Context(), in); d.Reason != reason || d.Allow != (reason == policy.Allowed) {
			t.Errorf("%s: %+v; want %s", what, d, reason)
		}
	}
	decided := func() string { return n.metric(t, `merlon_agent_decisions_total{reason="ALLOWED"}`) }
	eventually(t, "the policy's form comes to the service", func() bool { // from then on nobody asks twice
		want("a call", call("/orders", "off"), policy.Allowed)
		before := decided()
		want("the call again", call("/orders", "off"), policy.Allowed)
		return decided() == before
	})
	want("what the policy reads is another", call("/orders", "on"), policy.DenyRule)
	n.stop()
	want("with the agent gone", call("/orders", "off"), policy.Allowed)
	want("a denial, with the agent gone", call("/orders", "on"), policy.DenyRule)
	want("a call that nobody has decided", call("/orders", "other"), policy.AgentUnavailable)
}
