// What is done when, by itself: whom the next key waits for, how long, and what
// is begun at most.

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

// Left alone, with agents that acknowledge, roots and keys follow each other,
// and none ends while it signs.
func TestLeftAloneItRotates(t *testing.T) {
	first := begin(t)
	rapid.Check(t, func(rt *rapid.T) {
		w := &world{t: rt, set: first, now: start, sequence: 1, bundles: map[uint64][]string{1: {"a", "j"}}}
		w.issue()
		w.agents = []Agent{{Name: "n1", Sequence: 1, Until: start.Add(time.Hour)}}
		pause := time.Duration(rapid.IntRange(1, 12).Draw(rt, "hours")) * time.Hour
		for w.now.Before(start.Add(100 * 24 * time.Hour)) {
			w.now = w.now.Add(pause)
			w.agents[0].Sequence, w.agents[0].Until = w.sequence, w.now.Add(time.Hour)
			w.issue()
			w.issuers = slices.DeleteFunc(w.issuers, func(i Issuer) bool { return !w.now.Before(i.NotAfter) })
			for _, c := range Due(w.set, "ca", true, w.view(), policy, w.now) {
				w.take(c)
			}
			if w.set.Root().Ended(w.now) || w.set.JWT("ca").Ended(w.now) {
				rt.Fatal("what signs has ended")
			}
		}
		if n := len(w.set.All()); w.made < 8 || n > 8 {
			rt.Fatalf("after 100 days of authorities that live 30, %d were made and %d are left", w.made, n)
		}
	})
}

// An agent that lives and never acknowledges holds the next root up to the last
// call of the one before: it is not withdrawn meanwhile, and signs then, while
// everybody else can still renew.
func TestSilentAgentHoldsTheNextRootUntilTheLastCall(t *testing.T) {
	first := begin(t)
	rapid.Check(t, func(rt *rapid.T) {
		w := &world{t: rt, set: first, now: start, sequence: 1, bundles: map[uint64][]string{1: {"a", "j"}}}
		w.issue()
		pause := time.Duration(rapid.IntRange(10, 720).Draw(rt, "minutes")) * time.Minute
		end, warned := newRoot("a", start).NotAfter, false
		last := end.Add(-policy.LastCall)
		next := ""
		for w.set.Root().ID == "a" {
			w.now = w.now.Add(pause)
			if w.now.After(last.Add(pause)) {
				rt.Fatal("it is past the last call, and the next root does not sign")
			}
			w.agents = []Agent{{Name: "n1", Sequence: 1, Until: w.now.Add(time.Hour)}}
			pending, endangered := Endangered(w.set, w.view(), policy, w.now)
			if want := end.Sub(w.now) <= 90*time.Hour && w.now.Before(last); endangered != want || want && pending.ID != next {
				rt.Fatalf("%s before the end: endangered = %t, %+v; want %t of %s", end.Sub(w.now), endangered, pending, want, next)
			}
			warned = warned || endangered
			left := LeftBehind(w.set, next, w.view(), policy, w.now)
			if want := next != "" && !w.now.Before(last); (len(left.Agents) == 1) != want {
				rt.Fatalf("%s before the end %+v is left behind; want the agent: %t", end.Sub(w.now), left, want)
			}
			w.due()
			for _, a := range w.set.All() {
				if a.Kind == Root && a.ID != "a" && next == "" {
					next = a.ID
				}
			}
			if a, ok := w.set.Get(next); next != "" && (!ok || a.State == Revoked) {
				rt.Fatalf("the next root was withdrawn %s before the end", end.Sub(w.now))
			}
		}
		if root := w.set.Root(); root.ID != next || w.now.Before(last) || !warned {
			rt.Fatalf("%s signs %s before the end, warned %t; want %s, from the last call on", root.ID, end.Sub(w.now), warned, next)
		}
	})
}

// The agents of a replica that is cut off seem to count no more, and do: nothing
// signs without them before the last call, nor once it is back and they lack it.
func TestReplicaThatIsCutOffHoldsTheNextRoot(t *testing.T) {
	first := begin(t)
	rapid.Check(t, func(rt *rapid.T) {
		w := &world{t: rt, set: first, now: start, sequence: 1, bundles: map[uint64][]string{1: {"a", "j"}}}
		w.issue()
		w.agents = []Agent{{Name: "n1", Sequence: 1, Until: start.Add(time.Hour)}}
		w.cut, w.recorded = true, w.agents[0]
		pause := time.Duration(rapid.IntRange(10, 720).Draw(rt, "minutes")) * time.Minute
		last := newRoot("a", start).NotAfter.Add(-policy.LastCall)
		back := start.Add(time.Duration(rapid.IntRange(1, 40).Draw(rt, "days away")) * 24 * time.Hour)
		known := back.Add(time.Duration(rapid.IntRange(0, 48).Draw(rt, "hours until it acknowledges")) * time.Hour)
		for w.set.Root().ID == "a" && w.now.Before(last) {
			w.now = w.now.Add(pause)
			w.agents[0].Until = w.now.Add(time.Hour)
			w.cut = w.now.Before(back)
			if !w.now.Before(known) {
				w.agents[0].Sequence = w.sequence
			}
			w.issue()
			w.due() // check looks at the agent as it is
		}
		if w.set.Root().ID != "a" && w.now.Before(known) && w.now.Before(last) {
			rt.Fatalf("root %s signs, and n1 does not know it", w.set.Root().ID)
		}
	})
}

