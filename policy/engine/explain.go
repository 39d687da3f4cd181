package engine

// This file puts a decision into sentences. It is not on the path of calls.

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

// maxSentences bounds an explanation where many grants nearly match.
const maxSentences = 10

// How says what an explanation is about beside the call.
type How struct {
	// At is the time that the policy is asked for; zero means now.
	At time.Time
	// Trace asks for OPA's trace.
	Trace bool
}

// Explanation is a decision and what it rests on.
type Explanation struct {
	policy.Decision
	// Engine decides such calls: "native" or "opa".
	Engine string
	// Details says why in sentences, the most helpful first: for a denial the
	// grants that came nearest, as "grant web-reads-orders: method POST not in
	// [GET]", and the expressions of own Rego that did not hold, by file and line.
	Details []string
	// Tried are the dry-run grants that match, also those that would change nothing.
	Tried []string
	// Trace is OPA's, of the whole evaluation, where it was asked for.
	Trace string
}

// Explain decides the call in by OPA, with a decision ID of its own, and says why.
// It counts nothing.
func (e *Engine) Explain(ctx context.Context, in *policy.Input, how How) Explanation {
	now := how.At
	if now.IsZero() {
		now = e.now()
	}
	x := Explanation{Engine: "native"}
	if in != nil {
		if _, err := e.Program(ctx, in.Destination); err != nil {
			x.Engine = "opa"
		}
	}
	var a answer
	x.Decision, a = e.decideAt(ctx, in, now, e.limit)
	x.Details, x.Tried = e.sentences(ctx, x.Decision, a, in, now), a.dryRun
	for _, id := range a.dryRun {
		x.Details = append(x.Details, fmt.Sprintf("dry-run grant %s would %s the call; it decides nothing", id, e.effect(id)))
	}
	if how.Trace && in != nil {
		x.Trace = e.trace(ctx, in, now)
	}
	return x
}

func (e *Engine) effect(id string) grant.Effect {
	i := slices.IndexFunc(e.grants, func(g grant.Grant) bool { return g.ID == id })
	if i >= 0 && e.grants[i].Effect == grant.Deny {
		return grant.Deny
	}
	return grant.Allow
}

func (e *Engine) sentences(ctx context.Context, d policy.Decision, a answer, in *policy.Input, now time.Time) []string {
	switch {
	case a.err != nil:
		return []string{a.err.Error()}
	case d.Reason == policy.NoIdentity:
		return []string{"the caller proved no SPIFFE ID"}
	case d.Reason == policy.StalePolicy:
		return []string{fmt.Sprintf("policy generation %d was valid until %s", e.generation, rfc3339(e.notAfter))}
	case strings.HasPrefix(d.RuleID, "rego:"):
		return e.ownSentences(ctx, d, in, now)
	case d.Reason == policy.Allowed:
		return []string{fmt.Sprintf("grant %s allows the call", d.RuleID)}
	case d.Reason == policy.DenyRule:
		return []string{fmt.Sprintf("grant %s denies the call", d.RuleID)}
	}
	s := e.nearest(in, now)
	if e.ownRego {
		held, failed := e.grounds(ctx, in, now, "allow")
		for _, h := range held { // an object, for a rule that is true would have allowed it
			s = append(s, h+", which does not allow")
		}
		s = append(s, failed...)
	}
	return s
}

// ownSentences are about a decision by the policy's own Rego.
func (e *Engine) ownSentences(ctx context.Context, d policy.Decision, in *policy.Input, now time.Time) []string {
	rule := strings.TrimPrefix(d.RuleID, "rego:")
	if d.Reason == policy.Error {
		return []string{fmt.Sprintf("the policy's Rego rule %s is not a boolean", rule)}
	}
	s := []string{fmt.Sprintf("the policy's Rego rule %s decides", rule)}
	held, _ := e.grounds(ctx, in, now, rule)
	return append(s, held...)
}

// nearest explains a denial by default: the grants that the reason is about; where
// there are none, those that the least keeps from the call; and those that ended.
func (e *Engine) nearest(in *policy.Input, now time.Time) (s []string) {
	say := func(grants []*grant.Grant) {
		for _, g := range grants {
			if len(s) == maxSentences {
				s = append(s, "more grants come as near")
			}
			if len(s) > maxSentences {
				return
			}
			sentence, _ := g.Explain(in, now)
			s = append(s, sentence)
		}
	}
	out := grant.Decide(e.grants, in, now)
	say(out.Nearest)
	fewest, far, ended := farthest, []*grant.Grant(nil), []*grant.Grant(nil)
	for i := range e.grants {
		g := &e.grants[i]
		if g.Mode == grant.DryRun || g.Effect == grant.Deny {
			continue
		}
		_, lacks := g.Explain(in, now)
		switch {
		case g.Expired(now) && lacks == 1:
			ended = append(ended, g)
		case lacks < fewest:
			fewest, far = lacks, []*grant.Grant{g}
		case lacks == fewest:
			far = append(far, g)
		}
	}
	if out.Nearest == nil {
		s = append(s, fmt.Sprintf("no grant lets %s call %s over %s", in.Source, orUnknown(in.Destination), in.Protocol))
		ended = append(ended, far...)
	}
	say(ended)
	return s
}

// farthest is how many things may keep a grant from a call that it is told about.
const farthest = 3

func orUnknown(id string) string {
	if id == "" {
		return "an unknown service"
	}
	return id
}

func rfc3339(t time.Time) string { return t.UTC().Format(time.RFC3339) }
