// How policy fares: what agents say of it, who lags, what a candidate would change, and
// the canary that is taken back to shadow because it denies too much. The policy in
// force is never taken back by itself: a flood of denials would undo a policy that was
// tightened.

package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/rollout"
	"merlon.dev/ca/internal/store"
	"merlon.dev/policy"
	"merlon.dev/policy/comparison"
)

// Bounds of what is kept of one agent's report.
const (
	maxFaultBytes = 500
	maxProcesses  = 256
)

// hearPolicy takes in what the follower's agent says of the policy on its node.
func (f *follower) hearPolicy(m *capb.PolicyReport) {
	if m == nil {
		return
	}
	s, agent := f.Service, f.caller.Agent
	// An agent says nothing of other nodes' calls.
	ids := namedBy(m)
	s.registry.Mark(agent.ID, ids)
	own := func(id string) bool { return ids[id] }
	said := saidBy(m, own)
	s.rollout.Hear(agent.ID.String(), said)
	if c := m.GetCounts(); c != nil {
		head, _ := s.registry.PolicyHead(said.Bundle)
		share, _, _ := s.registry.PolicyShares(said.Bundle, s.opts.ReplicaName)
		s.rollout.Count(said.Bundle, rollout.TrialOf(head), rollout.Trial{Generation: c.GetCandidateGeneration(), Step: c.GetStep()}, share, countsOf(c, own))
	}
}

// namedBy are the services of which m says something.
func namedBy(m *capb.PolicyReport) map[string]bool {
	ids := map[string]bool{}
	for _, p := range m.GetProcesses()[:min(len(m.GetProcesses()), maxProcesses)] {
		ids[p.GetSpiffeId()] = false
	}
	for _, c := range m.GetCounts().GetComparisons() {
		ids[c.GetDestination()] = false
	}
	for _, d := range m.GetCounts().GetDifferences() {
		ids[d.GetDestination()] = false
	}
	return ids
}

// saidBy is what is kept of m, by an agent whose node has the services that own knows.
func saidBy(m *capb.PolicyReport, own func(id string) bool) rollout.Said {
	said := rollout.Said{
		Bundle: fmt.Sprintf("%.*s", maxFaultBytes, bundleName(m.GetName())), Candidate: m.GetCandidateGeneration(), Fault: fmt.Sprintf("%.*s", maxFaultBytes, m.GetFault()),
		Unnamed: max(0, int(m.GetProcessCount())-len(m.GetProcesses())),
	}
	for _, p := range m.GetProcesses()[:min(len(m.GetProcesses()), maxProcesses)] {
		if !own(p.GetSpiffeId()) {
			continue // it may be gone from the node by now
		}
		process := rollout.Process{SPIFFEID: p.GetSpiffeId(), PID: p.GetPid(), Generation: p.GetGeneration()}
		if since := p.GetLaggingSince(); since.CheckValid() == nil { // what is written down, in JSON, has no other
			process.Lagging = since.AsTime()
		}
		said.Processes = append(said.Processes, process)
	}
	return said
}

func countsOf(m *capb.PolicyCounts, own func(string) bool) comparison.Report {
	r := comparison.Report{Sites: map[comparison.Site]comparison.Counts{}, Differences: map[comparison.Difference]uint64{}, Dropped: m.GetDifferencesDropped()}
	for _, c := range m.GetComparisons() {
		if own(c.GetDestination()) {
			r.Sites[comparison.Site{Destination: c.GetDestination(), Canary: c.GetCanary()}] = comparison.Counts{
				BothAllow: c.GetBothAllow(), BothDeny: c.GetBothDeny(), WouldAllow: c.GetWouldAllow(), WouldDeny: c.GetWouldDeny(),
			}
		}
	}
	for _, d := range m.GetDifferences() {
		// A source is any caller's; it is a SPIFFE ID, or nothing is shown of it.
		if _, err := spiffeid.FromString(d.GetSource()); err == nil && own(d.GetDestination()) {
			r.Differences[comparison.Difference{
				Source: d.GetSource(), Destination: d.GetDestination(), Reason: policy.Reason(d.GetReason()), RuleID: d.GetRuleId(),
				CandidateReason: policy.Reason(d.GetCandidateReason()), CandidateRuleID: d.GetCandidateRuleId(), CandidateAllows: d.GetCandidateAllows(),
			}] = d.GetCalls()
		}
	}
	return r
}

