// What a candidate of the policy would have said of the calls that are decided here,
// counted for the agent. A share of them is compared, right after the decision, so
// that a busy service decides as fast as without a candidate.

package sdk

import (
	"sync/atomic"
	"time"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/policy/comparison"
	"merlon.dev/policy/program"
)

// comparedPerSecond is how many calls of a second are compared, the first ones. Each
// costs about what a decision does.
const comparedPerSecond = 1000

// compiled is the policy of one destination: what decides, and what is compared with
// it.
type compiled struct {
	*program.Program
	beside *program.Program // nil: nothing is
	canary bool             // the candidate decides, and beside is the active policy
	trial  *trial
}

// trial is what is counted of one step of a candidate.
type trial struct {
	generation uint64
	step       uint32
	tally      comparison.Tally
	second     atomic.Int64 // in which calls are counted
	compared   atomic.Int64 // of these
}

// due says whether one more call of this second is compared.
func (t *trial) due(now time.Time) bool {
	if s := now.Unix(); t.second.Load() != s {
		t.second.Store(s)
		t.compared.Store(0)
	}
	return t.compared.Load() < comparedPerSecond && t.compared.Add(1) <= comparedPerSecond
}

// compare counts what the policy beside p says of a call that p decided as d.
func (id *Identity) compare(p *compiled, in *policy.Input, d policy.Decision, now time.Time) {
	if p.beside == nil || d.Revision == 0 || !p.trial.due(now) {
		return
	}
	v := p.beside.Decide(in, now)
	active, candidate := d, policy.Decision{Allow: v.Allow(), Reason: v.Reason, RuleID: v.RuleID}
	if p.canary {
		active, candidate = candidate, active
	}
	if p.trial.tally.Note(in, p.canary, active, candidate) {
		id.report.poke()
	}
}

// counted takes what was compared since the last time; nil for nothing.
func (t *trial) counted() *agentpb.Counts {
	r := t.tally.Take()
	if r.Empty() {
		return nil
	}
	m := &agentpb.Counts{CandidateGeneration: t.generation, Step: t.step, DifferencesDropped: r.Dropped}
	for site, n := range r.Sites {
		m.Comparisons = append(m.Comparisons, &agentpb.Comparison{
			Destination: site.Destination, Canary: site.Canary,
			BothAllow: n.BothAllow, BothDeny: n.BothDeny, WouldAllow: n.WouldAllow, WouldDeny: n.WouldDeny,
		})
	}
	for d, n := range r.Differences {
		m.Differences = append(m.Differences, &agentpb.Difference{
			Source: d.Source, Destination: d.Destination, Reason: string(d.Reason), RuleId: d.RuleID,
			CandidateReason: string(d.CandidateReason), CandidateRuleId: d.CandidateRuleID, CandidateAllows: d.CandidateAllows, Calls: n,
		})
	}
	return m
}

// withPolicy adds to m, which may be nil, what the agent is to know of the policy here:
// what was compared, and by which version calls are decided, if that is another than
// told. It returns nil where there is nothing to tell.
func (id *Identity) withPolicy(m *agentpb.ReportRequest, told uint64) *agentpb.ReportRequest {
	all := id.programs.Load()
	if all == nil {
		return m
	}
	var counts *agentpb.Counts
	if m.GetCounts() == nil { // else it is one that could not be sent, with its own
		counts = all.trial.counted()
	}
	if m == nil {
		if counts == nil && all.version == told {
			return nil
		}
		m = &agentpb.ReportRequest{}
	}
	if counts != nil {
		m.Counts = counts
	}
	m.PolicyVersion = all.version
	if own := id.current.Load(); own.svid != nil {
		if p := all.by[own.svid.ID.String()]; p != nil {
			m.PolicyGeneration = p.Generation()
		}
	}
	return m
}
