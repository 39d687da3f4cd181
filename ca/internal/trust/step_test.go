// Steps of the authorities over real stores: authorities and trust bundle change
// together, and two never sign in one place.

package trust

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid/forge"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(tidy{m}) }

// tidy removes what was built for the tests.
type tidy struct{ m *testing.M }

func (t tidy) Run() int {
	defer stage.RemoveBins()
	return t.m.Run()
}

func newRoot(t testing.TB, now time.Time) rotation.Authority {
	t.Helper()
	cert := forge.New(t, td.Name()).Bundle().X509Authorities()[0]
	return rotation.Authority{
		ID: hex.EncodeToString(cert.SubjectKeyId), Kind: rotation.Root, Replica: "ca", Certificate: cert.Raw, NotBefore: now, NotAfter: now.Add(time.Hour),
	}
}

// begun is a domain with an active root.
func begun(t testing.TB, st store.Store) (Domain, string) {
	t.Helper()
	d := Domain{Store: st, TrustDomain: td}
	now := time.Now()
	first := newRoot(t, now)
	if _, _, err := d.Take(t.Context(), func(s rotation.Set) (rotation.Set, error) { return s.Enrolled(first, now) }, nil); err != nil {
		t.Fatal(err)
	}
	return d, first.ID
}

// command is one step as others see it, by force: what is tested here is not
// what a step waits for.
func command(c rotation.Command) func(rotation.Set) (rotation.Set, error) {
	c.Force = true
	return func(s rotation.Set) (rotation.Set, error) {
		return rotation.Step(s, c, rotation.View{}, rotation.Policy{}, time.Now())
	}
}

func (d Domain) must(t testing.TB, c rotation.Command) *Step {
	t.Helper()
	for {
		step, _, err := d.Take(t.Context(), command(c), nil)
		if errors.Is(err, ErrContended) {
			continue // by the other one of compete
		}
		if err != nil {
			t.Fatal(err)
		}
		return step
	}
}

func TestEachStepPublishesWhatItTrusts(t *testing.T) {
	st := open(t, t.TempDir())
	defer st.Close()
	d, first := begun(t, st)
	next := newRoot(t, time.Now())
	for _, test := range []struct {
		c        rotation.Command
		sequence uint64
		trusted  []string
		tainted  []string
	}{
		{rotation.Command{Verb: rotation.Prepare, New: &next}, 1, []string{first}, nil},
		{rotation.Command{Verb: rotation.Publish, ID: next.ID}, 2, []string{first, next.ID}, nil},
		{rotation.Command{Verb: rotation.Activate, ID: next.ID}, 2, []string{first, next.ID}, nil},
		{rotation.Command{Verb: rotation.Taint, ID: first}, 3, []string{first, next.ID}, []string{first}},
		{rotation.Command{Verb: rotation.Revoke, ID: first}, 4, []string{next.ID}, nil},
		{rotation.Command{Verb: rotation.Forget, ID: first}, 4, []string{next.ID}, nil},
	} {
		d.must(t, test.c)
		b, err := Current(t.Context(), st)
		if err != nil {
			t.Fatal(err)
		}
		if b.Sequence != test.sequence || !slices.Equal(rootIDs(b), sorted(test.trusted)) || !slices.Equal(b.Tainted, test.tainted) {
			t.Errorf("after %s: sequence %d, roots %v, tainted %v; want %d, %v, %v",
				test.c.Verb, b.Sequence, rootIDs(b), b.Tainted, test.sequence, test.trusted, test.tainted)
		}
	}
	set, err := d.Authorities(t.Context())
	if err != nil || set.Root().ID != next.ID || set.Root().Sequence != 2 {
		t.Errorf("authorities = %+v, %v; want root %s of sequence 2", set, err, next.ID)
	}
}

