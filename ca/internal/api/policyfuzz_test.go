// Bytes of agents: what they say of the policy on their nodes.

package api

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/rollout"
	"merlon.dev/ca/internal/store"
	"merlon.dev/policy"
	"merlon.dev/policy/comparison"
)

const ofTheNode = "spiffe://shop.test/web"

// shared is what a replica writes down of what one agent said.
func shared(t *testing.T, m *capb.PolicyReport) *rollout.Share {
	t.Helper()
	own := func(id string) bool { return id == ofTheNode }
	said, trial, board := saidBy(m, own), rollout.Trial{Generation: 2, Step: 1}, rollout.NewBoard()
	board.Count("main", trial, trial, nil, countsOf(m.GetCounts(), own))
	point := rollout.Point{AgentID: "spiffe://shop.test/agent/n", Candidate: said.Candidate, Fault: said.Fault, Processes: said.Processes, Unnamed: said.Unnamed}
	put, err := rollout.NewShare("main", "a", 3, trial, board.Counts("main", trial, nil, nil), []rollout.Point{point}).Put()
	if err != nil {
		t.Fatalf("an agent's word cannot be written down: %v", err)
	}
	if len(put.Value) > 1<<20 {
		t.Fatalf("%d bytes would be written down", len(put.Value))
	}
	share, err := rollout.DecodeShare(store.KV{Key: put.Key, Value: put.Value})
	if err != nil {
		t.Fatal(err)
	}
	return share
}

// Whatever an agent says, what is kept of it is about its own node, and replicas can
// write it down for each other.
func FuzzPolicyReport(f *testing.F) {
	difference := &capb.PolicyDifference{Source: "spiffe://shop.test/a", Destination: ofTheNode, Reason: string(policy.Allowed), CandidateReason: string(policy.NoGrant), Calls: 2}
	for _, m := range []*capb.PolicyReport{
		{Name: "main", Fault: "é", CandidateGeneration: 2, ProcessCount: 3},
		{ProcessCount: 1, Processes: []*capb.PolicyProcess{{SpiffeId: ofTheNode, Pid: 1, Generation: 2, LaggingSince: timestamppb.Now()}, {SpiffeId: "spiffe://shop.test/other"}}},
		{Processes: []*capb.PolicyProcess{{SpiffeId: ofTheNode, LaggingSince: &timestamppb.Timestamp{Seconds: 1 << 40}}}},
		{Counts: &capb.PolicyCounts{CandidateGeneration: 2, Step: 1, Comparisons: []*capb.PolicyComparison{{Destination: ofTheNode, BothAllow: 1}}, Differences: []*capb.PolicyDifference{difference}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m capb.PolicyReport
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		share := shared(t, &m)
		for _, d := range share.Differ {
			if d.Destination != ofTheNode {
				t.Errorf("calls to %s are compared", d.Destination)
			}
		}
		for _, k := range share.Sites {
			if k.Destination != ofTheNode {
				t.Errorf("calls to %s are counted", k.Destination)
			}
		}
		for _, p := range share.Points[0].Processes {
			if p.SPIFFEID != ofTheNode {
				t.Errorf("process of %s is named", p.SPIFFEID)
			}
		}
	})
}

// An agent that somebody has taken over keeps no replica from telling the others.
func TestNonsenseOfAnAgentIsNotWrittenDown(t *testing.T) {
	long := strings.Repeat("a", 1<<20)
	share := shared(t, &capb.PolicyReport{
		Processes: []*capb.PolicyProcess{{SpiffeId: ofTheNode, Pid: 7, LaggingSince: &timestamppb.Timestamp{Seconds: 1 << 40}}},
		Counts: &capb.PolicyCounts{Differences: []*capb.PolicyDifference{
			{Source: "spiffe://shop.test/a", Destination: ofTheNode, Calls: 2},
			{Source: "spiffe://shop.test/a", Destination: ofTheNode, RuleId: long, Calls: 3},
			{Source: "spiffe://shop.test/a", Destination: ofTheNode, CandidateReason: long, Calls: 4},
		}},
	})
	if p := share.Points[0].Processes; len(p) != 1 || p[0].PID != 7 || !p[0].Lagging.IsZero() {
		t.Errorf("processes %+v; want the one, without a time that there is not", p)
	}
	want := comparison.Difference{Source: "spiffe://shop.test/a", Destination: ofTheNode}
	if len(share.Differ) != 1 || share.Differ[0].Difference != want || share.Dropped != 7 {
		t.Errorf("%d differences and %d calls dropped; want 1 and 7", len(share.Differ), share.Dropped)
	}
}
