package etcd_test

// A store in etcd that was put back to an earlier state, and goes on.

import (
	"errors"
	"strings"
	"testing"
	"time"

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
		if err := etcd.NextEpoch(t.Context(), cfg, revision); err == nil || !strings.Contains(err.Error(), "it is at revision") {
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
	if err := etcd.NextEpoch(t.Context(), cfg, led); err == nil || !strings.Contains(err.Error(), "a CA replica uses it") {
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
			if err := etcd.NextEpoch(t.Context(), cfg, last); err != nil {
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
