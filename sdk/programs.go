// Decisions in this process: the policy comes from the agent, compiled for this
// service. What is not compiled the agent decides, call by call.

package sdk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/policy/program"
)

// The feeds of programs and of records, as logs name them.
const (
	policyFeed = "policy"
	reportFeed = "decisions"
)

// programs are the compiled policies of this process's SPIFFE IDs, and what is kept
// where there is none. The maps never change.
type programs struct {
	by      map[string]*compiled
	answers map[string]*answers
	// version is another number for each state of the node's policy, and rises.
	version uint64
	trial   *trial
}

// followPolicy is one stream of compiled policies.
func (id *Identity) followPolicy(ctx context.Context, progress func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := id.agent.local.WatchPolicy(ctx, &agentpb.WatchPolicyRequest{})
	if err != nil {
		return err
	}
	for {
		res, err := stream.Recv()
		if err != nil {
			return err
		}
		id.takePrograms(ctx, res)
		progress()
	}
}

// takePrograms puts the programs of res in the place of all before. One that is
// malformed is left out: the agent decides then.
func (id *Identity) takePrograms(ctx context.Context, res *agentpb.WatchPolicyResponse) {
	next := &programs{
		by: make(map[string]*compiled, len(res.GetPrograms())), answers: make(map[string]*answers),
		version: versionOf(res.GetPolicyVersion(), res.GetPolicyGeneration()), trial: id.trialOf(res),
	}
	for _, pb := range res.GetPrograms() {
		if len(pb.GetEncoded()) == 0 {
			id.log.LogAttrs(ctx, slog.LevelInfo, "policy is not compiled; the agent decides each call",
				slog.String("destination", pb.GetDestination()), slog.String("reason", pb.GetReason()))
			if pb.GetKeep() != nil {
				generation := res.GetPolicyGeneration()
				if pb.GetCanary() {
					generation = res.GetCandidateGeneration()
				}
				next.answers[pb.GetDestination()] = newAnswers(pb.GetKeep(), generation)
			}
			continue
		}
		p, err := decodeFor(pb.GetDestination(), pb.GetEncoded())
		switch {
		case errors.Is(err, program.ErrVersion):
			id.log.LogAttrs(ctx, slog.LevelInfo, "compiled policy has another form; the agent decides each call", slog.Any("err", err))
		case err != nil:
			id.log.LogAttrs(ctx, slog.LevelError, "compiled policy not taken; the agent decides each call",
				slog.String("destination", pb.GetDestination()), slog.Any("err", err))
		default:
			next.by[p.Destination()] = &compiled{Program: p, beside: id.besideOf(ctx, pb), canary: pb.GetCanary(), trial: next.trial}
		}
	}
	id.programs.Store(next)
	id.news.arrive(next.version)
	id.calls.changed()
	id.report.poke() // the agent is to know
}

// versionOf is version; of an agent that knows of none, the generation.
func versionOf(version, generation uint64) uint64 {
	if version == 0 {
		return generation
	}
	return version
}

func decodeFor(destination string, encoded []byte) (*program.Program, error) {
	p, err := program.Decode(encoded)
	if err == nil && p.Destination() != destination {
		err = fmt.Errorf("it is for %s", p.Destination())
	}
	return p, err
}

// besideOf is what is to be compared; one that is malformed is left out.
func (id *Identity) besideOf(ctx context.Context, pb *agentpb.Program) *program.Program {
	if len(pb.GetBeside()) == 0 {
		return nil
	}
	p, err := decodeFor(pb.GetDestination(), pb.GetBeside())
	if err != nil {
		id.log.LogAttrs(ctx, slog.LevelWarn, "compiled policy is not compared",
			slog.String("destination", pb.GetDestination()), slog.Any("err", err))
		return nil
	}
	return p
}

// trialOf goes on counting where res is of the same step of the same candidate.
func (id *Identity) trialOf(res *agentpb.WatchPolicyResponse) *trial {
	if all := id.programs.Load(); all != nil && all.trial.generation == res.GetCandidateGeneration() && all.trial.step == res.GetStep() {
		return all.trial
	}
	return &trial{generation: res.GetCandidateGeneration(), step: res.GetStep()}
}

// program is the one that decides calls to destination now; nil where the agent
// must be asked.
func (id *Identity) program(destination string, now time.Time) *compiled {
	all := id.programs.Load()
	if all == nil {
		return nil
	}
	if p := all.by[destination]; p != nil && id.news.decides(now) {
		return p
	}
	return nil
}

// decideHere decides the call by p.
func (id *Identity) decideHere(p *compiled, in *policy.Input, now time.Time) policy.Decision {
	d := policy.Decision{DecisionID: policy.NewDecisionID(), Revision: p.Generation()}
	if stale := id.stale(now); stale != "" {
		d.Reason, d.Revision = stale, 0
	} else {
		v := p.Decide(in, now)
		d.Allow, d.Reason, d.RuleID, d.Response, d.DryRun = v.Allow(), v.Reason, v.RuleID, v.Response, v.Differing
	}
	id.note(in, &d, now)
	id.compare(p, in, d, now)
	return d
}

// stale is the reason to deny every call where the agent has heard nothing from the CA
// for longer than its configuration allows, of revocations or of the policy; empty
// where it has. That the agent itself is away counts as that.
func (id *Identity) stale(now time.Time) policy.Reason {
	switch {
	case olderThan(id.denyAfter.Load(), &id.revocationsAsOf, now):
		return policy.StaleRevocations
	case olderThan(id.denyPolicyAfter.Load(), &id.news.asOf, now):
		return policy.StalePolicy
	}
	return ""
}

// olderThan says whether asOf is longer ago than age; 0: that does not matter.
func olderThan(age int64, asOf *atomic.Int64, now time.Time) bool {
	return age > 0 && steady(now).UnixNano()-asOf.Load() > age
}
