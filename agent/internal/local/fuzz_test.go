// Bytes of workloads: what they report.

package local

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/policyfeed"
	"merlon.dev/ca/capb"
	"merlon.dev/policy"
	"merlon.dev/policy/comparison"
	"merlon.dev/policy/decisionlog"
	"merlon.dev/policy/engine"
)

const reporter = "spiffe://example.test/web"

// reported is a server with a candidate beside its policy, and what it made of m.
func reported(t *testing.T, snapshot *policyfeed.Snapshot, m *agentpb.ReportRequest) (*Server, error) {
	t.Helper()
	c := cache.New(cache.Options{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.test"), Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	if err := c.Apply(t.Context(), &capb.SyncResponse{Synced: true}); err != nil {
		t.Fatal(err)
	}
	s := New(Options{
		Callers: &endpoint.Callers{Cache: c}, Policy: func() *policyfeed.Snapshot { return snapshot }, PolicyFault: func() string { return "" },
		AgentID:   func() spiffeid.ID { return spiffeid.RequireFromString("spiffe://example.test/agent/n") },
		Decisions: decisionlog.NewRecorder(decisionlog.Options{Records: 4, Rows: 64}), ExplainHeaders: []string{"accept"},
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	s.processes.heard(&process{}, 1, reporter, m)
	return s, s.keep(t.Context(), m, []*cache.Entry{{SPIFFEID: spiffeid.RequireFromString(reporter)}})
}

func candidateBeside(t testing.TB) *policyfeed.Snapshot {
	t.Helper()
	snapshot := &policyfeed.Snapshot{Step: 1, Version: 3}
	for generation, e := range map[uint64]**engine.Engine{1: &snapshot.Active, 2: &snapshot.Candidate} {
		var err error
		if *e, err = engine.New(t.Context(), engine.Source{Generation: generation}); err != nil {
			t.Fatal(err)
		}
	}
	return snapshot
}

// held is how many bytes of texts a record keeps, and an empty one counts, too.
func (rec *record) held() (n int) {
	in := &rec.input
	texts := append([]string{
		string(in.Protocol), in.Source, in.Destination, in.Method, in.Path, in.Query, in.Host, in.SourceAddress, in.DestinationAddress,
		in.SourceSerial, rec.decision.RuleID, string(rec.decision.Reason),
	}, rec.decision.DryRun...)
	for name, values := range in.HeaderMap() {
		texts = append(append(texts, name), values...)
	}
	for _, s := range texts {
		n += stringOverhead + len(s)
	}
	return n
}

// maxHeld is more than 10 000 records may keep each.
const maxHeld = 13*(maxStringBytes+stringOverhead) + 2*maxHeaderBytes*stringOverhead

// checkHeld says what of a report is kept that must not be.
func checkHeld(t *testing.T, s *Server) {
	t.Helper()
	for _, r := range []*ring{s.decisions.denied, s.decisions.allowed} {
		for i := range r.records {
			rec := &r.records[i]
			if rec.input.Destination != reporter {
				t.Errorf("a decision about %q is kept", rec.input.Destination)
			}
			if n := rec.held(); n > maxHeld {
				t.Errorf("%d bytes are kept of one decision; want up to %d", n, maxHeld)
			}
		}
	}
	for _, row := range s.o.Decisions.Rows() {
		if row.Destination != reporter && row.Destination != decisionlog.Other {
			t.Errorf("calls to %q are counted", row.Destination)
		}
		if n := len(row.Source) + len(row.RuleID); n > 1<<13 {
			t.Errorf("a row has %d bytes of texts", n)
		}
	}
	told := s.PolicyReport(true)
	if n := proto.Size(told); n > len(told.GetCounts().GetDifferences())*(comparison.MaxDifferenceBytes+64)+1024 {
		t.Errorf("the CA would be told %d bytes", n)
	}
	for _, d := range told.GetCounts().GetDifferences() {
		if d.GetDestination() != reporter {
			t.Errorf("calls to %q are compared", d.GetDestination())
		}
	}
}

// Whatever a workload reports, it is about itself, and what is kept of it is bounded.
func FuzzReport(f *testing.F) {
	input := func(path string) *agentpb.AuthorizeRequest {
		return &agentpb.AuthorizeRequest{
			Destination: reporter, Source: "spiffe://example.test/a", Protocol: "http", Method: "GET", Path: path,
			Headers: map[string]*agentpb.HeaderValues{"accept": {Values: []string{"x", ""}}, "cookie": {Values: []string{"y"}}},
		}
	}
	decision := &agentpb.Decision{Reason: string(policy.NoGrant), DecisionId: "000102030405060708090a0b", DryRun: []string{"g"}, RuleId: "r"}
	for _, m := range []*agentpb.ReportRequest{
		{Decided: map[string]uint64{string(policy.Allowed): 3}, Dropped: 2, PolicyVersion: 3, PolicyGeneration: 1},
		{Records: []*agentpb.DecisionRecord{{Decision: decision, Input: input("/"), DecidedAt: timestamppb.New(time.Unix(1e9, 0)), StandsFor: 4, Incomplete: []string{"query"}}}},
		{Records: []*agentpb.DecisionRecord{{Decision: decision, Input: &agentpb.AuthorizeRequest{Destination: "spiffe://example.test/other"}}}},
		{Rows: []*agentpb.DecisionCount{{Source: "spiffe://example.test/a", Destination: reporter, RuleId: "r", Reason: string(policy.Allowed), Count: 9}, {Source: decisionlog.Other, Reason: string(policy.NoGrant)}}},
		{Counts: &agentpb.Counts{
			CandidateGeneration: 2, Step: 1, Comparisons: []*agentpb.Comparison{{Destination: reporter, BothAllow: 1}, {Destination: "spiffe://example.test/other"}},
			Differences: []*agentpb.Difference{{Source: "spiffe://example.test/a", Destination: reporter, Reason: string(policy.Allowed), CandidateReason: string(policy.NoGrant), Calls: 2}},
		}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	snapshot := candidateBeside(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		var m agentpb.ReportRequest
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		s, err := reported(t, snapshot, &m)
		switch status.Code(err) {
		case codes.OK, codes.InvalidArgument, codes.PermissionDenied, codes.Unavailable:
		default:
			t.Errorf("the answer is %v", err)
		}
		checkHeld(t, s)
	})
}

// Somebody whom the agent serves fills neither its memory nor its next message to the
// CA, by texts that no SDK sends.
func TestReportsOfLongTextsAreCut(t *testing.T) {
	long := strings.Repeat("a", 100_000)
	m := &agentpb.ReportRequest{
		Rows: []*agentpb.DecisionCount{{Source: long, Destination: reporter, RuleId: "r", Reason: string(policy.Allowed), Count: 9}},
		Records: []*agentpb.DecisionRecord{{
			Decision: &agentpb.Decision{Reason: string(policy.NoGrant), DecisionId: "000102030405060708090a0b", RuleId: long, DryRun: []string{"kept", long}},
			Input: &agentpb.AuthorizeRequest{
				Destination: reporter, Source: long, Protocol: long, Headers: map[string]*agentpb.HeaderValues{"accept": {Values: make([]string, 100_000)}},
			},
			DecidedAt: timestamppb.Now(),
		}},
		Counts: &agentpb.Counts{CandidateGeneration: 2, Step: 1, Differences: []*agentpb.Difference{
			{Source: "spiffe://example.test/a", Destination: reporter, CandidateReason: string(policy.NoGrant), Calls: 2},
			{Source: long, Destination: reporter, CandidateReason: string(policy.NoGrant), Calls: 3},
		}},
	}
	s, err := reported(t, candidateBeside(t), m)
	if err != nil {
		t.Fatal(err)
	}
	checkHeld(t, s)
	kept := s.decisions.denied.records
	if len(kept) != 1 || !kept[0].shortened || fmt.Sprint(kept[0].decision.DryRun) != "[kept]" {
		t.Fatalf("kept: %d records, dry run %.40q", len(kept), kept[0].decision.DryRun)
	}
	if rows := s.o.Decisions.Rows(); len(rows) != 1 || rows[0].Source != decisionlog.Other || rows[0].N != 9 {
		t.Errorf("counted %.200q; want all 9, of other", fmt.Sprint(rows))
	}
	s.compared.takeCounts(s.o.Policy(), m.GetCounts(), func(string) bool { return true })
	if told := s.PolicyReport(true).GetCounts(); len(told.GetDifferences()) != 1 || told.GetDifferencesDropped() != 3 {
		t.Errorf("the CA is told %d differences, and that %d calls have none; want 1 and 3", len(told.GetDifferences()), told.GetDifferencesDropped())
	}
}
