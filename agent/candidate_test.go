// A candidate beside the active policy, as programs see it: when it decides, when not,
// and what is told of it.

package agent_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/ca/capb"
	"merlon.dev/policy/program"
)

// postGrants lets web POST where grants lets it GET.
var postGrants = strings.ReplaceAll(grants, "[GET]", "[POST]")

// staged announces generation with a candidate, in shadow unless a canary is given.
func (k *policyKey) staged(generation, candidate uint64, step uint32, canary *capb.PolicyCanary) *capb.PolicyBundle {
	pb := k.announcement(generation)
	pb.Candidate = &capb.PolicyCandidate{Generation: candidate, Stage: capb.PolicyStage_POLICY_STAGE_SHADOW, Step: step}
	if canary != nil {
		pb.Candidate.Stage, pb.Candidate.Canary = capb.PolicyStage_POLICY_STAGE_CANARY, canary
	}
	return pb
}

func call(method string) *agentpb.AuthorizeRequest {
	return &agentpb.AuthorizeRequest{Source: "spiffe://" + td + "/web", Protocol: "http", Method: method, Path: "/orders"}
}

// decides waits until GET is decided by this generation, which allows it or not.
func (n *node) decides(t *testing.T, generation uint64, allow bool) {
	t.Helper()
	eventually(t, "the generation decides", func() bool {
		d, err := n.authorize(t, call("GET"))
		return err == nil && d.GetPolicyGeneration() == generation && d.GetAllow() == allow
	})
}

// tries waits until the agent says that it evaluates this candidate.
func tries(t *testing.T, ca *fakeca.CA, candidate uint64) {
	t.Helper()
	eventually(t, "the candidate is tried", func() bool {
		all := ca.PolicyReports()
		return len(all) > 0 && all[len(all)-1].GetCandidateGeneration() == candidate
	})
}

func TestCandidateDecidesWhereItIsACanaryAndNowhereElse(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	n.policyIs(t, 1)
	candidate := key.sign("grants.yaml", postGrants, 2, true)
	ca.PublishCandidate(candidate, key.staged(1, 2, 1, nil))
	tries(t, ca, 2)
	for range 20 {
		if d, err := n.authorize(t, call("GET")); err != nil || !d.GetAllow() || d.GetPolicyGeneration() != 1 {
			t.Fatalf("in shadow: %v, %v", d, err)
		}
		if d, err := n.authorize(t, call("POST")); err != nil || d.GetAllow() || d.GetPolicyGeneration() != 1 {
			t.Fatalf("in shadow: %v, %v", d, err)
		}
	}
	eventually(t, "differences are told", func() bool {
		var would map[bool]uint64
		for _, r := range ca.PolicyReports() {
			for _, d := range r.GetCounts().GetDifferences() {
				if would == nil {
					would = map[bool]uint64{}
				}
				would[d.GetCandidateAllows()] += d.GetCalls()
			}
		}
		return would[true] == 20 && would[false] == 20
	})
	unknown := key.staged(1, 2, 2, &capb.PolicyCanary{PerMille: 1000})
	unknown.Candidate.Stage = 99
	for _, step := range []struct {
		name  string
		pb    *capb.PolicyBundle
		by    uint64
		allow bool
	}{
		{"this destination", key.staged(1, 2, 3, &capb.PolicyCanary{Destinations: []string{"spiffe://" + td + "/orders", "spiffe://" + td + "/a"}}), 2, false},
		{"another destination", key.staged(1, 2, 4, &capb.PolicyCanary{Destinations: []string{"spiffe://" + td + "/other"}}), 1, true},
		{"all", key.staged(1, 2, 5, &capb.PolicyCanary{PerMille: 1000}), 2, false},
		{"none", key.staged(1, 2, 6, &capb.PolicyCanary{}), 1, true},
		{"all again", key.staged(1, 2, 7, &capb.PolicyCanary{PerMille: 1000}), 2, false},
		{"a stage of later", unknown, 1, true},
	} {
		ca.PublishCandidate(candidate, step.pb)
		eventually(t, step.name, func() bool {
			d, err := n.authorize(t, call("GET"))
			return err == nil && d.GetPolicyGeneration() == step.by && d.GetAllow() == step.allow
		})
	}
	// Away with it, and in force by the way of every policy.
	ca.PublishCandidate(candidate, key.staged(1, 2, 7, &capb.PolicyCanary{PerMille: 1000}))
	n.decides(t, 2, false)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	n.decides(t, 1, true)
	ca.PublishPolicy(key.bundle(postGrants, 3), key.announcement(3))
	n.decides(t, 3, false)
}

