// What the agent decided, kept for calls that its policy cannot tell apart. It spares
// the way to the agent, and stands in for an agent that is away.

package sdk

import (
	"context"
	"time"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/policy/kept"
	"merlon.dev/policy/program"
)

// answers are the agent's decisions by one generation of the policy about calls to
// one destination.
type answers struct {
	generation uint64
	kept       *kept.Cache
}

func newAnswers(k *agentpb.Keep, generation uint64) *answers {
	return &answers{generation, kept.New(kept.Reads{
		Query: k.GetQuery(), Host: k.GetHost(), SourceAddress: k.GetSourceAddress(), DestinationAddress: k.GetDestinationAddress(),
		AllHeaders: k.GetAllHeaders(), Headers: k.GetHeaders(),
	}, k.GetEnds())}
}

// answers are those that may be used now; nil for none.
func (id *Identity) answers(destination string, now time.Time) *answers {
	all := id.programs.Load()
	if all == nil {
		return nil
	}
	if a := all.answers[destination]; a != nil && id.news.decides(now) {
		return a
	}
	return nil
}

// decideKept decides by what is kept, or has the agent decide and keeps that.
func (id *Identity) decideKept(ctx context.Context, a *answers, in *policy.Input, now time.Time) policy.Decision {
	if id.stale(now) == "" {
		if v, ok := a.kept.Find(in, now.UnixNano()); ok {
			d := policy.Decision{
				Allow: v.Allow(), Reason: v.Reason, RuleID: v.RuleID, Response: v.Response, DecisionID: policy.NewDecisionID(), Revision: a.generation,
				DryRun: v.Differing,
			}
			id.note(in, &d, now)
			return d
		}
	}
	d := id.askAgent(ctx, in)
	if d.Revision == a.generation && ofPolicy(d.Reason) {
		a.kept.Put(in, program.Verdict{Reason: d.Reason, RuleID: d.RuleID, Response: d.Response, Differing: d.DryRun}, now.UnixNano(), time.Now().UnixNano())
	}
	return d
}

// ofPolicy says whether r is what a policy says of a call, and not what stands before
// any policy or beside it.
func ofPolicy(r policy.Reason) bool {
	switch r {
	case policy.Allowed, policy.DenyRule, policy.NoGrant, policy.MethodNotGranted, policy.PathNotGranted:
		return true
	}
	return false
}

// forgetAnswers has the agent asked again: it may know of what stands before the policy,
// and is not known here.
func (id *Identity) forgetAnswers() {
	for {
		was := id.programs.Load()
		if was == nil || len(was.answers) == 0 {
			return
		}
		next := &programs{by: was.by, answers: make(map[string]*answers, len(was.answers)), version: was.version, trial: was.trial}
		for destination, a := range was.answers {
			reads, ends := a.kept.For()
			next.answers[destination] = &answers{a.generation, kept.New(reads, ends)}
		}
		if id.programs.CompareAndSwap(was, next) {
			return
		}
	}
}
