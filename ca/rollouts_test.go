// Policy rollouts at the CA: who may have a candidate, what agents may say of it, the
// alarm of a canary, and what every replica knows.

package ca_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/stage"
	"merlon.dev/policy/bundle"
)

// pushCandidate pushes the policy of pushPolicy as a candidate, and returns its generation.
func pushCandidate(t *testing.T, c *testCA) uint64 {
	t.Helper()
	resp, err := c.admin.PushPolicy(t.Context(), &capb.PushPolicyRequest{Bundle: policyBundle(t), Candidate: true})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetGeneration()
}

// canary lets the candidate decide everywhere, and returns its step.
func canary(t *testing.T, c *testCA) uint32 {
	t.Helper()
	resp, err := c.admin.StageCandidate(t.Context(), &capb.StageCandidateRequest{Canary: &capb.PolicyCanary{PerMille: 1000}})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetPolicyBundle().GetCandidate().GetStep()
}

func (c *testCA) policyStatus() *capb.PolicyStatus {
	c.t.Helper()
	resp, err := c.admin.GetPolicyStatus(c.t.Context(), &capb.GetPolicyStatusRequest{})
	if err != nil || len(resp.GetStatuses()) != 1 {
		c.t.Fatalf("%v, %v", resp, err)
	}
	return resp.GetStatuses()[0]
}

func TestCandidateIsServedToThoseWhoMayHaveThePolicy(t *testing.T) {
	c := startCA(t, tempDir(t))
	who := identities(t, c)
	pushPolicy(t, c)
	candidate := c.url("/v1/policy/candidates/main")
	if code, _, _ := do(t, who["agent"], "GET", candidate, nil, nil); code != 404 {
		t.Errorf("before there is one: %d", code)
	}
	generation := pushCandidate(t, c)
	for _, test := range []struct {
		client, method string
		want           int
	}{
		{"agent", "GET", 200},
		{"agent", "HEAD", 200},
		{"admin", "GET", 200},
		{"anonymous", "GET", 401},
		{"workload", "GET", 403},
		{"admin", "PUT", 405},
		{"admin", "DELETE", 405},
	} {
		if code, _, body := do(t, who[test.client], test.method, candidate, nil, nil); code != test.want {
			t.Errorf("%s %s: %d %s; want %d", test.client, test.method, code, body, test.want)
		}
	}
	head, err := c.admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{})
	if err != nil || head.GetPolicyBundle().GetGeneration() != 1 || head.GetPolicyBundle().GetCandidate().GetGeneration() != generation {
		t.Fatalf("%v, %v", head, err)
	}
	pub, err := x509.ParsePKIXPublicKey(head.GetPolicyBundle().GetKeys()[0].GetPublicKey())
	if err != nil {
		t.Fatal(err)
	}
	keys := []bundle.Key{{KID: head.GetPolicyBundle().GetKeys()[0].GetKid(), PublicKey: pub.(*ecdsa.PublicKey)}}
	for url, isCandidate := range map[string]bool{candidate: true, c.url("/v1/policy/bundles/main"): false} {
		raw, _, err := bundle.Fetch(t.Context(), who["agent"], url, "")
		if err != nil {
			t.Fatal(err)
		}
		contents, err := bundle.Verify(raw, keys, bundle.Expect{Name: "main", Candidate: isCandidate})
		if err != nil || contents.Metadata.Candidate != isCandidate {
			t.Errorf("%s: %+v, %v", url, contents, err)
		}
		if _, err := bundle.Verify(raw, keys, bundle.Expect{Name: "main", Candidate: !isCandidate}); err == nil {
			t.Errorf("%s is taken for the other kind", url)
		}
	}
}

// speaker is an agent that says what it likes.
type speaker struct {
	*testClient
	stream grpc.BidiStreamingClient[capb.SyncRequest, capb.SyncResponse]
}

func speaking(a *testClient) *speaker {
	a.t.Helper()
	s := &speaker{a, a.syncFor(time.Minute, 0)}
	until(a.t, s.stream, synced)
	return s
}

func (s *speaker) say(m *capb.SyncRequest) {
	s.t.Helper()
	if err := s.stream.Send(m); err != nil {
		s.t.Fatal(err)
	}
}

// denied says that a canary denied so many of 100 calls to destination.
func (s *speaker) denied(generation uint64, step uint32, destination string, denied uint64) {
	s.t.Helper()
	s.say(&capb.SyncRequest{PolicyReport: &capb.PolicyReport{Name: "main", CandidateGeneration: generation, Counts: &capb.PolicyCounts{
		CandidateGeneration: generation, Step: step,
		Comparisons: []*capb.PolicyComparison{{Destination: destination, Canary: true, BothAllow: 100 - denied, WouldDeny: denied}},
		Differences: []*capb.PolicyDifference{{Source: "spiffe://shop.test/web", Destination: destination, Reason: "ALLOWED", RuleId: "a", CandidateReason: "METHOD", Calls: denied}},
	}}})
}

