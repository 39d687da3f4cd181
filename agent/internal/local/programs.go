// Compiled policy for the services of the node, which decide by it themselves,
// and the record of what they decided.

package local

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/policyfeed"
	"merlon.dev/policy"
	"merlon.dev/policy/decisionlog"
	"merlon.dev/policy/engine"
)

// WatchPolicy streams the programs of the caller's own SPIFFE IDs, and no others:
// each message has all of them. The caller is looked at again for each.
func (s *Server) WatchPolicy(_ *agentpb.WatchPolicyRequest, stream grpc.ServerStreamingServer[agentpb.WatchPolicyResponse]) error {
	ctx := stream.Context()
	sub := s.cache.Subscribe()
	defer sub.Close()
	var last *agentpb.WatchPolicyResponse
	for {
		changed := s.o.PolicyChanged() // before the policy, so that no change is missed
		p, err := s.o.Callers.Attest(ctx)
		if err != nil {
			return err
		}
		view := sub.View(p.Proof(), false)
		if len(view.Entries) == 0 && view.Current {
			return endpoint.NoEntry(p.PID)
		}
		if m := s.programs(ctx, view.Entries); len(view.Entries) > 0 && !proto.Equal(m, last) {
			if err := s.o.Callers.Alive(ctx); err != nil {
				return err
			}
			if err := endpoint.Deliver(ctx, endpoint.Patience, func() error { return stream.Send(m) }); err != nil {
				return err
			}
			last = m
		}
		select {
		case <-changed:
		case <-sub.Woken():
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// programs compiles the policies that entries are decided by, and those that are to be
// compared with them, or takes what is compiled: all by one snapshot.
func (s *Server) programs(ctx context.Context, entries []*cache.Entry) *agentpb.WatchPolicyResponse {
	now := s.o.Policy()
	m := &agentpb.WatchPolicyResponse{PolicyVersion: now.Version, Step: now.Step}
	m.PolicyGeneration, m.CandidateGeneration = now.Generations()
	seen := make(map[string]bool, len(entries))
	for _, e := range entries {
		id := e.SPIFFEID.String()
		choice := now.For(s.o.AgentID().String(), id)
		if seen[id] || choice.Decides == nil {
			continue
		}
		seen[id] = true
		encoded, err := choice.Decides.Encoded(ctx, id)
		p := &agentpb.Program{Destination: id, Encoded: encoded, Canary: choice.Canary}
		if err != nil {
			p.Reason, p.Keep = err.Error(), keepOf(choice.Decides)
		} else if choice.Beside != nil {
			// What cannot be compiled the agent compares, by what is reported.
			p.Beside, _ = choice.Beside.Encoded(ctx, id)
		}
		m.Programs = append(m.Programs, p)
	}
	return m
}

// keepOf says for which further calls the decisions of e stand; nil for none.
func keepOf(e *engine.Engine) *agentpb.Keep {
	reads, ends, ok := e.Keep()
	if !ok {
		return nil
	}
	return &agentpb.Keep{
		Query: reads.Query, Host: reads.Host, SourceAddress: reads.SourceAddress, DestinationAddress: reads.DestinationAddress,
		AllHeaders: reads.AllHeaders, Headers: reads.Headers, Ends: ends,
	}
}

// maxRecords bounds the records of one message.
const maxRecords = 1024

// Report keeps the decisions that the caller made by its programs, as if they had
// been made here: for explanations, and counted. It takes none about another
// destination than the caller.
func (s *Server) Report(stream grpc.ClientStreamingServer[agentpb.ReportRequest, agentpb.ReportResponse]) error {
	ctx := stream.Context()
	reporter := &process{}
	s.processes.add(reporter)
	defer s.compared.wake()
	defer s.processes.remove(reporter)
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&agentpb.ReportResponse{})
		}
		if err != nil {
			return err
		}
		p, entries, err := s.o.Callers.Entitled(ctx)
		if err != nil {
			return err
		}
		if s.processes.heard(reporter, p.PID, entries[0].SPIFFEID.String(), m) {
			s.compared.wake()
		}
		if err := s.keep(ctx, m, entries); err != nil {
			return err
		}
	}
}