// TendRollouts writes down what other replicas are to know, and pauses canaries that
// deny too much. The CA calls it every few seconds.
func (s *Service) TendRollouts(ctx context.Context) error {
	if !s.rollout.TakeDirty() {
		return nil
	}
	var errs []error
	for _, h := range s.registry.PolicyHeads() {
		errs = append(errs, s.shareRollout(ctx, h), s.pauseCanary(ctx, h))
	}
	err := errors.Join(errs...)
	if err != nil {
		s.rollout.Dirty() // again the next time
	}
	return err
}

// shareRollout writes down what is known here, where somebody reads it: another
// replica, or this one after a restart, which must not forget what was counted.
func (s *Service) shareRollout(ctx context.Context, h *release.Head) error {
	own, others, _ := s.registry.PolicyShares(h.Name, s.opts.ReplicaName)
	if h.Candidate == nil && len(others) == 0 && len(s.registry.Replicas()) < 2 {
		return nil
	}
	trial := rollout.TrialOf(h)
	share := rollout.NewShare(h.Name, s.opts.ReplicaName, h.Generation, trial, s.rollout.Counts(h.Name, trial, own, nil), s.ownPoints(h.Name, time.Now()))
	share.Hear(s.ownOPAs(h, time.Now()))
	put, err := share.Put()
	if err != nil {
		return err
	}
	if own != nil {
		if before, err := own.Put(); err == nil && string(before.Value) == string(put.Value) {
			return nil
		}
	}
	if _, err := s.opts.Store.Txn(ctx, nil, []store.Op{put}, nil); err != nil {
		return fmt.Errorf("write down what is known of policy bundle %s: %w", h.Name, err)
	}
	return nil
}

func (s *Service) pauseCanary(ctx context.Context, h *release.Head) error {
	if h.Candidate == nil || h.Candidate.Canary.Shadow() {
		return nil
	}
	own, others, _ := s.registry.PolicyShares(h.Name, s.opts.ReplicaName)
	trial := rollout.TrialOf(h)
	alarm, past := s.opts.Canary.Judge(s.rollout.Counts(h.Name, trial, own, others), time.Now())
	if !past {
		return nil
	}
	paused, err := s.opts.Releases.Pause(ctx, h.Name, trial.Generation, trial.Step, alarm)
	if err != nil || paused == nil { // another replica was faster
		return err
	}
	s.metrics.canaryAlarms.Inc()
	what := fmt.Sprintf("pause the canary of policy bundle %s: of %d calls that generation %d allows, candidate %d denied %d", h.Name, alarm.Allowed, h.Generation, trial.Generation, alarm.Denied)
	if alarm.Destination != "" {
		what += " at " + alarm.Destination
	}
	s.log.LogAttrs(ctx, slog.LevelError, "canary paused: the candidate denies calls that the policy in force allows, which decides all of them again",
		slog.String("name", h.Name), slog.Uint64("policy_revision", h.Generation), slog.Uint64("candidate_revision", trial.Generation),
		slog.String("destination", alarm.Destination), slog.Uint64("allowed", alarm.Allowed), slog.Uint64("denied", alarm.Denied),
		slog.String("hint", "merlon policy status shows which calls; then merlon policy abort, or merlon policy canary again if that is meant"))
	return s.audit(ctx, audit.Record{Time: time.Now(), Type: audit.Admin, Actor: "ca", Detail: what})
}

// ownPoints are the agents that are connected here and follow the bundle called name.
func (s *Service) ownPoints(name string, now time.Time) []rollout.Point {
	var points []rollout.Point
	for _, a := range s.registry.Agents() {
		if p := s.pointOf(a); a.Connected && counts(a, now) && p.Bundle == name {
			points = append(points, p)
		}
	}
	return points
}

