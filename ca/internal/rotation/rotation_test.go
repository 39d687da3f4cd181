// Which step each authority may take, and for whom it waits.

package rotation

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var start = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

var policy = Policy{RefreshHint: 5 * time.Minute, MaxJWTTTL: time.Hour, Keep: 24 * time.Hour, LastCall: time.Hour}

func newRoot(id string, from time.Time) Authority {
	return Authority{ID: id, Kind: Root, Replica: "ca", Certificate: []byte(id), NotBefore: from, NotAfter: from.Add(30 * 24 * time.Hour)}
}

func newJWT(id, replica string, from time.Time) Authority {
	return Authority{ID: id, Kind: JWT, Replica: replica, PublicKey: []byte(id), NotBefore: from, NotAfter: from.Add(30 * 24 * time.Hour)}
}

// begin returns a set with an active root "a" and an active JWT key "j".
func begin(t testing.TB) Set {
	t.Helper()
	s, err := Set{}.Enrolled(newRoot("a", start), start)
	if err != nil {
		t.Fatal(err)
	}
	if s, err = s.Enrolled(newJWT("j", "ca", start), start); err != nil {
		t.Fatal(err)
	}
	return s.Stamped(1)
}

func step(t testing.TB, s Set, c Command, v View, now time.Time) Set {
	t.Helper()
	next, err := Step(s, c, v, policy, now)
	if err != nil {
		t.Fatal(err)
	}
	return next
}

func TestActivationWaitsForEveryCountingAgentAndThreeHints(t *testing.T) {
	b := newRoot("b", start)
	published := step(t, begin(t), Command{Verb: Prepare, New: &b}, View{}, start)
	published = step(t, published, Command{Verb: Publish, ID: "b"}, View{}, start).Stamped(2)
	enough := start.Add(15 * time.Minute)
	later := enough.Add(time.Hour)
	end := newRoot("a", start).NotAfter
	for name, test := range map[string]struct {
		agents []Agent
		silent []string
		now    time.Time
		force  bool
		want   string // in the refusal; empty: it is activated
	}{
		"nobody":                    {now: enough},
		"too early":                 {now: enough.Add(-time.Second), want: "not before 2026-11-25T12:15:00Z"},
		"all acknowledged":          {agents: []Agent{{Name: "n1", Sequence: 2, Until: later}}, now: enough},
		"it has just acknowledged":  {agents: []Agent{{Name: "n1", Sequence: 2, Until: later, Since: enough.Add(-settle + 1)}}, now: enough, want: "n1"},
		"that was a while ago":      {agents: []Agent{{Name: "n1", Sequence: 2, Until: later, Since: enough.Add(-settle)}}, now: enough},
		"by a clock that is ahead":  {agents: []Agent{{Name: "n1", Sequence: 2, Until: later, Since: enough.Add(1)}}, now: enough},
		"one is behind":             {agents: []Agent{{Name: "n1", Sequence: 2, Until: later}, {Name: "n2", Sequence: 1, Until: later}}, now: enough, want: "1 agents have not acknowledged: n2"},
		"its last SVID has expired": {agents: []Agent{{Name: "n2", Sequence: 1, Until: enough}}, now: enough},
		"it is banned":              {agents: []Agent{{Name: "n2", Sequence: 1, Until: later, Banned: true}}, now: enough},
		"the last call":             {agents: []Agent{{Name: "n2", Sequence: 1, Until: end}}, now: end.Add(-time.Hour)},
		"before the last call":      {agents: []Agent{{Name: "n2", Sequence: 1, Until: end}}, now: end.Add(-time.Hour - 1), want: "n2; not before 2026-11-25T12:15:00Z; without them at 2026-12-25T11:00:00Z"},
		"a replica is silent":       {now: enough, silent: []string{"ca-2"}, want: "not heard of, so that their agents are not known: replica ca-2"},
		"the last call of one":      {now: end.Add(-time.Hour), silent: []string{"ca-2"}},
		"forced":                    {agents: []Agent{{Name: "n2", Sequence: 1, Until: later}}, now: start, force: true},
	} {
		t.Run(name, func(t *testing.T) {
			next, err := Step(published, Command{Verb: Activate, ID: "b", Force: test.force}, View{Agents: test.agents, Silent: test.silent}, policy, test.now)
			if test.want == "" {
				if err != nil || next.Root().ID != "b" {
					t.Fatalf("activate: %v", err)
				}
				if a, _ := next.Get("a"); a.State != Old {
					t.Errorf("the root before is %s; want old", a.State)
				}
				return
			}
			refusal, ok := errors.AsType[*RefusedError](err)
			if !ok || !strings.Contains(refusal.Reason, test.want) {
				t.Errorf("activate: %v; want a refusal with %q", err, test.want)
			}
			if !next.Equal(published) {
				t.Error("a refusal changed the set")
			}
		})
	}
}