func (s *Server) keep(ctx context.Context, m *agentpb.ReportRequest, entries []*cache.Entry) error {
	if len(m.GetRecords()) > maxRecords {
		return status.Errorf(codes.InvalidArgument, "a report has %d records; at most %d are taken", len(m.GetRecords()), maxRecords)
	}
	known := map[policy.Reason]bool{}
	for _, r := range policy.Reasons() {
		known[r] = true
	}
	for reason, n := range m.GetDecided() {
		if !known[policy.Reason(reason)] {
			return status.Errorf(codes.InvalidArgument, "%.64q is no reason of a decision", reason)
		}
		s.counted.WithLabelValues(reason).Add(float64(n))
	}
	s.unrecorded.Add(float64(m.GetDropped()))
	s.o.Decisions.DroppedElsewhere(m.GetDropped())
	if err := s.count(m, entries, known); err != nil {
		return err
	}
	now := s.o.Policy()
	s.compared.takeCounts(now, m.GetCounts(), func(destination string) bool {
		_, own := pickDestination(entries, destination)
		return own && destination != ""
	})
	for _, rec := range m.GetRecords() {
		destination, ok := pickDestination(entries, rec.GetInput().GetDestination())
		if !ok {
			return s.o.Callers.NotAmong("the caller reports a decision of a destination that it is not entitled to")
		}
		d, err := decisionOf(rec.GetDecision())
		if err != nil || !known[d.Reason] || rec.GetDecidedAt().CheckValid() != nil {
			return status.Error(codes.InvalidArgument, "a report has a malformed decision")
		}
		in, at := inputOf(rec.GetInput(), destination), rec.GetDecidedAt().AsTime()
		incomplete := decisionlog.FieldsNamed(rec.GetIncomplete())
		s.decisions.add(in, d, at, incomplete&(decisionlog.Path|decisionlog.Query) != 0)
		s.o.Decisions.Add(in, &d, at, rec.GetStandsFor(), incomplete)
		if choice := now.For(s.o.AgentID().String(), destination); choice.Beside != nil && incomplete == 0 && !choice.Beside.ReadsJWT() && !comparesItself(ctx, m, choice, destination) {
			s.compared.offer(now, choice, in, d)
		}
	}
	return nil
}

// count takes a report's rows, each of a destination of the caller's. An SDK from
// before there were any tells reasons alone.
func (s *Server) count(m *agentpb.ReportRequest, entries []*cache.Entry, known map[policy.Reason]bool) error {
	if len(m.GetRows()) == 0 {
		for reason, n := range m.GetDecided() {
			s.o.Decisions.Count(decisionlog.Other, decisionlog.Other, decisionlog.Other, policy.Reason(reason), n)
		}
	}
	for _, row := range m.GetRows() {
		if !known[policy.Reason(row.GetReason())] {
			return status.Errorf(codes.InvalidArgument, "%.64q is no reason of a decision", row.GetReason())
		}
		destination, ok := decisionlog.Other, row.GetSource() == decisionlog.Other
		if !ok {
			destination, ok = pickDestination(entries, row.GetDestination())
		}
		if !ok {
			return s.o.Callers.NotAmong("the caller counts decisions of a destination that it is not entitled to")
		}
		s.o.Decisions.Count(row.GetSource(), destination, row.GetRuleId(), policy.Reason(row.GetReason()), row.GetCount())
	}
	return nil
}

// comparesItself says whether the sender of m compares the calls to destination. One
// that knows of no candidates does not, and none can where one of both policies is not
// compiled; then what is recorded is compared here: all denials, and some of the calls
// that were allowed.
func comparesItself(ctx context.Context, m *agentpb.ReportRequest, choice policyfeed.Choice, destination string) bool {
	_, decides := choice.Decides.Encoded(ctx, destination)
	_, beside := choice.Beside.Encoded(ctx, destination)
	return m.GetPolicyVersion() != 0 && decides == nil && beside == nil
}

func decisionOf(pb *agentpb.Decision) (policy.Decision, error) {
	id, err := policy.ParseDecisionID(pb.GetDecisionId())
	return policy.Decision{
		Allow: pb.GetAllow(), Reason: policy.Reason(pb.GetReason()), RuleID: pb.GetRuleId(),
		DecisionID: id, Revision: pb.GetPolicyGeneration(), DryRun: pb.GetDryRun(), LetThrough: pb.GetLetThrough() && !pb.GetAllow(),
	}, err
}

// denyAfter is how old what the CA said may be; zero where age does not matter.
func (s *Server) denyAfter() time.Duration {
	if !s.o.DenyStale {
		return 0
	}
	return s.o.RevocationMaxAge
}
