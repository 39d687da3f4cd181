// Why a call was refused, on the admin socket: the record of the decision, and what
// the policy that made it says of the call, also when another is active by now.

package local

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/policy/engine"
)

// ExplainDecision finds one of the last decisions and asks the generation that
// made it once more, for the time at which it did, in words.
func (s *Server) ExplainDecision(ctx context.Context, req *agentpb.ExplainDecisionRequest) (*agentpb.ExplainDecisionResponse, error) {
	id, err := policy.ParseDecisionID(req.GetDecisionId())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	rec, ok := s.decisions.await(ctx, id)
	if !ok {
		return nil, status.Errorf(codes.NotFound,
			"decision %.64q is not among the last %d denials and %d allowed calls of this agent; ask the agent on the node of the called service", req.GetDecisionId(), maxDenied, maxAllowed)
	}
	m := &agentpb.ExplainDecisionResponse{
		Decision: decisionToPB(rec.decision), Input: inputToPB(&rec.input),
		DecidedAt: timestamppb.New(rec.decidedAt), Hint: hintFor(rec),
	}
	if rec.decision.Revision == 0 {
		m.Details = []string{"no policy was asked: the reason stood before it"}
		return m, nil
	}
	asked, err := s.o.EngineOf(ctx, rec.decision.Revision)
	if err != nil {
		m.Details = []string{fmt.Sprintf("policy generation %d decided, and cannot be asked any more: %v", rec.decision.Revision, err)}
		return m, nil
	}
	x := asked.Explain(ctx, &rec.input, engine.How{At: rec.decidedAt, Trace: req.GetTrace()})
	m.Details, m.Engine, m.Trace = x.Details, x.Engine, x.Trace
	m.Details = append(m.Details, rec.caveats(&x, s.decisions.masked(&rec))...)
	return m, nil
}

// caveats say why x may not be what was decided; the values of these headers
// were not kept.
func (rec *record) caveats(x *engine.Explanation, names []string) (words []string) {
	if len(names) > 0 {
		words = append(words, fmt.Sprintf("the values of these headers were not kept, so a policy that reads them may come out differently here (explain_headers keeps them): %s", strings.Join(names, ", ")))
	}
	if rec.claims {
		words = append(words, "the claims of the call's JWT-SVID were not kept, so a policy that reads input.jwt may come out differently here")
	}
	if rec.shortened {
		words = append(words, "path, headers or query were too long to be kept whole, so a policy that reads them may come out differently here")
	}
	if d := rec.decision; x.Allow != d.Allow || x.Reason != d.Reason || x.RuleID != d.RuleID {
		words = append(words, strings.TrimSpace(fmt.Sprintf("asked again, the policy says %s %s", x.Reason, x.RuleID)))
	}
	return words
}

// hintFor says what to do next. The decision's own hint would lead back here.
func hintFor(rec record) string {
	d := rec.decision
	if d.Allow {
		return ""
	}
	if hint := d.Hint(); hint != "merlon explain decision "+d.DecisionID.String() {
		return hint
	}
	return fmt.Sprintf("to allow it, add a grant from %s to %s and run: merlon policy push FOLDER", rec.input.Source, rec.input.Destination)
}
