package engine

// This file puts a decision into sentences. It is not on the path of calls.

import (
	"context"
	"fmt"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

// maxSentences bounds an explanation where many grants nearly match.
const maxSentences = 10

// Explain decides the call in as Authorize does, with a decision ID of its
// own, and says why in sentences, the most helpful first: for a denial the
// grants that came nearest, as "grant web-reads-orders allows GET, not POST".
func (e *Engine) Explain(ctx context.Context, in *policy.Input) (policy.Decision, []string) {
	d, a := e.decide(ctx, in)
	s := e.sentences(d, a, in)
	for _, id := range a.dryRun {
		s = append(s, fmt.Sprintf("grant %s matches, but is in mode dry-run and decides nothing", id))
	}
	return d, s
}

func (e *Engine) sentences(d policy.Decision, a answer, in *policy.Input) []string {
	switch {
	case a.err != nil:
		return []string{a.err.Error()}
	case d.Reason == policy.NoIdentity:
		return []string{"the caller proved no SPIFFE ID"}
	case d.Reason == policy.StalePolicy:
		return []string{fmt.Sprintf("policy generation %d was valid until %s", e.generation, e.notAfter.UTC().Format("2006-01-02T15:04:05Z"))}
	case d.Reason == policy.Error:
		return []string{fmt.Sprintf("the policy's Rego rule %s is not a boolean", d.RuleID[len("rego:"):])}
	case d.RuleID == "rego:allow", d.RuleID == "rego:deny":
		return []string{fmt.Sprintf("the policy's Rego rule %s decides", d.RuleID[len("rego:"):])}
	case d.Reason == policy.Allowed:
		return []string{fmt.Sprintf("grant %s allows the call", d.RuleID)}
	case d.Reason == policy.DenyRule:
		return []string{fmt.Sprintf("grant %s denies the call", d.RuleID)}
	}
	return e.nearest(in)
}

// nearest explains a denial by default.
func (e *Engine) nearest(in *policy.Input) []string {
	now := e.now()
	var s []string
	for _, g := range grant.Decide(e.grants, in, now).Nearest {
		s = append(s, g.Explain(in, g.Fit(in, now)))
		if len(s) == maxSentences {
			return append(s, "more grants come as near")
		}
	}
	if s == nil {
		s = append(s, fmt.Sprintf("no grant lets %s call %s over %s", in.Source, orUnknown(in.Destination), in.Protocol))
	}
	for i := range e.grants {
		g := e.grants[i]
		if g.Mode == grant.DryRun || g.Effect == grant.Deny || !g.Expired(now) {
			continue
		}
		if g.Expires = nil; g.Fit(in, now) == grant.Everything && len(s) < maxSentences {
			s = append(s, fmt.Sprintf("grant %s expired at %s", g.ID, e.grants[i].Expires.UTC().Format("2006-01-02T15:04:05Z")))
		}
	}
	return s
}

func orUnknown(id string) string {
	if id == "" {
		return "an unknown service"
	}
	return id
}
