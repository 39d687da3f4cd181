// What a candidate says of the calls on this node, counted beside the decisions: no
// call waits for it. Where both policies are compiled the services compare
// themselves, and report counts.

package local

import (
	"context"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/policyfeed"
	"merlon.dev/policy"
	"merlon.dev/policy/comparison"
)

// maxToCompare is how many calls wait to be compared; further ones are not.
const maxToCompare = 256

// toCompare is a call that was decided.
type toCompare struct {
	trial   *trial
	choice  policyfeed.Choice
	in      *policy.Input
	decided policy.Decision
}

// trial is what is counted of one step of a candidate.
type trial struct {
	generation, version uint64
	step                uint32
	tally               comparison.Tally
}

// comparer is safe for concurrent use.
type comparer struct {
	queue chan toCompare
	due   chan struct{} // receives when there is something to report
	calls *prometheus.CounterVec

	mu  sync.Mutex
	now *trial // guarded by mu
}

func newComparer(to prometheus.Registerer) *comparer {
	c := &comparer{
		queue: make(chan toCompare, maxToCompare), due: make(chan struct{}, 1), now: &trial{},
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_agent_policy_compared_calls_total", Help: "Calls that the policy in force and its candidate were both asked about, by outcome (both_allow, both_deny, would_allow, would_deny: what the candidate would have done).",
		}, []string{"outcome"}),
	}
	to.MustRegister(c.calls)
	return c
}

// add takes counts in.
func (c *comparer) add(t *trial, r comparison.Report) {
	t.tally.Add(r)
	for _, n := range r.Sites {
		for outcome, calls := range map[string]uint64{"both_allow": n.BothAllow, "both_deny": n.BothDeny, "would_allow": n.WouldAllow, "would_deny": n.WouldDeny} {
			c.calls.WithLabelValues(outcome).Add(float64(calls))
		}
	}
	c.wake()
}

// trial is where counts of snapshot s belong; nil where that is out of date. Counts
// of the step before, which nobody has taken, go with it.
func (c *comparer) trial(s *policyfeed.Snapshot) *trial {
	_, candidate := s.Generations()
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.now.generation == candidate && c.now.step == s.Step:
	case s.Version < c.now.version:
		return nil
	default:
		c.now = &trial{generation: candidate, step: s.Step, version: s.Version}
	}
	return c.now
}

// offer has the call compared later, unless too many wait.
func (c *comparer) offer(s *policyfeed.Snapshot, choice policyfeed.Choice, in *policy.Input, d policy.Decision) {
	if choice.Beside == nil || d.Revision != choice.Decides.Generation() {
		return
	}
	if t := c.trial(s); t != nil {
		select {
		case c.queue <- toCompare{t, choice, in, d}:
		default:
		}
	}
}

// run compares until ctx ends. It is one goroutine: what a candidate can take of the
// node is one core at most.
func (c *comparer) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case call := <-c.queue:
			c.compare(ctx, call)
		}
	}
}

func (c *comparer) compare(ctx context.Context, call toCompare) {
	active, candidate := call.decided, call.choice.Beside.Authorize(ctx, call.in)
	if call.choice.Canary {
		active, candidate = candidate, active
	}
	var one comparison.Tally
	one.Note(call.in, call.choice.Canary, active, candidate)
	c.add(call.trial, one.Take())
}

func (c *comparer) wake() {
	select {
	case c.due <- struct{}{}:
	default:
	}
}

// counted is what was counted of one step of a candidate.
type counted struct {
	generation uint64
	step       uint32
	report     comparison.Report
}

// take returns what was counted since the last time.
func (c *comparer) take() counted {
	c.mu.Lock()
	t := c.now
	c.mu.Unlock()
	return counted{t.generation, t.step, t.tally.Take()}
}

// giveBack takes in again what could not be reported.
func (c *comparer) giveBack(n counted) {
	c.mu.Lock()
	t := c.now
	c.mu.Unlock()
	if t.generation == n.generation && t.step == n.step {
		t.tally.Add(n.report)
	}
}

// takeCounts adds what a service has compared: of its own destinations, which own
// knows, and of the candidate that is tried now.
func (c *comparer) takeCounts(s *policyfeed.Snapshot, counts *agentpb.Counts, own func(destination string) bool) {
	if _, candidate := s.Generations(); candidate == 0 || counts.GetCandidateGeneration() != candidate || counts.GetStep() != s.Step {
		return
	}
	r := comparison.Report{Sites: map[comparison.Site]comparison.Counts{}, Differences: map[comparison.Difference]uint64{}, Dropped: counts.GetDifferencesDropped()}
	for _, m := range counts.GetComparisons() {
		if own(m.GetDestination()) {
			r.Sites[comparison.Site{Destination: m.GetDestination(), Canary: m.GetCanary()}] = comparison.Counts{
				BothAllow: m.GetBothAllow(), BothDeny: m.GetBothDeny(), WouldAllow: m.GetWouldAllow(), WouldDeny: m.GetWouldDeny(),
			}
		}
	}
	for _, m := range counts.GetDifferences() {
		if own(m.GetDestination()) {
			r.Differences[comparison.Difference{
				Source: m.GetSource(), Destination: m.GetDestination(), Reason: policy.Reason(m.GetReason()), RuleID: m.GetRuleId(),
				CandidateReason: policy.Reason(m.GetCandidateReason()), CandidateRuleID: m.GetCandidateRuleId(), CandidateAllows: m.GetCandidateAllows(),
			}] = m.GetCalls()
		}
	}
	if t := c.trial(s); t != nil && !r.Empty() {
		c.add(t, r)
	}
}