// An agent says nothing of calls to another node's services, and its numbers change
// neither the policy in force nor another candidate's.
func TestAgentSpeaksForItsOwnNode(t *testing.T) {
	c := startCA(t, tempDir(t))
	pushPolicy(t, c)
	generation := pushCandidate(t, c)
	step := canary(t, c)
	s := speaking(c.agent("n1"))
	c.entry("n1", "orders")
	c.entry("n2", "other")
	s.denied(generation, step, "spiffe://shop.test/other", 100)
	s.denied(generation, step, "spiffe://shop.test/nobody", 100)
	s.denied(generation, step, "spiffe://shop.test/orders\nx", 100)
	s.denied(generation, step-1, "spiffe://shop.test/orders", 100)
	s.denied(generation-1, step, "spiffe://shop.test/orders", 100)
	s.denied(generation, step, "spiffe://shop.test/orders", 1) // which is at the limit
	eventually(t, "what is its own is counted", func() bool { return len(c.policyStatus().GetCounts().GetComparisons()) > 0 })
	st := c.policyStatus()
	if n := st.GetCounts().GetComparisons(); len(n) != 1 || n[0].GetDestination() != "spiffe://shop.test/orders" || n[0].GetWouldDeny() != 1 {
		t.Errorf("counted: %v", n)
	}
	if n := st.GetCounts().GetDifferences(); len(n) != 1 || n[0].GetCalls() != 1 {
		t.Errorf("differences: %v", n)
	}
	if st.GetPolicyBundle().GetCandidate().GetAlarm() != nil {
		t.Errorf("alarm: %v", st.GetPolicyBundle())
	}
}

func TestCanaryThatDeniesTooMuchIsPausedOnce(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	pushPolicy(t, c)
	generation := pushCandidate(t, c)
	a := c.agent("n1")
	c.entry("n1", "orders")
	s := speaking(a)
	if st := c.policyStatus(); st.GetPolicyBundle().GetCandidate().GetStage() != capb.PolicyStage_POLICY_STAGE_SHADOW {
		t.Fatalf("%v", st)
	}
	// In shadow nothing is denied.
	s.denied(generation, 1, "spiffe://shop.test/orders", 100)
	step := canary(t, c)
	s.denied(generation, step, "spiffe://shop.test/orders", 2)
	paused := func(c *testCA) bool {
		cand := c.policyStatus().GetPolicyBundle().GetCandidate()
		return cand.GetStage() == capb.PolicyStage_POLICY_STAGE_SHADOW && cand.GetAlarm().GetDenied() == 2 && cand.GetAlarm().GetAllowed() == 100 &&
			cand.GetAlarm().GetDestination() == "spiffe://shop.test/orders"
	}
	eventually(t, "the canary is paused", func() bool { return paused(c) })
	if msg := until(t, s.stream, func(m *capb.SyncResponse) bool { return m.GetPolicyBundle().GetCandidate().GetAlarm() != nil }); msg.GetPolicyBundle().GetGeneration() != 1 {
		t.Errorf("the policy in force is touched: %v", msg)
	}
	if n := c.counter(t, "merlon_policy_canary_alarms_total"); n != 1 {
		t.Errorf("%d alarms; want 1", n)
	}
	records := func(c *testCA) (n int) {
		for _, r := range c.outcomes() {
			if detail, _ := r["detail"].(string); strings.HasPrefix(detail, "pause the canary of policy bundle main: of 100 calls that generation 1 allows, candidate 2 denied 2") && r["actor"] == "ca" {
				n++
			}
		}
		return n
	}
	eventually(t, "the alarm is on record", func() bool { return records(c) == 1 })

	// Neither a restart nor more of the same raises it again.
	c.stop()
	c = startCA(t, dir)
	if !paused(c) || c.counter(t, "merlon_policy_canaries_paused") != 1 {
		t.Errorf("after a restart: %v", c.policyStatus())
	}
	s = speaking(a.at(c))
	s.denied(generation, step, "spiffe://shop.test/orders", 100)
	s.denied(generation, step+1, "spiffe://shop.test/orders", 100)
	eventually(t, "counts go on", func() bool { return len(c.policyStatus().GetCounts().GetComparisons()) == 1 })
	time.Sleep(2500 * time.Millisecond) // time to do it wrong: it is looked at every 2 s
	if n := records(c); n != 1 || c.counter(t, "merlon_policy_canary_alarms_total") != 0 {
		t.Errorf("%d alarms on record after a restart; want 1", n)
	}
	// Going on is the operator's decision, and ends the alarm.
	canary(t, c)
	if st := c.policyStatus(); st.GetPolicyBundle().GetCandidate().GetAlarm() != nil || len(st.GetCounts().GetComparisons()) != 0 {
		t.Errorf("the next canary: %v", st)
	}
}

