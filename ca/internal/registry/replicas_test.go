// Replicas come and go, and every stream hears of their policy keys.

package registry

import (
	"slices"
	"testing"
	"time"

	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
)

func TestReplicasAndTheirKeysAreFollowed(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	write(t, st, r, store.Put(release.HeadPrefix+"main", []byte(`{"v":1,"generation":1}`)))
	feed := subscribe(t, r, nodeA, 0)
	feed.Take(time.Now())

	rec := &replica.Record{Name: "b", Authorities: []replica.Authority{{ID: "0a", NotAfter: time.Now().Add(time.Hour)}}}
	put, err := rec.Put()
	if err != nil {
		t.Fatal(err)
	}
	joined := write(t, st, r, put, replica.Mark())
	if u := feed.Take(time.Now()); len(u.Heads) != 1 {
		t.Errorf("a replica joined: %d policy bundles in the update; want 1, for its keys", len(u.Heads))
	}
	if got, ok := r.ReplicaOf("0a"); !ok || got.Name != "b" || got.Revision != joined {
		t.Errorf("ReplicaOf = %+v, %t; want b", got, ok)
	}
	if _, ok := r.ReplicaOf("0b"); ok {
		t.Error("ReplicaOf knows an authority that nobody has")
	}
	write(t, st, r, put) // a new intermediate, say: no other keys
	if u := feed.Take(time.Now()); len(u.Heads) != 0 {
		t.Errorf("nothing came or went: %d policy bundles in the update", len(u.Heads))
	}
	write(t, st, r, store.Delete(replica.Prefix+"b"), replica.Mark())
	if u := feed.Take(time.Now()); len(u.Heads) != 1 || len(r.Replicas()) != 0 {
		t.Errorf("it went: %d policy bundles in the update, %d replicas; want 1 and none", len(u.Heads), len(r.Replicas()))
	}
	// One that was away meanwhile, also over a restart of the CA.
	again := subscribe(t, start(t, st), nodeA, joined)
	if u := again.Take(time.Now()); len(u.Heads) != 1 {
		t.Errorf("resumed from before it went: %d policy bundles in the update; want 1", len(u.Heads))
	}
}

// A replica is silent until it gives a sign of life, and when that is gone.
func TestSilentReplicasAreKnown(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	silent := func(r *Registry, self string) []string {
		_, view := r.Rotation(time.Now(), Viewer{Replica: self})
		return view.Silent
	}
	for _, name := range []string{"c", "b"} {
		put, err := (&replica.Record{Name: name, Authorities: []replica.Authority{{ID: "0" + name}}}).Put()
		if err != nil {
			t.Fatal(err)
		}
		write(t, st, r, put)
	}
	if got := silent(r, "b"); !slices.Equal(got, []string{"c"}) || !slices.Equal(silent(r, "a"), []string{"b", "c"}) {
		t.Errorf("silent to b: %v; want c, and to a both", got)
	}
	steps := r.StepsTaken()
	write(t, st, r, store.Put(store.LeaderPrefix+AliveName("c"), nil))
	select {
	case <-steps: // shortly after the revision that write waits for
	case <-time.After(30 * time.Second):
		t.Error("nobody who waits for c is told")
	}
	if got := silent(start(t, st), "b"); len(silent(r, "b")) != 0 || len(got) != 0 { // also one that lists
		t.Errorf("silent to b: %v; want none, c is heard of", got)
	}
	write(t, st, r, store.Delete(store.LeaderPrefix+AliveName("c")))
	if got := silent(r, "b"); !slices.Equal(got, []string{"c"}) {
		t.Errorf("silent to b: %v; want c, whose sign of life is gone", got)
	}
	write(t, st, r, store.Delete(replica.Prefix+"c")) // it is evicted
	if got := silent(r, "b"); len(got) != 0 {
		t.Errorf("silent to b: %v; want none", got)
	}
}