// A key that has left the list does not come back.
func TestWithdrawnKeyIsNoAuthorityAgain(t *testing.T) {
	st := open(t, t.TempDir())
	defer st.Close()
	d, _ := begun(t, st)
	gone := newRoot(t, time.Now())
	for _, c := range []rotation.Command{
		{Verb: rotation.Prepare, New: &gone},
		{Verb: rotation.Publish, ID: gone.ID},
		{Verb: rotation.Revoke, ID: gone.ID},
	} {
		d.must(t, c)
	}
	if w, err := d.Withdrawn(t.Context(), gone.ID); w != nil || err != nil {
		t.Errorf("Withdrawn = %v, %v while it is on the list", w, err)
	}
	if _, _, err := d.Take(t.Context(), command(rotation.Command{Verb: rotation.Prepare, New: &gone}), nil); err == nil || !strings.Contains(err.Error(), "never signs again") {
		t.Errorf("prepare what is revoked: %v", err)
	}
	d.must(t, rotation.Command{Verb: rotation.Forget, ID: gone.ID})
	w, err := d.Withdrawn(t.Context(), gone.ID)
	if err != nil || w == nil || w.Kind != rotation.Root || time.Since(w.Since) > time.Minute {
		t.Fatalf("Withdrawn = %+v, %v", w, err)
	}
	for name, take := range map[string]func(rotation.Set) (rotation.Set, error){
		"prepare": command(rotation.Command{Verb: rotation.Prepare, New: &gone}),
		"enrol":   func(s rotation.Set) (rotation.Set, error) { return s.Enrolled(gone, time.Now()) },
	} {
		if _, _, err := d.Take(t.Context(), take, nil); !errors.Is(err, ErrWithdrawn) {
			t.Errorf("%s what was withdrawn: %v; want ErrWithdrawn", name, err)
		}
	}
}

func rootIDs(b *Bundle) (ids []string) {
	for _, root := range b.Keys.X509Authorities() {
		ids = append(ids, hex.EncodeToString(root.SubjectKeyId))
	}
	return sorted(ids)
}

func sorted(ids []string) []string { return slices.Sorted(slices.Values(ids)) }

func TestLastRootStays(t *testing.T) {
	st := open(t, t.TempDir())
	defer st.Close()
	d, _ := begun(t, st)
	// As a damaged record would have it.
	_, err := d.Plan(t.Context(), func(rotation.Set) (rotation.Set, error) { return rotation.Set{}, nil })
	if err == nil {
		t.Error("a step left the trust bundle without a root")
	}
}

func TestRefreshHintIsPublished(t *testing.T) {
	st := open(t, t.TempDir())
	defer st.Close()
	d, _ := begun(t, st)
	d.RefreshHint = 7 * time.Second
	same := func(s rotation.Set) (rotation.Set, error) { return s, nil }
	for range 2 { // the second changes nothing
		step, _, err := d.Take(t.Context(), same, nil)
		if err != nil {
			t.Fatal(err)
		}
		if hint, ok := step.Bundle.Keys.RefreshHint(); !ok || hint != 7*time.Second || step.Bundle.Sequence != 2 {
			t.Errorf("refresh hint %s, sequence %d; want 7s and 2", hint, step.Bundle.Sequence)
		}
	}
}

// Somebody who was stopped between looking and writing does not write.
func TestPausedStepIsFenced(t *testing.T) {
	st := open(t, t.TempDir())
	defer st.Close()
	fenced(t, st)
}

func fenced(t *testing.T, st store.Store) {
	d, _ := begun(t, st)
	now := time.Now()
	a, b := newRoot(t, now), newRoot(t, now)
	for _, root := range []*rotation.Authority{&a, &b} {
		d.must(t, rotation.Command{Verb: rotation.Prepare, New: root})
		d.must(t, rotation.Command{Verb: rotation.Publish, ID: root.ID})
	}
	paused, err := d.Plan(t.Context(), command(rotation.Command{Verb: rotation.Activate, ID: a.ID}))
	if err != nil {
		t.Fatal(err)
	}
	d.must(t, rotation.Command{Verb: rotation.Activate, ID: b.ID})
	if res, err := st.Txn(t.Context(), paused.Cmps, paused.Ops, nil); err != nil || res.Succeeded {
		t.Errorf("the paused step: %+v, %v; want it not to be taken", res, err)
	}
	if set, err := d.Authorities(t.Context()); err != nil || set.Root().ID != b.ID {
		t.Errorf("root %v, %v; want the one that was activated meanwhile", set.Root(), err)
	}
}

