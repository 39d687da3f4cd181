// Which program decides, and for how long; what is told to the agent.

package sdk

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/policy/program"
)

const ownID = "spiffe://sdktest.test/orders"

// encoded is a program of this generation that allows everything from web.
func encoded(generation uint64, destination string) []byte {
	return program.Encode(&program.Source{Destination: destination, Generation: generation, Grants: []program.Grant{
		{ID: "all", Kind: program.Allow, Protocol: policy.HTTP, From: []string{"spiffe://sdktest.test/web"}},
	}})
}

func withProgram(t *testing.T, generation uint64) *Identity {
	t.Helper()
	id := bare()
	id.generation.Store(generation)
	id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{PolicyGeneration: generation, Programs: []*agentpb.Program{{Destination: ownID, Encoded: encoded(generation, ownID)}}})
	return id
}

func web(path string) *policy.Input {
	return &policy.Input{Source: "spiffe://sdktest.test/web", Protocol: policy.HTTP, Method: "GET", Path: path}
}

func TestProgramDecidesWithoutTheAgent(t *testing.T) {
	id := withProgram(t, 7) // which has no agent: to ask it would panic
	d := id.Authorize(t.Context(), web("/a"))
	if !d.Allow || d.RuleID != "all" || d.Revision != 7 || d.DecisionID.IsZero() {
		t.Errorf("%+v", d)
	}
	in := web("/a")
	in.Source = "spiffe://sdktest.test/eve"
	if d := id.Authorize(t.Context(), in); d.Allow || d.Reason != policy.NoGrant || d.Revision != 7 {
		t.Errorf("a stranger: %+v", d)
	}
	if in.Destination != "" {
		t.Error("the caller's input was changed")
	}
	in = web("/a")
	in.Headers = map[string][]string{"x": {"\xff"}}
	if d := id.Authorize(t.Context(), in); d.Reason != policy.BadRequest {
		t.Errorf("bytes that the agent refuses: %+v", d)
	}
}

func TestOldProgramsAreNotUsedForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := withProgram(t, 7)
		has := func(want bool) {
			t.Helper()
			if p := id.program(ownID, time.Now()); (p != nil) != want {
				t.Errorf("program of generation 7 while %d is active: %v", id.generation.Load(), p != nil)
			}
		}
		has(true)
		id.generation.Store(8)
		id.generationSince.Store(time.Now().UnixNano())
		has(true) // that of 8 is on its way
		time.Sleep(lag)
		has(false)
		id.generation.Store(6) // the program was faster than the news
		has(true)
		if id.program("spiffe://sdktest.test/other", time.Now()) != nil {
			t.Error("another destination has a program")
		}
		id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{})
		has(false)
	})
}

func TestMalformedProgramsAreLeftOut(t *testing.T) {
	for name, pb := range map[string]*agentpb.Program{
		"not compiled":        {Destination: ownID, Reason: "time.now_ns has no native form"},
		"cut off":             {Destination: ownID, Encoded: encoded(7, ownID)[:10]},
		"another version":     {Destination: ownID, Encoded: append([]byte{99}, encoded(7, ownID)[1:]...)},
		"another destination": {Destination: ownID, Encoded: encoded(7, "spiffe://sdktest.test/other")},
	} {
		id := withProgram(t, 7)
		id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{PolicyGeneration: 7, Programs: []*agentpb.Program{pb}})
		if id.program(ownID, time.Now()) != nil {
			t.Errorf("%s: there is a program", name)
		}
	}
}

func TestStaleRevocationsDenyHereToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := withProgram(t, 7)
		reason := func(want policy.Reason) {
			t.Helper()
			if d := id.Authorize(t.Context(), web("/a")); d.Reason != want {
				t.Errorf("%+v; want %s", d, want)
			}
		}
		id.revocationsAsOf.Store(time.Now().UnixNano())
		time.Sleep(time.Hour)
		reason(policy.Allowed) // age does not matter
		id.denyAfter.Store(int64(5 * time.Minute))
		reason(policy.StaleRevocations)
		id.revocationsAsOf.Store(time.Now().UnixNano())
		reason(policy.Allowed)
		time.Sleep(5 * time.Minute)
		reason(policy.Allowed)
		time.Sleep(time.Nanosecond)
		reason(policy.StaleRevocations)
	})
}

func TestReportHasAllDenialsAndSomeAllowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := withProgram(t, 7)
		for range 1000 {
			id.Authorize(t.Context(), web("/a"))
		}
		denied := web("/a")
		denied.Source = "spiffe://sdktest.test/eve"
		for range maxPending {
			id.Authorize(t.Context(), denied)
		}
		m := id.report.take()
		if m.Decided["ALLOWED"] != 1000 || m.Decided["NO_GRANT"] != maxPending || len(m.Records) != maxPending || m.Dropped != allowedPerSecond {
			t.Errorf("decided %v, %d records, %d dropped", m.Decided, len(m.Records), m.Dropped)
		}
		if rec := m.Records[allowedPerSecond]; rec.GetInput().GetSource() != denied.Source || rec.GetInput().GetDestination() != ownID || rec.GetDecision().GetDecisionId() == "" {
			t.Errorf("record %v", rec)
		}
		if again := id.report.take(); again != nil {
			t.Errorf("told twice: %v", again)
		}
		// What could not be sent is told the next time.
		id.report.giveBack(m)
		if again := id.report.take(); fmt.Sprint(again.Decided) != fmt.Sprint(m.Decided) || len(again.Records) != maxPending || again.Dropped != m.Dropped {
			t.Errorf("given back: %v, %d records, %d dropped", again.Decided, len(again.Records), again.Dropped)
		}
		time.Sleep(time.Second)
		id.Authorize(t.Context(), web("/a"))
		if m := id.report.take(); len(m.Records) != 1 {
			t.Errorf("%d records of the next second", len(m.Records))
		}
	})
}

// A decision, its record and its ID.
func BenchmarkDecideHere(b *testing.B) {
	id := bare()
	id.generation.Store(7)
	id.takePrograms(b.Context(), &agentpb.WatchPolicyResponse{PolicyGeneration: 7, Programs: []*agentpb.Program{{Destination: ownID, Encoded: encoded(7, ownID)}}})
	in := web("/orders/1")
	in.Destination = ownID
	b.ReportAllocs()
	for b.Loop() {
		if d := id.Authorize(b.Context(), in); !d.Allow {
			b.Fatal(d)
		}
	}
}
