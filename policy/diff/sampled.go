package diff

// This file compares policies with Rego of their own, about which nothing can be said
// for all calls: both are asked about calls that are made of their own words.

import (
	"context"
	"slices"
	"time"

	"merlon.dev/policy"
	"merlon.dev/policy/engine"
)

const (
	// perDestination and maxCalls are how many calls are made.
	perDestination = 400
	maxCalls       = 20_000
	// maxTime is how long the policies may take for them; hostile ones take 50 ms a call.
	maxTime = 20 * time.Second
)

// Elsewhere stands for the services that neither policy names.
const Elsewhere = "spiffe://any.other.invalid/service"

// Sample is what two policies say of sampled calls. It shows differences; that it shows
// none proves nothing, but for the destinations in Unchanged.
type Sample struct {
	// Calls is how many calls were made, to so many Destinations: fewer where the
	// policies took long.
	Calls        int `json:"calls"`
	Destinations int `json:"destinations"`
	// Unchanged are the destinations whose compiled policies are the same, so that
	// no call to them is decided otherwise.
	Unchanged []string  `json:"unchanged"`
	Added     []Finding `json:"added"`
	Removed   []Finding `json:"removed"`
}

// Finding counts calls from a source to a destination that were decided otherwise, for
// the same reasons and by the same rules.
type Finding struct {
	Source      string        `json:"source"`
	Destination string        `json:"destination"`
	Before      policy.Reason `json:"before"`
	BeforeRule  string        `json:"before_rule,omitempty"`
	After       policy.Reason `json:"after"`
	AfterRule   string        `json:"after_rule,omitempty"`
	Calls       int           `json:"calls"`
	Example     *policy.Input `json:"example"`
}

// Policies asks a and b about sampled calls.
func Policies(ctx context.Context, a, b *engine.Engine) (*Sample, error) {
	s := &Sample{Unchanged: []string{}, Added: []Finding{}, Removed: []Finding{}}
	named := append(slices.Concat(a.Named(), b.Named()), Elsewhere)
	slices.Sort(named)
	var changed []string
	for _, d := range slices.Compact(named) {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if engine.Same(ctx, a, b, d) {
			s.Unchanged = append(s.Unchanged, d)
		} else {
			changed = append(changed, d)
		}
	}
	if len(changed) == 0 {
		return s, nil
	}
	s.Destinations = len(changed)
	n := min(perDestination*len(changed), max(maxCalls, len(changed)))
	if err := s.compare(ctx, a, b, engine.SampleCalls(changed, n, a, b), maxTime); err != nil {
		return nil, err
	}
	return s, nil
}

// compare asks a and b about calls, as many as there is time for.
func (s *Sample) compare(ctx context.Context, a, b *engine.Engine, calls []*policy.Input, limit time.Duration) error {
	found, begun := map[Finding]*Finding{}, time.Now()
	for _, in := range calls {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(begun) > limit {
			break
		}
		s.Calls++
		before, after := a.Authorize(ctx, in), b.Authorize(ctx, in)
		if before.Allow == after.Allow {
			continue
		}
		key := Finding{Source: in.Source, Destination: in.Destination, Before: before.Reason, BeforeRule: before.RuleID, After: after.Reason, AfterRule: after.RuleID}
		if found[key] == nil {
			f := key
			f.Example = in
			found[key] = &f
		}
		found[key].Calls++
	}
	for _, f := range found {
		if f.After == policy.Allowed {
			s.Added = append(s.Added, *f)
		} else {
			s.Removed = append(s.Removed, *f)
		}
	}
	slices.SortFunc(s.Added, byPlace)
	slices.SortFunc(s.Removed, byPlace)
	return nil
}

func byPlace(a, b Finding) int {
	return slices.Compare(
		[]string{a.Destination, a.Source, string(a.Before), a.BeforeRule, string(a.After), a.AfterRule},
		[]string{b.Destination, b.Source, string(b.Before), b.BeforeRule, string(b.After), b.AfterRule})
}
