// What is compared with the decisions, and that it decides nothing.

package sdk

import (
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy/program"
)

// denying is a program of this generation that allows nothing.
func denying(generation uint64) []byte {
	return program.Encode(&program.Source{Destination: ownID, Generation: generation})
}

// tried has generation decide and another one beside it.
func tried(t *testing.T, decides, beside []byte, canary bool) *Identity {
	t.Helper()
	id := bare()
	id.notePolicy(t.Context(), &agentpb.WatchResponse{PolicyGeneration: 7, PolicyVersion: 70, CandidateGeneration: 8})
	id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{
		PolicyGeneration: 7, PolicyVersion: 70, CandidateGeneration: 8, Step: 3,
		Programs: []*agentpb.Program{{Destination: ownID, Encoded: decides, Beside: beside, Canary: canary}},
	})
	return id
}

func TestWhatIsBesideDecidesNothing(t *testing.T) {
	for _, canary := range []bool{false, true} {
		decides, beside := encoded(7, ownID), denying(8)
		if canary {
			decides, beside = encoded(8, ownID), denying(7)
		}
		id := tried(t, decides, beside, canary)
		for range 5 {
			if d := id.Authorize(t.Context(), web("/a")); !d.Allow {
				t.Fatalf("canary %v: %+v", canary, d)
			}
		}
		m := id.withPolicy(nil, 70).GetCounts()
		if len(m.GetComparisons()) != 1 || len(m.GetDifferences()) != 1 || m.GetCandidateGeneration() != 8 || m.GetStep() != 3 {
			t.Fatalf("canary %v: counted %v", canary, m)
		}
		c, d := m.GetComparisons()[0], m.GetDifferences()[0]
		wouldDeny, wouldAllow := uint64(5), uint64(0)
		if canary { // which allows what the active policy denies
			wouldDeny, wouldAllow = 0, 5
		}
		if c.GetCanary() != canary || c.GetWouldDeny() != wouldDeny || c.GetWouldAllow() != wouldAllow || d.GetCalls() != 5 || d.GetCandidateAllows() != canary || d.GetSource() != "spiffe://sdktest.test/web" {
			t.Errorf("canary %v: %v, %v", canary, c, d)
		}
		if m := id.withPolicy(nil, 70); m != nil {
			t.Errorf("told twice: %v", m)
		}
	}
}

func TestMalformedProgramBesideIsLeftOut(t *testing.T) {
	id := tried(t, encoded(7, ownID), []byte("rubbish"), false)
	if d := id.Authorize(t.Context(), web("/a")); !d.Allow {
		t.Errorf("%+v", d)
	}
	if m := id.withPolicy(nil, 70); m != nil {
		t.Errorf("compared with rubbish: %v", m)
	}
}

// A busy service compares the first calls of a second, and decides all.
func TestComparedCallsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := tried(t, encoded(7, ownID), denying(8), false)
		for range 3 * comparedPerSecond {
			id.Authorize(t.Context(), web("/a"))
		}
		if n := id.withPolicy(nil, 70).GetCounts().GetComparisons()[0].GetWouldDeny(); n != comparedPerSecond {
			t.Errorf("%d calls of a second are compared; want %d", n, comparedPerSecond)
		}
		time.Sleep(time.Second)
		id.Authorize(t.Context(), web("/a"))
		if n := id.withPolicy(nil, 70).GetCounts().GetComparisons()[0].GetWouldDeny(); n != 1 {
			t.Errorf("in the next second %d; want 1", n)
		}
	})
}

// The canary that was taken away is not used for longer than a program of old, though
// its generation is the highest.
func TestCanaryThatIsTakenAwayIsNotUsedForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := tried(t, encoded(8, ownID), denying(7), true)
		id.notePolicy(t.Context(), &agentpb.WatchResponse{PolicyGeneration: 7, PolicyVersion: 71})
		if p := id.program(ownID, time.Now()); p == nil {
			t.Error("the program that follows is not waited for")
		}
		time.Sleep(lag)
		if p := id.program(ownID, time.Now()); p != nil {
			t.Errorf("generation %d still decides", p.Generation())
		}
	})
}

// Counts of one step of a candidate do not become those of the next.
func TestCountsEndWithTheirStep(t *testing.T) {
	id := tried(t, encoded(7, ownID), denying(8), false)
	id.Authorize(t.Context(), web("/a"))
	take := func(step uint32) *agentpb.Counts {
		id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{
			PolicyGeneration: 7, PolicyVersion: 72, CandidateGeneration: 8, Step: step,
			Programs: []*agentpb.Program{{Destination: ownID, Encoded: encoded(7, ownID), Beside: denying(8)}},
		})
		return id.withPolicy(nil, 72).GetCounts()
	}
	if m := take(3); m.GetComparisons()[0].GetWouldDeny() != 1 {
		t.Errorf("the same step: %v", m)
	}
	id.Authorize(t.Context(), web("/a"))
	if m := take(4); m != nil {
		t.Errorf("the next step: %v", m)
	}
}

// BenchmarkDecideBesideCandidate is a decision while a candidate is tried, beyond the
// calls of a second that are compared, and the same without one.
func BenchmarkDecideBesideCandidate(b *testing.B) {
	for name, beside := range map[string][]byte{"tried": encoded(8, ownID), "none": nil} {
		b.Run(name, func(b *testing.B) {
			id := bare()
			id.notePolicy(b.Context(), &agentpb.WatchResponse{PolicyGeneration: 7, PolicyVersion: 70, CandidateGeneration: 8})
			id.takePrograms(b.Context(), &agentpb.WatchPolicyResponse{
				PolicyGeneration: 7, PolicyVersion: 70, CandidateGeneration: 8, Step: 3,
				Programs: []*agentpb.Program{{Destination: ownID, Encoded: encoded(7, ownID), Beside: beside}},
			})
			in := web("/a")
			in.Destination = ownID
			b.ReportAllocs()
			for b.Loop() {
				if d := id.Authorize(b.Context(), in); !d.Allow {
					b.Fatal(d)
				}
			}
		})
	}
}
