// The states of a proposal: tables for each refusal, laws for all of them, over a
// real store.

package approval

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var start = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

func newStore(t *testing.T) store.Store {
	t.Helper()
	st, err := badger.Open(t.TempDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return st
}

func person(name string) Person { return Person{Principal: name, Name: name, Role: "operator"} }

func terms(by Person, request, basis string) Terms {
	return Terms{Method: "/test.S/Act", Act: "act", Request: []byte(request), Basis: basis, By: by}
}

func propose(t *testing.T, st store.Store, by, request string) *Proposal {
	t.Helper()
	p, err := Propose(t.Context(), st, terms(person(by), request, "basis"), start)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// carry does what p proposes in one transaction, which puts key.
func carry(ctx context.Context, st store.Store, p *Proposal, by, basis, key string) error {
	ctx, _ = Granted(ctx, p, by, "act-"+by)
	cmps, ops, err := Join(ctx, basis)
	if err != nil {
		return err
	}
	res, err := st.Txn(ctx, cmps, append(ops, store.Put(key, nil)), nil)
	if err == nil && !res.Succeeded {
		err = ErrEnded
	}
	return err
}

func why(err error) Why {
	if e, ok := errors.AsType[*RefusedError](err); ok {
		return e.Why
	}
	return ""
}

func TestWhoCanGrantWhen(t *testing.T) {
	uid := func(n uint32, principal string) Person {
		return Person{Principal: principal, Name: fmt.Sprintf("uid:%d", n), UID: &n}
	}
	for name, c := range map[string]struct {
		by, second Person
		state      State
		at         time.Duration
		want       Why
	}{
		"another one":                     {person("ann"), person("bob"), Open, 0, ""},
		"another one at the last moment":  {person("ann"), person("bob"), Open, Life - 1, ""},
		"too late":                        {person("ann"), person("bob"), Open, Life, WhyExpired},
		"the same one":                    {person("ann"), person("ann"), Open, 0, WhyOwn},
		"the same one by another name":    {uid(0, "host"), uid(998, "host"), Open, 0, WhyOwn},
		"the same uid on another machine": {uid(998, "uid:998"), uid(998, "host"), Open, 0, WhyOwn},
		"another uid":                     {uid(1000, "uid:1000"), uid(0, "host"), Open, 0, ""},
		"nobody":                          {person("ann"), Person{}, Open, 0, WhyOwn},
		"done":                            {person("ann"), person("bob"), Done, 0, WhyDone},
		"done, and the same one":          {person("ann"), person("ann"), Done, 0, WhyDone},
		"withdrawn":                       {person("ann"), person("bob"), Withdrawn, 0, WhyWithdrawn},
		"void":                            {person("ann"), person("bob"), Void, 0, WhyVoid},
		"of no state":                     {person("ann"), person("bob"), "", 0, WhyVoid},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := New(terms(c.by, "x", ""), start)
			if err != nil {
				t.Fatal(err)
			}
			p.State = c.state
			err = p.Grantable(c.second, start.Add(c.at))
			if got := why(err); got != c.want || (err == nil) != (c.want == "") {
				t.Errorf("Grantable = %v (%q); want %q", err, got, c.want)
			}
		})
	}
}

// What was read under an ID is what is done: a store in which somebody wrote
// something else under it is noticed.
func TestIDIsThatOfWhatIsProposed(t *testing.T) {
	st := newStore(t)
	p := propose(t, st, "ann", "harmless")
	kv, _, err := st.Get(t.Context(), proposalPrefix+p.ID)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string][2]string{
		"request": {`"request":"aGFybWxlc3M="`, `"request":"aGFybWZ1bA=="`},
		"basis":   {`"basis":"basis"`, `"basis":"other"`},
		"by":      {`"principal":"ann"`, `"principal":"eve"`},
		"method":  {"/test.S/Act", "/test.S/Evil"},
	} {
		changed := kv
		changed.Value = []byte(strings.Replace(string(kv.Value), change[0], change[1], 1))
		if string(changed.Value) == string(kv.Value) {
			t.Fatalf("%s: nothing to change in %s", name, kv.Value)
		}
		if got, err := Decode(changed); err == nil {
			t.Errorf("%s: decoded as %+v", name, got)
		}
	}
	got, err := Decode(kv)
	if err != nil || got.ID != p.ID || string(got.Request) != "harmless" || got.By.Principal != "ann" {
		t.Errorf("Decode = %+v, %v", got, err)
	}
}

