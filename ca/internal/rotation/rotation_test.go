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

// world is who rests on the authorities: agents with the trust bundle that they
// have, and SVIDs under the root that signed them.
type world struct {
	t        *rapid.T
	set      Set
	now      time.Time
	sequence uint64
	bundles  map[uint64][]string // sequence → IDs in it
	agents   []Agent
	issuers  []Issuer
	made     int
	// cut is a replica that is cut off: whom it renews nobody else knows, and
	// recorded is what the store says of the first agent, which is its.
	cut      bool
	recorded Agent
	life     time.Duration // of roots that are made; 0: newRoot's
}

func (w *world) view() View {
	v := View{Agents: w.agents, Issuers: w.issuers}
	if w.cut {
		v.Agents, v.Silent = append([]Agent{w.recorded}, w.agents[1:]...), []string{"ca-2"}
	}
	return v
}

// take does c and publishes what it makes of the trust bundle, as the store
// does in one transaction.
func (w *world) take(c Command) {
	if c.Verb == Prepare && c.New == nil {
		w.made++
		a := newJWT(fmt.Sprintf("j%d", w.made), "ca", w.now)
		if c.Kind == Root {
			a = newRoot(fmt.Sprintf("r%d", w.made), w.now)
			if w.life > 0 {
				a.NotAfter = w.now.Add(w.life)
			}
		}
		c.New = &a
	}
	before := w.set
	next, err := Step(w.set, c, w.view(), policy, w.now)
	if err != nil {
		if !next.Equal(before) {
			w.t.Fatalf("%v: refused with %v, and changed", c, err)
		}
		return
	}
	if trusted(next) != trusted(before) {
		w.sequence++
	}
	w.set = next.Stamped(w.sequence)
	w.bundles[w.sequence] = ids(next)
	root := before.Root()
	if now := w.set.Root(); now != nil && (root == nil || root.ID != now.ID) {
		for i := range w.issuers {
			w.issuers[i].Current = false
		}
		w.issue()
	}
	w.check(c, before)
}

// issue makes the intermediate that the replica signs with from now on.
func (w *world) issue() {
	for i := range w.issuers {
		w.issuers[i].Current = false
	}
	root := w.set.Root()
	end := w.now.Add(24 * time.Hour)
	if root.NotAfter.Before(end) { // an intermediate ends with its root
		end = root.NotAfter
	}
	w.issuers = append(w.issuers, Issuer{Replica: "ca", ID: fmt.Sprint(len(w.issuers)), Root: root.ID, NotAfter: end, Current: true})
}

func ids(s Set) (in []string) {
	for _, a := range s.All() {
		if a.State.Trusted() {
			in = append(in, a.ID)
		}
	}
	return in
}

func trusted(s Set) string { return fmt.Sprint(ids(s), s.TaintedIDs()) }

// check holds after every step.
func (w *world) check(c Command, before Set) {
	root, jwt := w.set.Root(), w.set.JWT("ca")
	if root == nil || jwt == nil {
		w.t.Fatalf("%v left nothing that signs", c)
	}
	if err := w.set.check(); err != nil {
		w.t.Fatal(err)
	}
	if c.Force {
		return
	}
	for _, kind := range []Kind{Root, JWT} {
		if n := upcoming(w.set, kind); n > maxUpcoming || len(w.set.All()) > maxAuthorities {
			w.t.Fatalf("%v: %d of kind %s are to come, %d are there in all", c, n, kind, len(w.set.All()))
		}
	}
	// What begins to sign is in the trust bundle of every agent that counts, but for
	// a root since the last call of the one before.
	for _, a := range w.agents {
		if !a.counts(w.now) {
			continue
		}
		for _, signs := range []*Authority{root, jwt} {
			if was, ok := before.Get(signs.ID); ok && was.State == Active {
				continue // since an earlier step
			}
			if signs.Kind == Root && !w.now.Before(policy.lastCall(before.Root())) {
				continue
			}
			if !slices.Contains(w.bundles[a.Sequence], signs.ID) {
				w.t.Fatalf("%v: %s signs, and %s has trust bundle %d: %v", c, signs.ID, a.Name, a.Sequence, w.bundles[a.Sequence])
			}
		}
	}
	// What goes has nothing living: no replica signs under it, and whoever counts
	// has replaced what it signed, or it has expired.
	if c.Verb != Revoke {
		return
	}
	was, _ := before.Get(c.ID)
	for _, i := range w.issuers {
		if i.Root != c.ID || !w.now.Before(i.NotAfter) {
			continue
		}
		if i.Current || was.State == Old {
			w.t.Fatalf("%v: intermediate %s under it lives until %s", c, i.ID, i.NotAfter)
		}
		for _, a := range w.agents {
			if a.counts(w.now) && a.Sequence < was.Sequence {
				w.t.Fatalf("%v: %s has not replaced what it signed", c, a.Name)
			}
		}
	}
}

func upcoming(s Set, kind Kind) (n int) {
	for _, a := range s.All() {
		if a.Kind == kind && (a.State == Prepared || a.State == Published) {
			n++
		}
	}
	return n
}

