// Which program decides, and for how long; what is told to the agent.

package sdk

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"merlon.dev/agent/agentpb"
	"merlon.dev/integration/measure"
	"merlon.dev/policy"
	"merlon.dev/policy/decisionlog"
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
	id.notePolicy(t.Context(), &agentpb.WatchResponse{PolicyGeneration: generation})
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
	in.Headers = policy.HeaderMap{"x": {"\xff"}}
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
		id.notePolicy(t.Context(), &agentpb.WatchResponse{PolicyGeneration: 8})
		has(true) // that of 8 is on its way
		time.Sleep(lag)
		has(false)
		id.notePolicy(t.Context(), &agentpb.WatchResponse{PolicyGeneration: 6}) // the program was faster than the news
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
		id.revocationsAsOf.Store(steady(time.Now()).UnixNano())
		time.Sleep(time.Hour)
		reason(policy.Allowed) // age does not matter
		id.denyAfter.Store(int64(5 * time.Minute))
		reason(policy.StaleRevocations)
		id.revocationsAsOf.Store(steady(time.Now()).UnixNano())
		reason(policy.Allowed)
		time.Sleep(5 * time.Minute)
		reason(policy.Allowed)
		time.Sleep(time.Nanosecond)
		reason(policy.StaleRevocations)
	})
}

func TestStalePolicyDeniesHereToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := withProgram(t, 7)
		reason := func(want policy.Reason) {
			t.Helper()
			if d := id.Authorize(t.Context(), web("/a")); d.Reason != want || d.Allow != (want == policy.Allowed) {
				t.Errorf("%+v; want %s", d, want)
			}
		}
		id.news.asOf.Store(steady(time.Now()).UnixNano())
		time.Sleep(48 * time.Hour)
		reason(policy.Allowed) // age does not matter
		id.denyPolicyAfter.Store(int64(24 * time.Hour))
		reason(policy.StalePolicy)
		id.news.asOf.Store(steady(time.Now()).UnixNano())
		reason(policy.Allowed)
		time.Sleep(24*time.Hour + 1)
		reason(policy.StalePolicy)
		id.denyAfter.Store(1) // what stands before any policy comes first
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
		m := id.report.message()
		allowed, standFor := 0, uint64(0)
		for _, rec := range m.GetRecords() {
			if rec.GetDecision().GetAllow() {
				allowed, standFor = allowed+1, standFor+rec.GetStandsFor()
			}
		}
		if m.GetDecided()["ALLOWED"] != 1000 || m.GetDecided()["NO_GRANT"] != maxPending || len(m.GetRecords()) != maxPending || m.GetDropped() != uint64(allowed) {
			t.Errorf("decided %v, %d records, %d dropped", m.GetDecided(), len(m.GetRecords()), m.GetDropped())
		}
		if allowed < 5 || allowed > 20 || standFor > 1000 || standFor < 500 {
			t.Errorf("%d allowed calls stand for %d", allowed, standFor)
		}
		rec := m.GetRecords()[allowed]
		if rec.GetInput().GetSource() != denied.Source || rec.GetInput().GetDestination() != ownID || rec.GetDecision().GetDecisionId() == "" || rec.GetStandsFor() != 1 {
			t.Errorf("record %v", rec)
		}
		if rows := m.GetRows(); len(rows) != 2 || rows[0].GetCount() != 1000 || rows[0].GetRuleId() != "all" || rows[1].GetSource() != denied.Source || rows[1].GetDestination() != ownID {
			t.Errorf("rows %v", rows)
		}
		// What could not be sent is told again, as it was.
		if again := id.report.message(); again != m {
			t.Errorf("the next message is %v", again)
		}
		id.report.sent()
		if again := id.report.message(); again != nil {
			t.Errorf("told twice: %v", again)
		}
		time.Sleep(time.Second)
		id.Authorize(t.Context(), web("/a"))
		if m := id.report.message(); len(m.GetRecords()) != 1 || m.GetRows()[0].GetCount() != 1 || m.GetDropped() != 0 {
			t.Errorf("of the next second: %v", m)
		}
	})
}

