// The laws of rotation, in a world where agents, replicas and operators do what
// they like in any order: no moment is without a key that signs, and nothing that
// is alive is left without what it is verified with.

package rotation

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

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