func TestReadSaysWhatThereIsNot(t *testing.T) {
	st := newStore(t)
	for _, id := range []string{"", "x", "../required/ca", strings.Repeat("0", 32), strings.Repeat("A", 32)} {
		if _, err := Read(t.Context(), st, id); why(err) != WhyUnknown {
			t.Errorf("Read(%q): %v; want unknown", id, err)
		}
	}
}

// Who repeats a call has one proposal; who goes on has at most so many.
func TestProposalsOfOneAreBounded(t *testing.T) {
	st := newStore(t)
	if first, again := propose(t, st, "ann", "0"), propose(t, st, "ann", "0"); first.ID != again.ID {
		t.Errorf("the same call twice made %s and %s", first.ID, again.ID)
	}
	if other := propose(t, st, "bob", "0"); other.By.Name != "bob" {
		t.Errorf("bob got the proposal of %s", other.By.Name)
	}
	for i := 1; i < maxOpen; i++ {
		propose(t, st, "ann", fmt.Sprint(i))
	}
	_, err := Propose(t.Context(), st, terms(person("ann"), "more", ""), start)
	if why(err) != WhyTooMany {
		t.Errorf("one more: %v; want %s", err, WhyTooMany)
	}
	propose(t, st, "bob", "1")
	if _, err := Propose(t.Context(), st, terms(person("ann"), "more", ""), start.Add(Life)); err != nil {
		t.Errorf("when they have expired: %v", err)
	}
	if _, err := Propose(t.Context(), st, terms(person("ann"), "later", ""), start.Add(Life+kept)); err != nil {
		t.Fatal(err)
	}
	all, err := List(t.Context(), st)
	if err != nil || len(all) != 2 {
		t.Errorf("List: %d proposals, %v; want the last two: others are forgotten", len(all), err)
	}
}

// Where one replica asks for a second administrator, all do.
func TestStricterReplicaWins(t *testing.T) {
	st := newStore(t)
	check := func(want string) {
		t.Helper()
		if got, err := Required(t.Context(), st); err != nil || got != want {
			t.Errorf("Required = %q, %v; want %q", got, err, want)
		}
	}
	set := func(name string, on bool) {
		t.Helper()
		if err := Require(t.Context(), st, name, on); err != nil {
			t.Fatal(err)
		}
	}
	set("ca", false)
	check("")
	set("ca-2", true)
	set("ca", false)
	check("ca-2")
	set("ca", true)
	set("ca-2", false)
	check("ca")
	if _, err := st.Txn(t.Context(), nil, []store.Op{Forget("ca")}, nil); err != nil {
		t.Fatal(err)
	}
	check("")
}

func TestJoinRestsOnTheBasis(t *testing.T) {
	st := newStore(t)
	if cmps, ops, err := Join(t.Context(), "whatever"); cmps != nil || ops != nil || err != nil {
		t.Errorf("an act that waited for nobody: %v, %v, %v; want nothing", cmps, ops, err)
	}
	p := propose(t, st, "ann", "x")
	if err := carry(t.Context(), st, p, "bob", "another", "done"); why(err) != WhyVoid {
		t.Errorf("on another basis: %v; want void", err)
	}
	if _, _, err := st.Get(t.Context(), "done"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("it was done: %v", err)
	}
	ctx, pass := Granted(t.Context(), p, "bob", "a1")
	if err := Spend(ctx, st, "basis"); err != nil || !pass.Joined() {
		t.Errorf("Spend: %v, joined %v", err, pass.Joined())
	}
	if err := Spend(ctx, st, "basis"); !errors.Is(err, ErrEnded) {
		t.Errorf("a second time: %v; want ErrEnded", err)
	}
}