func TestStatusNamesWhoLags(t *testing.T) {
	c := startCA(t, tempDir(t))
	first := pushPolicy(t, c)
	a, away, banned := speaking(c.agent("n1")), c.agent("n2"), c.agent("n3")
	if _, err := c.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: banned.id}); err != nil {
		t.Fatal(err)
	}
	c.entry("n1", "orders")
	a.say(&capb.SyncRequest{Ack: &capb.SyncAck{PolicyGeneration: first}})
	a.say(&capb.SyncRequest{PolicyReport: &capb.PolicyReport{Name: "main", Fault: "it does not compile", ProcessCount: 2, Processes: []*capb.PolicyProcess{
		{SpiffeId: "spiffe://shop.test/orders", Pid: 7, Generation: first}, {SpiffeId: "spiffe://shop.test/elsewhere", Pid: 8},
	}}})
	pushPolicy(t, c)
	find := func(id string) *capb.PolicyPoint {
		for _, p := range c.policyStatus().GetPoints() {
			if p.GetSpiffeId() == id {
				return p
			}
		}
		return nil
	}
	eventually(t, "the agent lags", func() bool {
		p := find(a.id)
		return p.GetLaggingSince() != nil && p.GetGeneration() == first && p.GetConnected() && p.GetFault() == "it does not compile" && p.GetReplica() == "ca"
	})
	if p := find("spiffe://shop.test/orders"); p.GetKind() != "process" || p.GetPid() != 7 || p.GetAgentId() != a.id {
		t.Errorf("process: %v", p)
	}
	if p := find("spiffe://shop.test/elsewhere"); p != nil {
		t.Errorf("another node's process: %v", p)
	}
	if p := find(away.id); p.GetLaggingSince() == nil || p.GetConnected() {
		t.Errorf("an agent that is away: %v; want it to lag", p)
	}
	if p := find(banned.id); p != nil {
		t.Errorf("a banned agent: %v", p)
	}
	if n := c.counter(t, "merlon_policy_lagging_agents"); n != 1 {
		t.Errorf("%d connected agents lag; want 1", n)
	}
	a.say(&capb.SyncRequest{Ack: &capb.SyncAck{PolicyGeneration: first + 1}})
	eventually(t, "the agent follows", func() bool { p := find(a.id); return p.GetLaggingSince() == nil && p.GetGeneration() == first+1 })
}

// A policy-publisher sees what its candidate would change, and neither agents nor OPAs.
func TestPublisherSeesCountsAndNoAgents(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	publisher := c.admins(a, "publisher", capb.Role_ROLE_POLICY_PUBLISHER, "")
	pushPolicy(t, c)
	pushCandidate(t, c)
	sendStatus(t, c, readerToken(t, c, "main", 0), "i1", 1)
	resp, err := publisher.admin.GetPolicyStatus(t.Context(), &capb.GetPolicyStatusRequest{Name: "main"})
	if err != nil || len(resp.GetStatuses()) != 1 || resp.GetStatuses()[0].GetCounts() == nil || len(resp.GetStatuses()[0].GetPoints()) != 0 {
		t.Errorf("%v, %v", resp, err)
	}
	if n := len(c.policyStatus().GetPoints()); n != 2 {
		t.Errorf("an operator sees %d agents and OPAs; want one of each", n)
	}
}

func TestRolloutRefusals(t *testing.T) {
	c := startCA(t, tempDir(t))
	ctx := t.Context()
	_, err := c.admin.RollBackPolicy(ctx, &capb.RollBackPolicyRequest{})
	wantCode(t, err, codes.NotFound)
	_, err = c.admin.ListPolicyGenerations(ctx, &capb.ListPolicyGenerationsRequest{})
	wantCode(t, err, codes.NotFound)
	_, err = c.admin.GetPolicyStatus(ctx, &capb.GetPolicyStatusRequest{Name: "A/b"})
	wantCode(t, err, codes.InvalidArgument)
	_, err = c.admin.PushPolicy(ctx, &capb.PushPolicyRequest{Bundle: policyBundle(t), Candidate: true})
	wantCode(t, err, codes.FailedPrecondition)
	pushPolicy(t, c)
	_, err = c.admin.PushPolicy(ctx, &capb.PushPolicyRequest{Bundle: []byte("noise"), Candidate: true})
	wantCode(t, err, codes.InvalidArgument)
	_, err = c.admin.PromoteCandidate(ctx, &capb.PromoteCandidateRequest{})
	wantCode(t, err, codes.FailedPrecondition)
	pushCandidate(t, c)
	for name, canary := range map[string]*capb.PolicyCanary{
		"more than all":    {PerMille: 1001},
		"no SPIFFE ID":     {Destinations: []string{"orders"}},
		"a trust domain":   {Destinations: []string{"spiffe://shop.test"}},
		"too many of them": {Destinations: make([]string, 101)},
	} {
		if _, err := c.admin.StageCandidate(ctx, &capb.StageCandidateRequest{Canary: canary}); err == nil {
			t.Errorf("%s: taken", name)
		} else {
			wantCode(t, err, codes.InvalidArgument)
		}
	}
	_, err = c.admin.AbortCandidate(ctx, &capb.AbortCandidateRequest{Generation: 9})
	wantCode(t, err, codes.FailedPrecondition)
}