// Many decisions with long texts become several messages, each of which the agent
// takes, and every decision is in one.
func TestReportsAreBounded(t *testing.T) {
	id := withProgram(t, 7)
	long := strings.Repeat("x", 1900)
	for i := range maxPending {
		in := web("/" + long)
		in.Source = fmt.Sprintf("spiffe://sdktest.test/%s/%d", long, i)
		id.Authorize(t.Context(), in)
	}
	records, counted, messages := 0, uint64(0), 0
	for m := id.report.message(); m != nil; m = id.report.message() {
		if size := proto.Size(m); size > 1<<20 {
			t.Fatalf("a message of %d bytes", size)
		}
		records, messages = records+len(m.GetRecords()), messages+1
		for _, n := range m.GetDecided() {
			counted += n
		}
		id.report.sent()
	}
	if records != maxPending || counted != maxPending || messages < 3 {
		t.Errorf("%d records, %d counted in %d messages", records, counted, messages)
	}
}

// Denials that stand before any policy are reported too, whatever the call's bytes.
func TestDenialsBeforeAnyPolicyAreReported(t *testing.T) {
	id := withProgram(t, 7)
	bad := web("/\xff")
	bad.Headers = policy.HeaderMap{"x": {"\xff"}}
	for _, in := range []*policy.Input{{Protocol: policy.HTTP, Path: "/"}, bad, nil} {
		if d := id.Authorize(t.Context(), in); d.Allow {
			t.Fatalf("%+v", d)
		}
	}
	id.decide(t.Context(), nil, web("/a"))
	m := id.report.message()
	if _, err := proto.Marshal(m); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, rec := range m.GetRecords() {
		got = append(got, rec.GetDecision().GetReason()+" "+strings.TrimPrefix(rec.GetInput().GetDestination(), "spiffe://sdktest.test"))
	}
	if want := "NO_IDENTITY /orders,BAD_REQUEST /orders,NO_IDENTITY /orders"; strings.Join(got, ",") != want {
		t.Errorf("reported %q; want %s", got, want)
	}
}

// What a dry-run grant would have changed is reported, whether the call was allowed
// or not; a match that changes nothing is not.
func TestDryRunDifferencesAreReported(t *testing.T) {
	grant := func(id string, kind program.Kind, path string) program.Grant {
		return program.Grant{ID: id, Kind: kind, Protocol: policy.HTTP, Paths: []program.Path{{Text: path}}}
	}
	id := bare()
	id.generation.Store(7)
	id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{PolicyGeneration: 7, Programs: []*agentpb.Program{{Destination: ownID, Encoded: program.Encode(&program.Source{
		Destination: ownID, Generation: 7, Grants: []program.Grant{
			grant("a", program.Allow, "/allowed"), grant("b", program.DryRunDeny, "/allowed"),
			grant("c", program.DryRun, "/new"), grant("d", program.DryRun, "/allowed"),
			grant("e", program.Allow, "/same"), grant("f", program.DryRun, "/same"),
		},
	})}}})
	for range 30 {
		for _, path := range []string{"/allowed", "/new", "/same"} {
			id.Authorize(t.Context(), web(path))
		}
	}
	got := map[string]int{}
	for _, rec := range id.report.message().GetRecords() {
		got[fmt.Sprint(rec.GetInput().GetPath(), " ", rec.GetDecision().GetAllow(), " ", rec.GetDecision().GetDryRun())]++
	}
	if got["/allowed true [b]"] != 30 || got["/new false [c]"] != 30 || got["/same true []"] > 20 || len(got) != 3 {
		t.Errorf("reported %v", got)
	}
}

// A decision, its record and its ID: of an allowed call, of which few are kept, and
// of a denied one, of which all are, and somebody takes them out.
func BenchmarkDecideHere(b *testing.B) {
	for name, source := range map[string]string{"allow": "web", "deny": "eve"} {
		b.Run(name, func(b *testing.B) {
			id := bare()
			id.generation.Store(7)
			id.takePrograms(b.Context(), &agentpb.WatchPolicyResponse{PolicyGeneration: 7, Programs: []*agentpb.Program{{Destination: ownID, Encoded: encoded(7, ownID)}}})
			in := web("/orders/1")
			in.Source, in.Destination = "spiffe://sdktest.test/"+source, ownID
			decide := func() {
				now := time.Now()
				id.decideHere(id.program(ownID, now), in, now)
			}
			decide() // the first call of a row allocates it
			b.ReportAllocs()
			b.ResetTimer()
			used := measure.PerOp(b)
			for n := 0; b.Loop(); n++ {
				decide()
				if n%(maxPending/2) == 0 {
					id.report.Take(maxPending, func(*decisionlog.Record) {})
				}
			}
			used()
			if id.report.Dropped() > 0 {
				b.Error("records were dropped, which costs less")
			}
		})
	}
}