// due takes what is due, and says what it may be: nothing that is to follow goes.
func (w *world) due() {
	for _, c := range Due(w.set, "ca", true, w.view(), policy, w.now) {
		if a, ok := w.set.Get(c.ID); ok && c.Verb == Revoke && a.State == Published && !a.Ended(w.now) && w.set.active(a.slot()).pastHalf(w.now) {
			w.t.Fatalf("%s is withdrawn, and %s needs a successor", a.ID, w.set.active(a.slot()).ID)
		}
		w.take(c)
	}
}

// Never a moment without a valid signing key; without force never an SVID under
// a key that a counting agent does not have, and nothing is withdrawn that
// somebody needs. A root that ends has a successor, whoever does not acknowledge.
func TestRotationLaws(t *testing.T) {
	first := begin(t)
	rapid.Check(t, func(t *rapid.T) {
		w := &world{t: t, set: first, now: start, sequence: 1, bundles: map[uint64][]string{1: {"a", "j"}}}
		// The first root lives 30 days; those that follow may end sooner.
		w.life = time.Duration(rapid.IntRange(2, 60).Draw(t, "hours that a root lives")) * time.Hour
		w.issue()
		for i := range rapid.IntRange(0, 3).Draw(t, "agents") {
			w.agents = append(w.agents, Agent{Name: fmt.Sprint("n", i), Sequence: 1, Until: start.Add(time.Hour)})
		}
		forces := rapid.Bool().Draw(t, "with force")
		t.Repeat(map[string]func(*rapid.T){
			"time": func(t *rapid.T) {
				w.now = w.now.Add(time.Duration(rapid.IntRange(1, 180).Draw(t, "minutes")) * time.Minute)
			},
			"renewal of the intermediate": func(*rapid.T) { w.issue() },
			"acknowledgement": func(t *rapid.T) {
				if len(w.agents) == 0 {
					t.Skip("nobody")
				}
				n := rapid.IntRange(0, len(w.agents)-1).Draw(t, "agent")
				if w.cut && n == 0 {
					t.Skip("it is cut off")
				}
				a := &w.agents[n]
				a.Sequence = uint64(rapid.IntRange(int(a.Sequence), int(w.sequence)).Draw(t, "sequence"))
				a.Until = w.now.Add(time.Hour)
			},
			"a replica is cut off": func(t *rapid.T) {
				if len(w.agents) == 0 || w.cut {
					t.Skip("nobody is its")
				}
				w.cut, w.recorded = true, w.agents[0]
			},
			"it has caught up": func(*rapid.T) { w.cut = false },
			"it renews an agent": func(t *rapid.T) {
				if !w.cut {
					t.Skip("it is there")
				}
				if w.agents[0].counts(w.now) {
					w.agents[0].Until = w.now.Add(time.Hour)
				}
			},
			"ban": func(t *rapid.T) {
				if len(w.agents) == 0 {
					t.Skip("nobody")
				}
				w.agents[rapid.IntRange(0, len(w.agents)-1).Draw(t, "agent")].Banned = true
			},
			"command": func(t *rapid.T) {
				c := Command{Verb: rapid.SampledFrom([]Verb{Prepare, Publish, Activate, Taint, Revoke, Forget}).Draw(t, "verb")}
				c.Kind = rapid.SampledFrom([]Kind{Root, JWT}).Draw(t, "kind")
				c.Force = forces && rapid.Bool().Draw(t, "force")
				all := w.set.All()
				c.ID = all[rapid.IntRange(0, len(all)-1).Draw(t, "which")].ID
				w.take(c)
			},
			"what is due":   func(*rapid.T) { w.due() },
			"a root's life": func(*rapid.T) { w.now = w.now.Add(w.life) },
			"all that is due": func(t *rapid.T) {
				for range 6 { // prepared, published, active; what has ended goes first
					w.due()
				}
				if root := w.set.Root(); root.Ended(w.now) {
					t.Fatalf("root %s has ended, and nothing that is due replaces it: %+v", root.ID, w.set.All())
				}
			},
		})
	})
}

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

func TestEncodeDecode(t *testing.T) {
	s := begin(t)
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b)
	if err != nil || !got.Equal(s) {
		t.Errorf("Decode(Encode) = %v, %v", got, err)
	}
	for name, text := range map[string]string{
		"no JSON":          `{`,
		"another version":  `{"v":2}`,
		"twice":            strings.Replace(string(b), `"id":"j"`, `"id":"a"`, 1),
		"two sign":         strings.Replace(strings.Replace(string(b), `"kind":"jwt"`, `"kind":"x509-root"`, 1), `"public_key"`, `"certificate"`, 1),
		"an unknown state": strings.Replace(string(b), `"state":"active"`, `"state":"resting"`, 1),
		"an unknown kind":  strings.Replace(string(b), `"kind":"jwt"`, `"kind":"pgp"`, 1),
		"no public part":   strings.Replace(string(b), `"public_key"`, `"publicKey"`, 1),
	} {
		if _, err := Decode([]byte(text)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzDecode(f *testing.F) {
	b, err := begin(f).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Decode(b)
		if err != nil {
			return
		}
		again, err := s.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Decode(again); err != nil {
			t.Fatalf("what was read is not read again: %v", err)
		}
	})
}