func TestTwoReplicasNeverActivateTwoRoots(t *testing.T) {
	t.Run("badger", func(t *testing.T) {
		st := open(t, t.TempDir())
		defer st.Close()
		compete(t, st, st)
	})
	t.Run("etcd", func(t *testing.T) {
		e := stage.StartEtcd(t, 1)
		var stores []store.Store
		// Each with a connection of its own, as replicas have; what the last one
		// publishes is none of the others', whose roots to come are bounded.
		for _, prefix := range []string{"/rotation/", "/rotation/", "/fenced/"} {
			st, err := etcd.Open(t.Context(), etcd.Config{
				Endpoints: e.Endpoints(), CAFile: e.Files.CA, CertFile: e.Files.Cert, KeyFile: e.Files.Key, Prefix: prefix,
			})
			if err != nil {
				t.Fatal(err)
			}
			defer st.Close()
			stores = append(stores, st)
		}
		fenced(t, stores[2])
		compete(t, stores[0], stores[1])
	})
}

// compete lets two that both hold keys activate their own roots as fast as they
// can, and looks at every revision that comes of it.
func compete(t *testing.T, one, two store.Store) {
	d, _ := begun(t, one)
	const rounds = 40
	begin, err := one.Revision(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	history, err := one.Watch(ctx, "trust/", begin)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, st := range []store.Store{one, two} {
		own := []rotation.Authority{newRoot(t, time.Now()), newRoot(t, time.Now())}
		wg.Go(func() {
			d := Domain{Store: st, TrustDomain: td}
			for i := range own {
				d.must(t, rotation.Command{Verb: rotation.Prepare, New: &own[i]})
				d.must(t, rotation.Command{Verb: rotation.Publish, ID: own[i].ID})
			}
			for i := range rounds {
				_, _, err := d.Take(ctx, command(rotation.Command{Verb: rotation.Activate, ID: own[i%2].ID}), nil)
				if _, refused := errors.AsType[*rotation.RefusedError](err); err != nil && !refused && !errors.Is(err, ErrContended) {
					t.Errorf("activate: %v", err)
				}
			}
		})
	}
	wg.Wait()
	last, err := d.Authorities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	end, err := one.Revision(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	activations := 0
	var set rotation.Set
	var bundle *Bundle
	for b := range history {
		for _, ev := range b.Events {
			switch ev.KV.Key {
			case Key:
				if bundle, err = Decode(ev.KV); err != nil {
					t.Fatal(err)
				}
			case AuthoritiesKey:
				// Decode refuses a set in which two roots are active.
				next, err := rotation.Decode(ev.KV.Value)
				if err != nil {
					t.Fatalf("revision %d: %v", b.Revision, err)
				}
				if root := next.Root(); set.Root() != nil && root.ID != set.Root().ID {
					activations++
				}
				set = next
			}
		}
		if root := set.Root(); root != nil && bundle != nil && !slices.Contains(rootIDs(bundle), root.ID) {
			t.Fatalf("revision %d: %s signs, and the trust bundle holds %v", b.Revision, root.ID, rootIDs(bundle))
		}
		if b.Revision >= end {
			break
		}
	}
	if activations < rounds || !set.Equal(last) {
		t.Errorf("%d activations were seen; want %d or more, and the last of them to be what is stored", activations, rounds)
	}
}

func TestAuthoritiesWithoutAReplica(t *testing.T) {
	st := open(t, t.TempDir())
	defer st.Close()
	d, _ := begun(t, st)
	now := time.Now()
	pub, err := x509.MarshalPKIXPublicKey(forge.New(t, td.Name()).Bundle().X509Authorities()[0].PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	key := rotation.Authority{ID: "k2", Kind: rotation.JWT, Replica: "ca-2", PublicKey: pub, NotBefore: now, NotAfter: now.Add(time.Hour)}
	if _, _, err := d.Take(t.Context(), func(s rotation.Set) (rotation.Set, error) { return s.Enrolled(key, now) }, nil); err != nil {
		t.Fatal(err)
	}
	kv, _, err := st.Get(t.Context(), AuthoritiesKey)
	if err != nil {
		t.Fatal(err)
	}
	without, err := AuthoritiesWithout(kv, now, "ca-2")
	if err != nil {
		t.Fatal(err)
	}
	set, err := rotation.Decode(without.Value)
	if err != nil || set.JWT("ca-2") != nil || set.Root() == nil {
		t.Errorf("authorities = %+v, %v; want the root, and no key of ca-2", set, err)
	}
}