// A candidate is verified as strictly as what is in force. One that is at fault is left
// out, says why, and the active policy decides.
func TestBadCandidateIsLeftOut(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key, thief := newPolicyKey(t), newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 3), key.announcement(3))
	n.policyIs(t, 3)
	everywhere := &capb.PolicyCanary{PerMille: 1000}
	ca.PublishCandidate(key.sign("grants.yaml", postGrants, 5, true), key.staged(3, 5, 1, everywhere))
	n.decides(t, 5, false)
	for _, bad := range []struct {
		what      string
		raw       []byte
		candidate uint64
		fault     string
	}{
		{"signed by another key", thief.sign("grants.yaml", postGrants, 6, true), 6, "does not fit"},
		{"rubbish", []byte("rubbish"), 7, "policy bundle"},
		{"not a candidate", key.bundle(postGrants, 8), 8, "is no candidate"},
		{"another generation", key.sign("grants.yaml", postGrants, 9, true), 10, "serves 9"},
		{"tried before a newer one", key.sign("grants.yaml", postGrants, 4, true), 4, "older than"},
		{"not newer than the active one", key.sign("grants.yaml", postGrants, 3, true), 3, "not newer"},
	} {
		ca.PublishCandidate(bad.raw, key.staged(3, bad.candidate, 1, everywhere))
		n.decides(t, 3, true)
		eventually(t, bad.what, func() bool {
			all := ca.PolicyReports()
			last := all[len(all)-1]
			return strings.Contains(last.GetFault(), bad.fault) && last.GetCandidateGeneration() == 0
		})
	}
	// A candidate in the place of the policy is none.
	ca.PublishPolicy(key.sign("grants.yaml", postGrants, 11, true), key.announcement(11))
	eventually(t, "a candidate as policy", func() bool {
		all := ca.PolicyReports()
		return strings.Contains(all[len(all)-1].GetFault(), "is a candidate")
	})
	n.decides(t, 3, true)
}

// What the agent kept decides again after a restart without the CA, the candidate where
// it did; without its bytes, the active policy.
func TestCandidateIsKeptOverARestart(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	n.waitReady(t)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	n.policyIs(t, 1)
	ca.PublishCandidate(key.sign("grants.yaml", postGrants, 2, true), key.staged(1, 2, 1, &capb.PolicyCanary{Destinations: []string{"spiffe://" + td + "/orders"}}))
	n.decides(t, 2, false)
	n.stop()
	ca.Stop()
	restart := func() *node {
		cfg.Logger = testLogger(t)
		n := start(t, cfg)
		n.waitReady(t)
		return n
	}
	n = restart()
	n.decides(t, 2, false)
	n.stop()
	n = restart()
	n.decides(t, 2, false)
	n.stop()
	if err := os.Truncate(filepath.Join(cfg.DataDir, "policy_candidate.sealed"), 10); err != nil {
		t.Fatal(err)
	}
	n = restart()
	n.decides(t, 1, true)
}