// counts says whether an agent should have the policy.
func counts(a registry.AgentState, now time.Time) bool {
	return a.Standing == attest.Good && now.Before(a.NotAfter)
}

func (s *Service) pointOf(a registry.AgentState) rollout.Point {
	said, _ := s.rollout.Said(a.ID.String())
	return rollout.Point{
		AgentID: a.ID.String(), Connected: a.Connected, Bundle: bundleName(said.Bundle), Known: a.Acked, Active: a.Ack.PolicyGeneration,
		Candidate: said.Candidate, Fault: said.Fault, Processes: said.Processes, Unnamed: said.Unnamed,
	}
}

// GetPolicyStatus implements capb.AdminServer.
func (s *Service) GetPolicyStatus(ctx context.Context, req *capb.GetPolicyStatusRequest) (*capb.GetPolicyStatusResponse, error) {
	heads := s.registry.PolicyHeads()
	if req.GetName() != "" {
		head, err := s.policyHead(req.GetName())
		if err != nil {
			return nil, err
		}
		heads = []*release.Head{head}
	}
	resp := &capb.GetPolicyStatusResponse{}
	for _, h := range heads {
		resp.Statuses = append(resp.Statuses, s.policyStatus(h, s.Permits(callerFrom(ctx), capb.Admin_ListAgents_FullMethodName), time.Now()))
	}
	return resp, nil
}

// policyStatus is how head fares; agents are named where withAgents is set.
func (s *Service) policyStatus(head *release.Head, withAgents bool, now time.Time) *capb.PolicyStatus {
	own, others, silent := s.registry.PolicyShares(head.Name, s.opts.ReplicaName)
	st := &capb.PolicyStatus{PolicyBundle: s.policyBundle(head), IssuedAt: timestamp(head.IssuedAt)}
	if trial := rollout.TrialOf(head); trial != (rollout.Trial{}) {
		st.Counts = countsToProto(trial, s.rollout.Counts(head.Name, trial, own, others))
	}
	if !withAgents {
		return st
	}
	foreign := foreignPoints(others, silent)
	for _, a := range s.registry.Agents() {
		if !counts(a, now) {
			continue
		}
		p, replica := s.pointOf(a), s.opts.ReplicaName
		if other, ok := foreign[p.AgentID]; ok && !a.Connected {
			p, replica = other.point, other.replica
		} else if !a.Connected {
			replica = ""
		}
		if p.Bundle == head.Name {
			st.Points = append(st.Points, pointsToProto(head, p, replica)...)
		}
	}
	opas, leftOut := s.opasToProto(head, others, now)
	st.Points, st.OpasLeftOut = append(st.Points, opas...), uint32(leftOut)
	return st
}

// foreignPoint is an agent as another replica knows it.
type foreignPoint struct {
	point   rollout.Point
	replica string
}

// foreignPoints are those of other replicas, by agent; of replicas that are silent,
// nobody is connected.
func foreignPoints(others []*rollout.Share, silent []string) map[string]foreignPoint {
	foreign := map[string]foreignPoint{}
	for _, share := range others {
		for _, p := range share.Points {
			p.Connected = !slices.Contains(silent, share.Replica)
			known, ok := foreign[p.AgentID]
			if !ok || p.Connected && !known.point.Connected || p.Connected == known.point.Connected && known.point.Active < p.Active {
				foreign[p.AgentID] = foreignPoint{p, share.Replica}
			}
		}
	}
	return foreign
}

// pointsToProto are an agent and the processes below it.
func pointsToProto(h *release.Head, p rollout.Point, replica string) []*capb.PolicyPoint {
	agent := &capb.PolicyPoint{
		Kind: "agent", SpiffeId: p.AgentID, Connected: p.Connected, Replica: replica,
		Generation: p.Active, CandidateGeneration: p.Candidate, Fault: p.Fault,
	}
	if since := rollout.Since(h, p.Active); !since.IsZero() {
		agent.LaggingSince = timestamp(since)
	}
	points := []*capb.PolicyPoint{agent}
	for _, q := range p.Processes {
		process := &capb.PolicyPoint{
			Kind: "process", SpiffeId: q.SPIFFEID, AgentId: p.AgentID, Pid: q.PID, Connected: p.Connected, Replica: replica, Generation: q.Generation,
		}
		if !q.Lagging.IsZero() {
			process.LaggingSince = timestamp(q.Lagging)
		}
		points = append(points, process)
	}
	return points
}

