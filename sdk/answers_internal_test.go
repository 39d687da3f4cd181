// Which of the agent's decisions are kept, for which calls, and until when.

package sdk

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/sdk/svid"
)

// scripted answers as the test says, and counts.
type scripted struct {
	agentpb.LocalClient
	answer *agentpb.Decision // nil: the agent is away
	asked  int
}

func (s *scripted) Authorize(context.Context, *agentpb.AuthorizeRequest, ...grpc.CallOption) (*agentpb.AuthorizeResponse, error) {
	s.asked++
	if s.answer == nil {
		return nil, status.Error(codes.Unavailable, "gone")
	}
	return &agentpb.AuthorizeResponse{Decision: s.answer}, nil
}

func answer(reason policy.Reason, generation uint64) *agentpb.Decision {
	return &agentpb.Decision{
		Allow: reason == policy.Allowed, Reason: string(reason), RuleId: "r", DecisionId: policy.NewDecisionID().String(), PolicyGeneration: generation,
	}
}

// asking is an identity whose agent decides by generation 7, which reads the header a.
func asking(t *testing.T, ends ...int64) (*Identity, *scripted) {
	t.Helper()
	id, script := bare(), &scripted{answer: answer(policy.Allowed, 7)}
	id.agent = &agent{local: script}
	id.generation.Store(7)
	id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{PolicyGeneration: 7, Programs: []*agentpb.Program{
		{Destination: ownID, Reason: "it is not compiled", Keep: &agentpb.Keep{Headers: []string{"a"}, Ends: ends}},
	}})
	return id, script
}

// A kept decision is recorded like one that the agent makes, with what a dry-run
// grant would have changed.
func TestKeptDryRunDifferencesAreReported(t *testing.T) {
	id, agent := asking(t)
	agent.answer.DryRun = []string{"tried"}
	for range 20 {
		id.Authorize(t.Context(), web("/"))
	}
	records := id.report.message().GetRecords()
	if agent.asked != 1 || len(records) != 19 || records[18].GetDecision().GetDryRun()[0] != "tried" {
		t.Errorf("asked %d times, %d differences reported; want 1 and the other 19", agent.asked, len(records))
	}
}

func TestAnswersAreKept(t *testing.T) {
	id, agent := asking(t)
	first := id.Authorize(t.Context(), web("/"))
	again := id.Authorize(t.Context(), web("/"))
	if agent.asked != 1 || !again.Allow || again.RuleID != "r" || again.Revision != 7 || again.DecisionID == first.DecisionID {
		t.Errorf("asked %d times: %+v and %+v; want one question and two decisions", agent.asked, first, again)
	}
	if rows := id.report.Rows(); len(rows) != 1 || rows[0].N != 1 {
		t.Errorf("reported are %v; want the decision that the agent did not make", rows)
	}
	in := web("/")
	in.Headers = policy.HeaderMap{"b": {"c"}}
	id.Authorize(t.Context(), in)
	if agent.asked != 1 {
		t.Error("asked about a header that the policy does not read")
	}
	in.Headers = policy.HeaderMap{"a": {"c"}}
	id.Authorize(t.Context(), in)
	if agent.asked != 2 {
		t.Error("not asked about a header that the policy reads")
	}
	agent.answer = nil
	if d := id.Authorize(t.Context(), web("/")); !d.Allow {
		t.Errorf("with the agent away: %+v", d)
	}
	if d := id.Authorize(t.Context(), web("/other")); d.Reason != policy.AgentUnavailable {
		t.Errorf("with the agent away, a new call: %+v", d)
	}
}

func TestOnlyThePolicysOwnAnswersAreKept(t *testing.T) {
	for _, reason := range policy.Reasons() {
		id, agent := asking(t)
		agent.answer = answer(reason, 7)
		for range 2 {
			if d := id.Authorize(t.Context(), web("/")); d.Reason != reason {
				t.Errorf("%+v; want %s", d, reason)
			}
		}
		if kept := agent.asked == 1; kept != ofPolicy(reason) {
			t.Errorf("%s is kept: %v", reason, kept)
		}
	}
	id, agent := asking(t)
	agent.answer = answer(policy.Allowed, 8) // the next one is in force already
	id.Authorize(t.Context(), web("/"))
	if id.Authorize(t.Context(), web("/")); agent.asked != 2 {
		t.Error("a decision of another generation is kept")
	}
}

// revoked has the agent tell of a revocation of name, or of one that is not understood.
func revoked(name string) func(*Identity) {
	return func(id *Identity) {
		rec := &agentpb.Revocation{BeforeRevision: 1}
		if name != "" {
			rec.Subject = &agentpb.Revocation_SpiffeId{SpiffeId: name}
		}
		id.revocations.Store((*svid.Revocations)(nil))
		id.revoke(context.Background(), &agentpb.WatchResponse{Revocations: []*agentpb.Revocation{rec}})
	}
}

func TestAnswersEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, tt := range map[string]struct {
			change func(*Identity)
			after  time.Duration
			asked  int
		}{
			"nothing happens":                     {func(*Identity) {}, time.Minute - 1, 1},
			"a grant ends":                        {func(*Identity) {}, time.Minute, 2},
			"another generation":                  {func(id *Identity) { id.news.hear(8, time.Now()) }, lag, 2},
			"a generation that is new":            {func(id *Identity) { id.news.hear(8, time.Now()) }, lag - 1, 1},
			"the policy comes again":              {func(id *Identity) { id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{}) }, 0, 2},
			"a revocation":                        {revoked("spiffe://sdktest.test/web"), 0, 2},
			"a revocation of somebody else":       {revoked("spiffe://sdktest.test/eve"), 0, 1},
			"a revocation that is not understood": {revoked(""), 0, 2},
			"revocations are stale":               {func(id *Identity) { id.denyAfter.Store(1); id.revocationsAsOf.Store(1) }, 0, 2},
		} {
			begun := time.Now()
			id, agent := asking(t, begun.Add(time.Minute).UnixNano())
			id.ready.init()
			id.Authorize(t.Context(), web("/"))
			tt.change(id)
			time.Sleep(tt.after - time.Since(begun))
			if id.Authorize(t.Context(), web("/")); agent.asked != tt.asked {
				t.Errorf("%s: asked %d times; want %d", name, agent.asked, tt.asked)
			}
		}
	})
}