// What a nested CA says for all who count below it: they serve at least this, and
// those hold it back.
func TestServedIsWhatEverybodyServes(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		now := time.Unix(1_000_000, 0)
		var v View
		for i := range rapid.IntRange(0, 5).Draw(rt, "agents") {
			v.Agents = append(v.Agents, Agent{
				Name: fmt.Sprint("n", i), Sequence: rapid.Uint64Range(0, 6).Draw(rt, "sequence"),
				Until: now.Add(time.Duration(rapid.IntRange(-1, 1).Draw(rt, "until")) * time.Minute), Banned: rapid.Bool().Draw(rt, "banned"),
				Since: now.Add(-settle + time.Duration(rapid.IntRange(-1, 1).Draw(rt, "since"))),
			})
		}
		current := rapid.Uint64Range(0, 6).Draw(rt, "current")
		sequence, behind := v.Served(current, now)
		if sequence > current || current > 0 && (len(behind) == 0) != (sequence == current) {
			rt.Errorf("Served(%d) = %d, %v", current, sequence, behind)
		}
		for _, a := range v.Agents {
			just := now.Sub(a.Since) < settle
			if a.counts(now) && (a.Sequence < sequence || just && sequence > 0 || (just || a.Sequence < current) != slices.Contains(behind, a.Name)) {
				rt.Errorf("Served(%d) = %d, %v, and %s serves %d since %s", current, sequence, behind, a.Name, a.Sequence, now.Sub(a.Since))
			}
		}
	})
}

// The CA above judges by what is reported alone: as long as an acknowledgement has
// just come below, it is one that waits for the agent, whatever it was about.
func TestWhatWasJustAcknowledgedBelowCountsForNothingAbove(t *testing.T) {
	published := step(t, begin(t), Command{Verb: Prepare, New: new(newRoot("b", start))}, View{}, start)
	published = step(t, published, Command{Verb: Publish, ID: "b"}, View{}, start).Stamped(2)
	now := start.Add(hints * policy.RefreshHint)
	for ago, want := range map[time.Duration]bool{0: false, settle - 1: false, settle: true} {
		for _, current := range []uint64{2, 3} { // also with a newer one, which it lacks
			below := View{Agents: []Agent{{Name: "n1", Sequence: 2, Since: now.Add(-ago), Until: now.Add(time.Hour)}}}
			sequence, _ := below.Served(current, now)
			above := View{Agents: []Agent{{Name: "nested CA eu", Sequence: sequence, Until: now.Add(time.Hour)}}}
			if _, err := Step(published, Command{Verb: Activate, ID: "b"}, above, policy, now); (err == nil) != want {
				t.Errorf("%s after the acknowledgement below, of %d: reported %d, activate: %v; want it done: %t", ago, current, sequence, err, want)
			}
		}
	}
}