func countsToProto(trial rollout.Trial, r comparison.Report) *capb.PolicyCounts {
	m := &capb.PolicyCounts{CandidateGeneration: trial.Generation, Step: trial.Step, DifferencesDropped: r.Dropped}
	for site, c := range r.Sites {
		m.Comparisons = append(m.Comparisons, &capb.PolicyComparison{
			Destination: site.Destination, Canary: site.Canary,
			BothAllow: c.BothAllow, BothDeny: c.BothDeny, WouldAllow: c.WouldAllow, WouldDeny: c.WouldDeny,
		})
	}
	slices.SortFunc(m.Comparisons, func(a, b *capb.PolicyComparison) int { return strings.Compare(a.Destination, b.Destination) })
	for d, n := range r.Differences {
		m.Differences = append(m.Differences, &capb.PolicyDifference{
			Source: d.Source, Destination: d.Destination, Reason: string(d.Reason), RuleId: d.RuleID,
			CandidateReason: string(d.CandidateReason), CandidateRuleId: d.CandidateRuleID, CandidateAllows: d.CandidateAllows, Calls: n,
		})
	}
	slices.SortFunc(m.Differences, func(a, b *capb.PolicyDifference) int {
		return strings.Compare(a.Destination+" "+a.Source+" "+a.RuleId+" "+a.CandidateRuleId, b.Destination+" "+b.Source+" "+b.RuleId+" "+b.CandidateRuleId)
	})
	return m
}

// policyMetrics are of candidates and of those who lag.
func (s *Service) policyMetrics(to prometheus.Registerer) {
	for outcome, of := range map[string]func(comparison.Counts) uint64{
		"both_allow":  func(c comparison.Counts) uint64 { return c.BothAllow },
		"both_deny":   func(c comparison.Counts) uint64 { return c.BothDeny },
		"would_allow": func(c comparison.Counts) uint64 { return c.WouldAllow },
		"would_deny":  func(c comparison.Counts) uint64 { return c.WouldDeny },
	} {
		to.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "merlon_policy_compared_calls_total", ConstLabels: prometheus.Labels{"outcome": outcome},
			Help: "Calls of which agents said how policy in force and candidate compare, by outcome (both_allow, both_deny, would_allow, would_deny: what the candidate would have done).",
		}, func() float64 { return float64(of(s.rollout.Calls())) }))
	}
	heads := func(which func(*release.Candidate) bool) func() float64 {
		return func() float64 {
			n := 0
			for _, h := range s.registry.PolicyHeads() {
				if h.Candidate != nil && which(h.Candidate) {
					n++
				}
			}
			return float64(n)
		}
	}
	to.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "merlon_policy_candidates", Help: "Policy candidates that are tried."},
			heads(func(*release.Candidate) bool { return true })),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "merlon_policy_canaries_paused", Help: "Policy candidates that were taken back to shadow because they denied too much."},
			heads(func(c *release.Candidate) bool { return c.Alarm != nil })),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "merlon_policy_lagging_agents", Help: "Agents with a Sync stream to this replica that do not decide by the policy in force yet."},
			func() float64 {
				n := 0
				for _, h := range s.registry.PolicyHeads() {
					for _, p := range s.ownPoints(h.Name, time.Now()) {
						if p.Active < h.Generation {
							n++
						}
					}
				}
				return float64(n)
			}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "merlon_policy_lagging_opas", Help: "Stock OPAs whose status this replica has, and that do not decide by the policy in force yet."},
			func() float64 {
				n := 0
				for _, h := range s.registry.PolicyHeads() {
					for _, o := range s.ownOPAs(h, time.Now()) {
						if o.Active < h.Generation {
							n++
						}
					}
				}
				return float64(n)
			}),
	)
}
