package etcd_test

// A store in etcd that was put back to an earlier state, and goes on.

import (
	"errors"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/integration/stage"
)

func TestNextEpochKeepsWhatIsThereAndCountsOnAbove(t *testing.T) {
	cfg := config(stage.StartEtcd(t, 1))
	if there, err := etcd.Exists(t.Context(), cfg); err != nil || there {
		t.Fatalf("Exists before = %t, %v", there, err)
	}
	s := open(t, cfg)
	a, b := put(t, s, "a", "1"), put(t, s, "b", "2")
	if there, err := etcd.Exists(t.Context(), cfg); err != nil || !there {
		t.Fatalf("Exists after = %t, %v", there, err)
	}
	for name, revision := range map[string]uint64{"lower": b - 1, "higher": b + 1} {
		if err := etcd.NextEpoch(t.Context(), cfg, revision, 0); err == nil || !strings.Contains(err.Error(), "it is at revision") {
			t.Errorf("a %s revision: %v", name, err)
		}
	}
	lead, err := s.Campaign(t.Context(), "chores", 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	led, err := s.Revision(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := etcd.NextEpoch(t.Context(), cfg, led, 0); err == nil || !strings.Contains(err.Error(), "a CA replica uses it") {
		t.Errorf("while somebody leads: %v", err)
	}
	if err := lead.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	last, err := s.Revision(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	first := store.NextEpoch(last)
	var epochs []uint64
	for range 2 { // and once more in the next epoch
		for range 2 { // a flag that is left in place does not count twice
			if err := etcd.NextEpoch(t.Context(), cfg, last, 0); err != nil {
				t.Fatal(err)
			}
		}
		s = open(t, cfg)
		now, err := s.Revision(t.Context())
		if err != nil || now <= first || store.Epoch(now) != store.Epoch(first) {
			t.Fatalf("revision %d, %v; want one above %d", now, err, first)
		}
		for key, want := range map[string]uint64{"a": a, "b": b} {
			if kv, _, err := s.Get(t.Context(), key); err != nil || kv.ModRevision != want {
				t.Errorf("%s: %+v, %v; want revision %d as before", key, kv, err, want)
			}
		}
		// What is compared is compared as before, and what is lost cannot be
		// watched from.
		if res, err := s.Txn(t.Context(), []store.Cmp{{Key: "a", ModRevision: a}}, []store.Op{store.Put("a", []byte("again"))}, nil); err != nil || !res.Succeeded || res.Revision <= now {
			t.Errorf("compare: %+v, %v", res, err)
		} else {
			a = res.Revision
		}
		if _, err := s.Watch(t.Context(), "", last+1); !errors.Is(err, store.ErrCompacted) {
			t.Errorf("a watch from a revision that is lost: %v; want ErrCompacted", err)
		}
		batches, err := s.Watch(t.Context(), "", b)
		if err != nil {
			t.Fatal(err)
		}
		for batch := range batches {
			if batch.Events[0].KV.Key == "a" && batch.Revision == a {
				break
			}
		}
		if _, _, _, err := s.List(t.Context(), "", "", 10, a); err != nil {
			t.Errorf("a listing at revision %d: %v", a, err)
		}
		if last, err = s.Revision(t.Context()); err != nil {
			t.Fatal(err)
		}
		epochs = append(epochs, store.Epoch(last))
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		first = store.NextEpoch(last)
	}
	if epochs[0] != 1 || epochs[1] != 2 {
		t.Errorf("epochs %v; want 1 and 2", epochs)
	}
}

// Whoever removes the store to restore a backup, on whatever machine, does not
// remove what is known of its epochs.
func TestEpochsAreRememberedBesideThePrefix(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	client := e.Client()
	remove := func() {
		t.Helper()
		if _, err := client.Delete(t.Context(), cfg.Prefix, clientv3.WithPrefix()); err != nil {
			t.Fatal(err)
		}
	}
	seen := func(want uint64) {
		t.Helper()
		if last, err := etcd.LastEpoch(t.Context(), cfg); err != nil || store.Epoch(last) != want {
			t.Fatalf("the last epoch is %d, %v; want %d", store.Epoch(last), err, want)
		}
	}
	seen(0)
	second := store.NextEpoch(store.NextEpoch(0))
	if err := etcd.Import(t.Context(), cfg, second, each(past(1))); err != nil {
		t.Fatal(err)
	}
	seen(2)
	remove()
	seen(2)
	if err := etcd.Import(t.Context(), cfg, pastRevision, each(past(1))); !isOlder(err) {
		t.Errorf("an import that goes on in epoch 0: %v; want an OlderError", err)
	}
	// A new store begins above them.
	s := open(t, cfg)
	revision, err := s.Revision(t.Context())
	if err := errors.Join(err, s.Close()); err != nil || store.Epoch(revision) != 3 {
		t.Fatalf("a new store is at revision %d, %v; want one of epoch 3", revision, err)
	}
	seen(3)
	// One that is accepted goes above all that anybody knows of.
	if err := etcd.NextEpoch(t.Context(), cfg, revision, 9<<32); err != nil {
		t.Fatal(err)
	}
	seen(10)
	// And a store of an earlier epoch is not opened.
	remove()
	key := strings.TrimSuffix(cfg.Prefix, "/") + ".epoch"
	kept, err := client.Get(t.Context(), key)
	if err != nil || len(kept.Kvs) != 1 {
		t.Fatalf("%s: %v, %v", key, kept, err)
	}
	if _, err := client.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if err := open(t, cfg).Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Put(t.Context(), key, string(kept.Kvs[0].Value)); err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Open(t.Context(), cfg); !isOlder(err) {
		t.Errorf("a store of epoch 0 opens where epoch 10 has been: %v; want an OlderError", err)
	}
}

// Whoever looks for a store that must be there leaves nothing behind.
func TestOpenBeginsNoStoreWhereOneMustBe(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	cfg.Existing = true
	if _, err := etcd.Open(t.Context(), cfg); !errors.Is(err, store.ErrNone) {
		t.Errorf("Open = %v; want ErrNone", err)
	}
	if there, err := etcd.Exists(t.Context(), cfg); err != nil || there {
		t.Errorf("Exists = %t, %v", there, err)
	}
	found, err := e.Client().Get(t.Context(), cfg.Prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil || found.Count != 0 || found.Header.Revision != 1 {
		t.Errorf("%d keys under the prefix, etcd at revision %d, %v; want none", found.Count, found.Header.Revision, err)
	}
}

func isOlder(err error) bool {
	_, older := errors.AsType[*store.OlderError](err)
	return older
}

// Whatever happens to the store after it was looked at, another epoch is not
// begun: numbers that were given out meanwhile would be given out again.
func TestEpochIsOfTheStoreThatWasLookedAt(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	for name, between := range map[string]func(cfg etcd.Config, s store.Store){
		"a write":   func(_ etcd.Config, s store.Store) { put(t, s, "b", "2") },
		"a removal": func(cfg etcd.Config, _ store.Store) { e.Remove(cfg.Prefix) },
		"a leader":  func(_ etcd.Config, s store.Store) { lead(t, s) },
		"nothing":   func(etcd.Config, store.Store) {},
	} {
		cfg := config(e)
		s := open(t, cfg)
		put(t, s, "a", "1")
		looked, err := etcd.Look(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		between(cfg, s)
		if err := etcd.WriteEpoch(t.Context(), s, looked); (err == nil) != (name == "nothing") {
			t.Errorf("after %s: %v; want an error but after nothing", name, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}