func TestRevocationWaitsForWhatIsAlive(t *testing.T) {
	b := newRoot("b", start)
	s := step(t, begin(t), Command{Verb: Prepare, New: &b}, View{}, start)
	s = step(t, s, Command{Verb: Publish, ID: "b"}, View{}, start).Stamped(2)
	old := step(t, s, Command{Verb: Activate, ID: "b", Force: true}, View{}, start)
	tainted := step(t, old, Command{Verb: Taint, ID: "a"}, View{}, start).Stamped(3)
	end := start.Add(24 * time.Hour)
	issuers := []Issuer{{Replica: "ca", ID: "i1", Root: "a", NotAfter: end}, {Replica: "ca", ID: "i2", Root: "b", NotAfter: end, Current: true}}
	lagging := append(slices.Clone(issuers), Issuer{Replica: "ca-2", ID: "i3", Root: "a", NotAfter: end, Current: true})
	behind := []Agent{{Name: "n1", Sequence: 2, Until: end.Add(time.Hour)}}
	clean := []Agent{{Name: "n1", Sequence: 3, Until: end.Add(time.Hour)}}
	acknowledged := func(at time.Time) []Agent {
		return []Agent{{Name: "n1", Sequence: 3, Since: at, Until: end.Add(time.Hour)}}
	}
	for name, test := range map[string]struct {
		set   Set
		view  View
		now   time.Time
		force bool
		want  string
	}{
		"old, with living SVIDs":        {set: old, view: View{Issuers: issuers}, now: end.Add(-time.Second), want: "taint it"},
		"old, everything has expired":   {set: old, view: View{Issuers: issuers}, now: end},
		"old, and a replica signs":      {set: old, view: View{Issuers: lagging}, now: end, want: "ca-2"},
		"tainted, hints not over":       {set: tainted, view: View{Agents: clean, Issuers: issuers}, now: start.Add(14 * time.Minute), want: "not before"},
		"tainted, an agent is behind":   {set: tainted, view: View{Agents: behind, Issuers: issuers}, now: start.Add(time.Hour), want: "n1"},
		"tainted, a replica signs":      {set: tainted, view: View{Agents: clean, Issuers: lagging}, now: start.Add(time.Hour), want: "ca-2"},
		"tainted, all is replaced":      {set: tainted, view: View{Agents: clean, Issuers: issuers}, now: start.Add(time.Hour)},
		"tainted, just replaced":        {set: tainted, view: View{Agents: acknowledged(start.Add(time.Hour - drained + 1)), Issuers: issuers}, now: start.Add(time.Hour), want: "n1"},
		"tainted, what was has run out": {set: tainted, view: View{Agents: acknowledged(start.Add(time.Hour - drained)), Issuers: issuers}, now: start.Add(time.Hour)},
		"tainted, and expired anyway":   {set: tainted, view: View{Agents: behind, Issuers: issuers}, now: end},
		"tainted, one is silent":        {set: tainted, view: View{Agents: clean, Issuers: issuers, Silent: []string{"ca-2"}}, now: start.Add(time.Hour), want: "ca-2"},
		"tainted, forced":               {set: tainted, view: View{Agents: behind, Issuers: lagging}, now: start, force: true},
		"published, nothing signed yet": {set: s, view: View{Agents: behind, Issuers: issuers}, now: start},
	} {
		t.Run(name, func(t *testing.T) {
			id := "a"
			if strings.HasPrefix(name, "published") {
				id = "b"
			}
			next, err := Step(test.set, Command{Verb: Revoke, ID: id, Force: test.force}, test.view, policy, test.now)
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("revoke: %v; want %q in it", err, test.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if a, _ := next.Get(id); a.State != Revoked {
				t.Errorf("it is %s; want revoked", a.State)
			}
		})
	}
}

// What is tainted never signs again, not even by force.
func TestTaintedSignsNothing(t *testing.T) {
	b := newRoot("b", start)
	s := step(t, begin(t), Command{Verb: Prepare, New: &b}, View{}, start)
	s = step(t, s, Command{Verb: Publish, ID: "b"}, View{}, start).Stamped(2)
	s = step(t, s, Command{Verb: Activate, ID: "b", Force: true}, View{}, start)
	s = step(t, s, Command{Verb: Taint, ID: "a"}, View{}, start).Stamped(3)
	for _, force := range []bool{false, true} {
		next, err := Step(s, Command{Verb: Activate, ID: "a", Force: force}, View{}, policy, start.Add(time.Hour))
		if refusal, ok := errors.AsType[*RefusedError](err); !ok || refusal.Reason != "it is tainted" {
			t.Errorf("activate what is tainted, force %t: %v; want a refusal", force, err)
		}
		if next.Root().ID != "b" {
			t.Errorf("force %t: root %s signs", force, next.Root().ID)
		}
	}
}

func TestWhatSignsStays(t *testing.T) {
	for _, id := range []string{"a", "j"} {
		for _, verb := range []Verb{Taint, Revoke, Forget, Publish, Activate} {
			for _, force := range []bool{false, true} {
				if _, err := Step(begin(t), Command{Verb: verb, ID: id, Force: force}, View{}, policy, start.Add(time.Hour)); err == nil {
					t.Errorf("%s %s, force %t: no error; it is the one that signs", verb, id, force)
				}
			}
		}
	}
	if _, err := Step(begin(t), Command{Verb: Taint, ID: "x"}, View{}, policy, start); !errors.Is(err, ErrUnknown) {
		t.Errorf("taint of nothing: %v", err)
	}
}

func TestPreparedTwiceIsRefused(t *testing.T) {
	again := newRoot("a", start)
	if _, err := Step(begin(t), Command{Verb: Prepare, New: &again}, View{}, policy, start); err == nil {
		t.Error("an authority was prepared that is there")
	}
	ended := newRoot("b", start)
	if _, err := Step(begin(t), Command{Verb: Prepare, New: &ended}, View{}, policy, ended.NotAfter); err == nil {
		t.Error("an authority was prepared whose life is over")
	}
}

// Nor does what has ended begin to sign, or sign again, by force either.
func TestEndedKeySignsNoMore(t *testing.T) {
	newKey := map[Kind]func(string, time.Time) Authority{
		Root: newRoot,
		JWT:  func(id string, from time.Time) Authority { return newJWT(id, "ca", from) },
	}
	for kind, made := range newKey {
		b := made("b", start)
		published := step(t, begin(t), Command{Verb: Prepare, New: &b}, View{}, start)
		published = step(t, published, Command{Verb: Publish, ID: "b"}, View{}, start).Stamped(2)
		before := published.Root()
		if kind == JWT {
			before = published.JWT("ca")
		}
		old := step(t, published, Command{Verb: Activate, ID: "b", Force: true}, View{}, start)
		for name, test := range map[string]struct {
			set Set
			id  string
			end time.Time
		}{"published": {published, "b", b.NotAfter}, "old": {old, before.ID, before.NotAfter}} {
			activate := Command{Verb: Activate, ID: test.id, Force: true}
			step(t, test.set, activate, View{}, test.end.Add(-1))
			next, err := Step(test.set, activate, View{}, policy, test.end)
			if refusal, ok := errors.AsType[*RefusedError](err); !ok || !strings.Contains(refusal.Reason, "its life is over") || !next.Equal(test.set) {
				t.Errorf("%s, %s: activated at its end: %v", kind, name, err)
			}
		}
	}
}

// The key of a replica that joins signs when everybody knows it, as any other.
func TestJoiningReplicaWaitsForItsKey(t *testing.T) {
	s, err := begin(t).Joined(newJWT("j2", "ca-2", start), start)
	if err != nil {
		t.Fatal(err)
	}
	s = s.Stamped(2)
	behind := View{Agents: []Agent{{Name: "n1", Sequence: 1, Until: start.Add(24 * time.Hour)}}}
	clear := View{Agents: []Agent{{Name: "n1", Sequence: 2, Until: start.Add(24 * time.Hour)}}}
	enough := start.Add(15 * time.Minute)
	for _, test := range []struct {
		view View
		now  time.Time
		due  bool
	}{{behind, enough, false}, {clear, enough.Add(-1), false}, {clear, enough, true}} {
		due := Due(s, "ca-2", false, test.view, policy, test.now)
		if want := []Command{{Verb: Activate, ID: "j2"}}; test.due != slices.Equal(due, want) || !test.due && len(due) > 0 {
			t.Errorf("due %s after it joined = %v; want it to be activated: %t", test.now.Sub(start), due, test.due)
		}
	}
	s = step(t, s, Command{Verb: Activate, ID: "j2"}, clear, enough)
	if s.JWT("ca-2") == nil || s.JWT("ca") == nil {
		t.Error("not both replicas sign")
	}
}

func TestEvictedReplicaKeepsNoKey(t *testing.T) {
	s, err := begin(t).Enrolled(newJWT("j2", "ca-2", start), start)
	if err != nil {
		t.Fatal(err)
	}
	s = s.Evicted("ca-2", start)
	if a, _ := s.Get("j2"); a.State != Revoked || s.JWT("ca-2") != nil {
		t.Errorf("the key of the evicted replica is %s", a.State)
	}
	if s.JWT("ca") == nil || s.Root() == nil {
		t.Error("the other authorities went too")
	}
}
