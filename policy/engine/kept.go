package engine

// This file keeps the decisions of OPA for calls that agree in everything that the
// policy can read, unless its answer is another one each time.

import (
	"context"

	"merlon.dev/policy"
	"merlon.dev/policy/engine/residual"
	"merlon.dev/policy/grant"
	"merlon.dev/policy/kept"
	"merlon.dev/policy/program"
)

// decideKept is decideByOPA with what is kept in front of it.
func (e *Engine) decideKept(ctx context.Context, in *policy.Input) (policy.Decision, answer) {
	if e.kept == nil || in == nil || in.Source == "" || in.JWT != nil {
		return e.decideByOPA(ctx, in)
	}
	now := e.now()
	if !e.notAfter.IsZero() && now.After(e.notAfter) || in.Protocol != policy.TCP && policy.CheckPath(in.Path) != nil {
		return e.decideByOPA(ctx, in)
	}
	at := now.UnixNano()
	if v, ok := e.kept.Find(in, at); ok {
		e.count(v.DryRun)
		return policy.Decision{
			Allow: v.Allow(), Reason: v.Reason, RuleID: v.RuleID, DecisionID: policy.NewDecisionID(), Revision: e.generation,
			Response: v.Response,
		}, answer{dryRun: v.DryRun}
	}
	d, a := e.decideByOPA(ctx, in)
	if a.err == nil {
		e.kept.Put(in, program.Verdict{Reason: d.Reason, RuleID: d.RuleID, DryRun: a.dryRun, Response: d.Response}, at, e.now().UnixNano())
	}
	return d, a
}

// keep prepares e.kept, unless the policy's answer is another one each time.
func (e *Engine) keep() {
	reads := kept.Reads{}
	if e.ownRego {
		if why := residual.NamesJWT(e.program.compiler); why != nil {
			e.readsJWT, e.unsteady = true, why
			return
		}
		var err error
		if reads, err = residual.FindReads(e.program.compiler); err != nil {
			e.unsteady = err
			return
		}
	}
	var ends []int64
	for i := range e.grants {
		if n := nativeGrant(&e.grants[i]); n.Expires != 0 {
			ends = append(ends, n.Expires)
		}
	}
	if !e.notAfter.IsZero() {
		ends = append(ends, grant.UnixNano(e.notAfter.Add(1))) // it holds until then, inclusive
	}
	e.kept = kept.New(reads, ends)
}

// Keep says for which further calls decisions of e stand, and when they end; false
// where its answer to one call can be another each time.
func (e *Engine) Keep() (reads kept.Reads, ends []int64, ok bool) {
	if e.kept == nil {
		return kept.Reads{}, nil, false
	}
	reads, ends = e.kept.For()
	return reads, ends, true
}

// Kept says whether OPA's decisions are kept for calls that agree in all that the
// policy can read, and if not why.
func (e *Engine) Kept() error { return e.unsteady }

// ReadsJWT says whether the policy may read input.jwt. Where it does, the caller of
// Authorize verifies the JWT-SVID of the call, if it has one, for the destination,
// and puts its claims into the input. A policy gets them only if its Rego names
// "jwt"; what it decides is kept by nobody, since a token ends.
func (e *Engine) ReadsJWT() bool { return e.readsJWT }