// The program that a service gets to decide by is of the generation that decides for
// it, and the other one lies beside it.
func TestProgramsOfACanary(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	n.policyIs(t, 1)
	cc, ctx := conn(t, n.socket)
	stream, err := agentpb.NewLocalClient(cc).WatchPolicy(ctx, &agentpb.WatchPolicyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var version uint64
	next := func(decides, beside uint64, canary bool) {
		t.Helper()
		m, err := stream.Recv()
		if err != nil || len(m.GetPrograms()) != 1 {
			t.Fatalf("%v, %v", m, err)
		}
		p := m.GetPrograms()[0]
		got := func(encoded []byte) uint64 {
			if encoded == nil {
				return 0
			}
			p, err := program.Decode(encoded)
			if err != nil {
				t.Fatal(err)
			}
			return p.Generation()
		}
		if got(p.GetEncoded()) != decides || got(p.GetBeside()) != beside || p.GetCanary() != canary || m.GetPolicyVersion() <= version {
			t.Errorf("%d decides with %d beside it, canary %v, version %d after %d; want %d, %d, %v", got(p.GetEncoded()), got(p.GetBeside()), p.GetCanary(), m.GetPolicyVersion(), version, decides, beside, canary)
		}
		version = m.GetPolicyVersion()
	}
	next(1, 0, false)
	candidate := key.sign("grants.yaml", postGrants, 2, true)
	ca.PublishCandidate(candidate, key.staged(1, 2, 1, nil))
	next(1, 2, false)
	ca.PublishCandidate(candidate, key.staged(1, 2, 2, &capb.PolicyCanary{PerMille: 1000}))
	next(2, 1, true)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	next(1, 0, false)
}

// What a service counts is taken of its own destination and of the candidate that is
// tried; a process that lags is told of.
func TestReportsOfServices(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	n.policyIs(t, 1)
	ca.PublishCandidate(key.sign("grants.yaml", postGrants, 2, true), key.staged(1, 2, 4, nil))
	tries(t, ca, 2)
	cc, ctx := conn(t, n.socket)
	stream, err := agentpb.NewLocalClient(cc).Report(ctx)
	if err != nil {
		t.Fatal(err)
	}
	own, other := "spiffe://"+td+"/orders", "spiffe://"+td+"/other"
	send := func(m *agentpb.ReportRequest) {
		t.Helper()
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	counts := func(generation uint64, step uint32, destination string, denied uint64) *agentpb.Counts {
		return &agentpb.Counts{CandidateGeneration: generation, Step: step, Comparisons: []*agentpb.Comparison{{Destination: destination, WouldDeny: denied}}}
	}
	send(&agentpb.ReportRequest{PolicyVersion: 1, PolicyGeneration: 1, Counts: counts(2, 4, other, 100)})
	send(&agentpb.ReportRequest{PolicyVersion: 1, PolicyGeneration: 1, Counts: counts(2, 3, own, 100)})
	send(&agentpb.ReportRequest{PolicyVersion: 1, PolicyGeneration: 1, Counts: counts(1, 4, own, 100)})
	send(&agentpb.ReportRequest{PolicyVersion: 1, PolicyGeneration: 1, Counts: counts(2, 4, own, 7)})
	eventually(t, "the counts arrive", func() bool {
		var denied uint64
		for _, r := range ca.PolicyReports() {
			for _, c := range r.GetCounts().GetComparisons() {
				denied += c.GetWouldDeny()
			}
		}
		if denied > 7 {
			t.Fatalf("%d calls are counted; want 7", denied)
		}
		return denied == 7
	})
	all := ca.PolicyReports()
	last := all[len(all)-1]
	if ps := last.GetProcesses(); len(ps) != 1 || ps[0].GetSpiffeId() != own || ps[0].GetLaggingSince() == nil || ps[0].GetGeneration() != 1 || time.Since(ps[0].GetLaggingSince().AsTime()) > time.Minute {
		t.Errorf("processes: %v; want this one, which lags", ps)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the process is gone", func() bool {
		all := ca.PolicyReports()
		return len(all[len(all)-1].GetProcesses()) == 0
	})
}