// A root that comes late is waited for by those who poll, but not for so long
// that nobody could renew.
func TestLastCallLeavesTimeToRenew(t *testing.T) {
	end := newRoot("a", start).NotAfter
	for before, want := range map[time.Duration]time.Duration{ // of the end: published → signs
		24 * time.Hour:   time.Hour,
		65 * time.Minute: 50 * time.Minute,
		40 * time.Minute: 30 * time.Minute, // half of the last call
		5 * time.Minute:  30 * time.Minute, // at once
	} {
		b := newRoot("b", end.Add(-before))
		s := step(t, begin(t), Command{Verb: Prepare, New: &b}, View{}, end.Add(-before))
		s = step(t, s, Command{Verb: Publish, ID: "b"}, View{}, end.Add(-before)).Stamped(2)
		v := View{Agents: []Agent{{Name: "n1", Sequence: 1, Until: end}}}
		if _, err := Step(s, Command{Verb: Activate, ID: "b"}, v, policy, end.Add(-want-1)); err == nil {
			t.Errorf("published %s before the end: it signs before %s", before, want)
		}
		if _, err := Step(s, Command{Verb: Activate, ID: "b"}, v, policy, end.Add(-want)); err != nil {
			t.Errorf("published %s before the end: at %s %v", before, want, err)
		}
	}
	short := newRoot("a", start)
	short.NotAfter = start.Add(time.Hour)
	if got, want := policy.lastCall(&short), start.Add(time.Hour-time.Hour/8); !got.Equal(want) {
		t.Errorf("last call of a root that lives an hour at %s; want %s", got, want)
	}
}

// Whoever prepares without end is stopped, and what happens by itself is not.
func TestPreparedAuthoritiesAreBounded(t *testing.T) {
	s := begin(t)
	prepare := func(a Authority) error {
		next, err := Step(s, Command{Verb: Prepare, New: &a}, View{}, policy, start)
		s = next
		return err
	}
	for i := range maxUpcoming {
		if err := prepare(newRoot(fmt.Sprint("r", i), start)); err != nil {
			t.Fatal(err)
		}
	}
	err := prepare(newRoot("r", start))
	if _, ok := errors.AsType[*RefusedError](err); !ok || !strings.Contains(err.Error(), "activate one of them, or revoke") {
		t.Errorf("one root too many: %v; want a refusal that says what to do", err)
	}
	if err := prepare(newJWT("k", "ca", start)); err != nil {
		t.Errorf("a JWT key beside many roots: %v", err)
	}
	for i := 0; len(s.All()) < maxAuthorities; i++ {
		if err := prepare(newJWT(fmt.Sprint("k", i), fmt.Sprint("ca-", i), start)); err != nil {
			t.Fatal(err)
		}
	}
	if err := prepare(newJWT("one-more", "ca-x", start)); err == nil || !strings.Contains(err.Error(), "revoke those") {
		t.Errorf("one authority too many: %v; want a refusal that says what to do", err)
	}
	// Those that are revoked leave before their time where there are many.
	for _, a := range s.All() {
		if a.State == Prepared {
			s = step(t, s, Command{Verb: Revoke, ID: a.ID}, View{}, start)
		}
	}
	for _, c := range Due(s, "ca", true, View{}, policy, start) {
		s = step(t, s, c, View{}, start)
	}
	if n := len(s.All()); n > maxRevoked+3 {
		t.Errorf("%d authorities are left, of which 2 sign; want %d revoked ones at most", n, maxRevoked)
	}
	if err := prepare(newRoot("r", start)); err != nil {
		t.Error(err)
	}
}

func TestPreparedByHandWaitsForItsTime(t *testing.T) {
	b := newRoot("b", start)
	s := step(t, begin(t), Command{Verb: Prepare, New: &b}, View{}, start)
	due := Due(s, "ca", true, View{}, policy, start)
	if len(due) != 1 || due[0].Verb != Publish {
		t.Fatalf("due = %v; want it to be published", due)
	}
	s = step(t, s, due[0], View{}, start).Stamped(2)
	if due := Due(s, "ca", true, View{}, policy, start.Add(24*time.Hour)); len(due) != 0 {
		t.Errorf("due = %v; the root that signs is not old enough", due)
	}
	pending := Waiting(s, View{}, policy, start)
	if len(pending) != 1 || pending[0].Next != Activate || !pending[0].Wait.Until.Equal(start.Add(15*time.Minute)) {
		t.Errorf("pending = %+v", pending)
	}
	if due := Due(s, "ca-2", false, View{}, policy, start); len(due) != 1 || due[0].Verb != Prepare || due[0].Kind != JWT {
		t.Errorf("due of a replica without keys = %v; want a JWT key", due)
	}
}

// Who joins after a root became active has only that one to know the next by.
func TestOnlyRootsToComeAreResealed(t *testing.T) {
	b := newRoot("b", start)
	b.Seal, b.SealedBy = []byte("1"), "x"
	s := step(t, begin(t), Command{Verb: Prepare, New: &b}, View{}, start)
	s = s.Resealed("b", []byte("2"), "a")
	if got, _ := s.Get("b"); got.SealedBy != "a" || string(got.Seal) != "2" {
		t.Errorf("sealed by %q: %q; want the one that signs", got.SealedBy, got.Seal)
	}
	for _, id := range []string{"a", "none"} { // it signs, and is sealed by whoever was before
		if !s.Resealed(id, []byte("3"), "b").Equal(s) {
			t.Errorf("%s was sealed anew", id)
		}
	}
	if again := s.Resealed("b", []byte("4"), "a"); !again.Equal(s) {
		t.Error("the same root sealed it twice")
	}
}