// Whatever is tried in whichever order, from however old a reading: an act is done at
// most once, by somebody else than who proposed it, before its end; what is over
// stays as it is; and what is done is done in the transaction that says so.
func TestProposalLaws(t *testing.T) {
	st := newStore(t)
	people := []string{"ann", "bob", "cat"}
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		run++
		key := fmt.Sprintf("done/%d", run)
		now := start.Add(time.Duration(run) * 100 * time.Hour)
		by := rapid.SampledFrom(people).Draw(rt, "by")
		p, err := Propose(t.Context(), st, terms(person(by), key, "basis"), now)
		if err != nil {
			rt.Fatal(err)
		}
		readings, over := []*Proposal{p}, State("")
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			reading := rapid.SampledFrom(readings).Draw(rt, "reading") // perhaps an old one
			who := rapid.SampledFrom(people).Draw(rt, "who")
			basis := rapid.SampledFrom([]string{"basis", "basis", "other"}).Draw(rt, "world")
			switch rapid.SampledFrom([]string{"grant", "grant", "withdraw", "void", "wait"}).Draw(rt, "step") {
			case "wait":
				now = now.Add(time.Duration(rapid.IntRange(0, int(Life/time.Minute)).Draw(rt, "minutes")) * time.Minute)
			case "grant":
				err := reading.Grantable(person(who), now)
				if err == nil {
					err = carry(t.Context(), st, reading, who, basis, key)
				}
				if err != nil {
					break
				}
				if over != "" || who == by || !now.Before(p.Until) || basis != p.Basis {
					rt.Fatalf("%s did what %s proposed, on %q, %s after it was made; before that it was %q", who, by, basis, now.Sub(p.At), over)
				}
				over = Done
			case "withdraw":
				if reading.Waits(now) == nil && End(t.Context(), st, reading, Withdrawn, who, "w", "", now) == nil {
					if over != "" {
						rt.Fatalf("withdrawn, although it was %s", over)
					}
					over = Withdrawn
				}
			case "void":
				if reading.Waits(now) == nil && End(t.Context(), st, reading, Void, who, "v", "r", now) == nil {
					if over != "" {
						rt.Fatalf("void, although it was %s", over)
					}
					over = Void
				}
			}
			latest, err := Read(t.Context(), st, p.ID)
			if err != nil {
				rt.Fatal(err)
			}
			want := over
			if over == "" {
				want = Open
			}
			if latest.State != want {
				rt.Fatalf("it is %s; want %s", latest.State, want)
			}
			if !slices.ContainsFunc(readings, func(r *Proposal) bool { return r.Revision == latest.Revision }) {
				readings = append(readings, latest)
			}
			_, _, err = st.Get(t.Context(), key)
			if done := err == nil; done != (over == Done) {
				rt.Fatalf("done: %v, and the proposal is %s", done, latest.State)
			}
		}
	})
}

func FuzzDecode(f *testing.F) {
	p, err := New(terms(person("ann"), "x", "basis"), start)
	if err != nil {
		f.Fatal(err)
	}
	op, err := p.put()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(op.Key, op.Value)
	f.Add(proposalPrefix, []byte(`{"v":1,"terms":{},"state":"open"}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		p, err := Decode(store.KV{Key: key, Value: value, ModRevision: 1})
		if err != nil {
			return
		}
		if !ValidID(p.ID) || key != proposalPrefix+p.ID || p.By.Principal == "" {
			t.Errorf("Decode(%q, %q) = %+v", key, value, p)
		}
		op, err := p.put()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Decode(store.KV{Key: op.Key, Value: op.Value, ModRevision: 1})
		if err != nil || again.ID != p.ID || again.State != p.State {
			t.Errorf("written again it is %+v, %v; want %+v", again, err, p)
		}
	})
}