// What one replica's agents say, the other one knows; either pauses the canary, and the
// alarm is raised once.
func TestReplicasShareARollout(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	a := startCA(t, tempDir(t), onEtcd(e))
	b := startCA(t, tempDir(t), onEtcd(e), a.joining("ca-2"))
	pushPolicy(t, a)
	first := a.agent("n1")
	a.entry("n1", "orders")
	n1 := speaking(first)
	n2 := speaking(a.agent("n2").at(b))
	a.entry("n2", "orders")
	generation := pushCandidate(t, b)
	step := canary(t, b)
	replicas := []*testCA{a, b}
	eventually(t, "both know the canary", func() bool {
		for _, c := range replicas {
			if c.policyStatus().GetPolicyBundle().GetCandidate().GetStep() != step {
				return false
			}
		}
		return true
	})
	for _, s := range []*speaker{n1, n2} {
		s.say(&capb.SyncRequest{Ack: &capb.SyncAck{PolicyGeneration: 1}, PolicyReport: &capb.PolicyReport{Name: "main", CandidateGeneration: generation}})
	}
	// Half of what is needed for a judgement at each.
	half := func(s *speaker) {
		s.say(&capb.SyncRequest{PolicyReport: &capb.PolicyReport{Name: "main", CandidateGeneration: generation, Counts: &capb.PolicyCounts{
			CandidateGeneration: generation, Step: step,
			Comparisons: []*capb.PolicyComparison{{Destination: "spiffe://shop.test/orders", Canary: true, BothAllow: 40, WouldDeny: 10}},
		}}})
	}
	half(n1)
	for _, c := range replicas {
		eventually(t, "both know what the first counted, and both agents", func() bool {
			st := c.policyStatus()
			points := map[string]string{}
			for _, p := range st.GetPoints() {
				if p.GetConnected() && p.GetGeneration() == 1 && p.GetCandidateGeneration() == generation {
					points[p.GetSpiffeId()] = p.GetReplica()
				}
			}
			n := st.GetCounts().GetComparisons()
			return len(n) == 1 && n[0].GetWouldDeny() == 10 && fmt.Sprint(points) == fmt.Sprintf("map[%s:ca %s:ca-2]", n1.id, n2.id)
		})
	}
	// What an OPA says to one, the other knows.
	sendStatus(t, b, readerToken(t, a, "main", 0), "i1", 1)
	for _, c := range replicas {
		eventually(t, "both know the OPA", func() bool {
			return slices.ContainsFunc(c.policyStatus().GetPoints(), func(p *capb.PolicyPoint) bool {
				return p.GetKind() == "opa" && p.GetInstance() == "i1" && p.GetGeneration() == 1 && p.GetLabels()["region"] == "east"
			})
		})
	}
	half(n2)
	for _, c := range replicas {
		eventually(t, "both know the alarm", func() bool {
			cand := c.policyStatus().GetPolicyBundle().GetCandidate()
			return cand.GetAlarm().GetDenied() == 20 && cand.GetStage() == capb.PolicyStage_POLICY_STAGE_SHADOW
		})
	}
	if n := a.counter(t, "merlon_policy_canary_alarms_total") + b.counter(t, "merlon_policy_canary_alarms_total"); n != 1 {
		t.Errorf("%d alarms; want 1", n)
	}
	// The other replica promotes what the first one signed, and the other way round.
	if resp, err := a.admin.PromoteCandidate(t.Context(), &capb.PromoteCandidateRequest{Generation: generation}); err != nil || resp.GetPolicyBundle().GetGeneration() != generation+1 {
		t.Errorf("promoted by the other: %v, %v", resp, err)
	}
	if resp, err := b.admin.RollBackPolicy(t.Context(), &capb.RollBackPolicyRequest{}); err != nil || resp.GetPolicyBundle().GetGeneration() != generation+2 {
		t.Errorf("rolled back by the other: %v, %v", resp, err)
	}
}
