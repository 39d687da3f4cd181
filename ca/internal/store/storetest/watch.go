package storetest

// Watches.

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"merlon.dev/ca/internal/store"
)

func put(key, value string, revision uint64, prev []byte) store.Event {
	return store.Event{KV: kv(key, value, revision), Prev: prev}
}

func del(key string, revision uint64, prev []byte) store.Event {
	return store.Event{KV: store.KV{Key: key, ModRevision: revision}, Delete: true, Prev: prev}
}

// script writes revisions 2 to 8 and returns what a watch of everything sees.
func script(t testing.TB, s store.Store) []store.Batch {
	t.Helper()
	write(t, s, store.Put("a", []byte("1")))
	write(t, s, store.Put("a", []byte("2")), store.Put("b", nil), store.Delete("absent"))
	write(t, s, store.Delete("absent")) // no revision
	write(t, s, store.Put("b", []byte("3")))
	write(t, s, store.Delete("a"), store.Delete("b"))
	write(t, s, store.Put("a", []byte("4")))
	write(t, s, store.Put("p/a", []byte("5")))
	write(t, s, store.Put("p/a", []byte("6")), store.Put("a", []byte("7")))
	return []store.Batch{
		{Revision: 2, Events: []store.Event{put("a", "1", 2, nil)}},
		{Revision: 3, Events: []store.Event{put("a", "2", 3, []byte("1")), put("b", "", 3, nil)}},
		{Revision: 4, Events: []store.Event{put("b", "3", 4, []byte{})}},
		{Revision: 5, Events: []store.Event{del("a", 5, []byte("2")), del("b", 5, []byte("3"))}},
		{Revision: 6, Events: []store.Event{put("a", "4", 6, nil)}},
		{Revision: 7, Events: []store.Event{put("p/a", "5", 7, nil)}},
		{Revision: 8, Events: []store.Event{put("p/a", "6", 8, []byte("5")), put("a", "7", 8, []byte("4"))}},
	}
}

func testWatchOrder(t *testing.T, b Backend) {
	s := open(t, b)
	ch := watch(t, s, "", 1)
	want := script(t, s)
	wantDiff(t, "watch opened before the writes", next(t, ch, len(want)), want)
	wantDiff(t, "watch from 0", next(t, watch(t, s, "", 0), len(want)), want)
}

func testWatchPrefix(t *testing.T, b Backend) {
	s := open(t, b)
	ch := watch(t, s, "p/", 1)
	all := script(t, s)
	want := []store.Batch{all[5], {Revision: 8, Events: all[6].Events[:1]}}
	wantDiff(t, "watch of p/", next(t, ch, len(want)), want)
	last := write(t, s, store.Put("p", nil), store.Put("p/", nil), store.Put("p0", nil))
	wantDiff(t, "watch of p/", next(t, ch, 1), []store.Batch{{Revision: last, Events: []store.Event{put("p/", "", last, nil)}}})
}

func testWatchResume(t *testing.T, b Backend) {
	s := open(t, b)
	want := script(t, s)
	check := func(when string) {
		for after := uint64(1); after <= 8; after++ {
			rest := want[after-1:]
			if got := next(t, watch(t, s, "", after), len(rest)); !cmp.Equal(got, slices.Clone(rest)) {
				t.Errorf("%s, watch from %d differs: %s", when, after, cmp.Diff(rest, got))
			}
		}
	}
	check("right away")
	s = reopen(t, b, s)
	check("reopened")
	live := watch(t, s, "", 6)
	revision := write(t, s, store.Delete("a"))
	want = append(want, store.Batch{Revision: revision, Events: []store.Event{del("a", revision, []byte("7"))}})
	wantDiff(t, "watch from the log into the present", next(t, live, 3), want[5:])
}

func testWatchCompacted(t *testing.T, b Backend) {
	s := open(t, b)
	write(t, s, store.Put("a", nil))
	before := revisionOf(t, s)
	_, err := s.Watch(within(t), "", before+1)
	wantError(t, "Watch from a future revision", err, store.ErrCompacted)
	b.Compact(t, s)
	for _, after := range []uint64{0, 1, before} {
		_, err := s.Watch(within(t), "", after)
		wantError(t, fmt.Sprintf("Watch from compacted revision %d", after), err, store.ErrCompacted)
	}
	s = reopen(t, b, s)
	_, err = s.Watch(within(t), "", before)
	wantError(t, "Watch from a compacted revision, reopened", err, store.ErrCompacted)
	_, revision := listAll(t, s, "")
	ch := watch(t, s, "", revision)
	last := write(t, s, store.Put("a", []byte("x")))
	wantDiff(t, "watch from the new listing", next(t, ch, 1), []store.Batch{{Revision: last, Events: []store.Event{put("a", "x", last, []byte{})}}})
}

// testReplay lets writers race for few keys. Whoever follows the watch, each
// event's Prev included, must arrive at the listing.
func testReplay(t *testing.T, b Backend) {
	s := open(t, b)
	live := watch(t, s, "", 1)
	const writers, each, keys = 16, 12, 5
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				ops := []store.Op{
					store.Put(numbered("k", (w+i)%keys), []byte(fmt.Sprintf("%d-%d", w, i))),
					store.Delete(numbered("k", (w+2*i+1)%keys)),
				}
				if ops[0].Key == ops[1].Key {
					ops = ops[:1]
				}
				if _, err := s.Txn(within(t), nil, ops, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	want, revision := listAll(t, s, "")
	wantDiff(t, "live watch replayed", replay(t, live, revision), want)
	wantDiff(t, "watch replayed", replay(t, watch(t, s, "", 1), revision), want)
	s = reopen(t, b, s)
	wantDiff(t, "watch replayed from disk", replay(t, watch(t, s, "", 1), revision), want)
}

// replay applies a watch from the beginning up to a revision.
func replay(t testing.TB, ch <-chan store.Batch, upTo uint64) []store.KV {
	t.Helper()
	state := make(map[string]store.KV)
	for revision := uint64(1); revision < upTo; {
		batch := next(t, ch, 1)[0]
		if batch.Revision != revision+1 {
			t.Fatalf("watch sent revision %d after %d", batch.Revision, revision)
		}
		revision = batch.Revision
		for _, e := range batch.Events {
			wantDiff(t, fmt.Sprintf("Prev of %s at revision %d", e.KV.Key, revision), e.Prev, state[e.KV.Key].Value)
			if e.Delete {
				delete(state, e.KV.Key)
			} else {
				state[e.KV.Key] = e.KV
			}
		}
	}
	var kvs []store.KV
	for _, kv := range state {
		kvs = append(kvs, kv)
	}
	slices.SortFunc(kvs, func(a, b store.KV) int { return slices.Compare([]byte(a.Key), []byte(b.Key)) })
	return kvs
}

// wantEnd waits for the end of a watch and tells how many batches came before.
func wantEnd(t testing.TB, ch <-chan store.Batch) (n int) {
	t.Helper()
	deadline := time.After(patience)
	for ; ; n++ {
		select {
		case _, open := <-ch:
			if !open {
				return n
			}
		case <-deadline:
			t.Fatal("watch did not end")
		}
	}
}

func testWatchContext(t *testing.T, b Backend) {
	s := open(t, b)
	ctx, cancel := context.WithCancel(t.Context())
	idle, err := s.Watch(ctx, "", 1)
	if err != nil {
		t.Fatal(err)
	}
	blocked, err := s.Watch(ctx, "", 1)
	if err != nil {
		t.Fatal(err)
	}
	const writes = 200
	for range writes {
		write(t, s, store.Put("a", nil))
	}
	next(t, idle, writes)
	cancel()
	wantEnd(t, idle)
	if n := wantEnd(t, blocked); n == writes {
		t.Error("watch that nobody read went on after its context had ended")
	}
}

func testWatchClose(t *testing.T, b Backend) {
	s := open(t, b)
	idle, blocked := watch(t, s, "", 1), watch(t, s, "", 1)
	for range 50 {
		write(t, s, store.Put("a", nil))
	}
	next(t, idle, 50)
	closeStore(t, s)
	wantEnd(t, idle)
	wantEnd(t, blocked)
}

// testSlowWatcher has a watcher that reads nothing while others write and
// follow, until its place has been compacted.
func testSlowWatcher(t *testing.T, b Backend) {
	s := open(t, b)
	slow, quick := watch(t, s, "k", 1), watch(t, s, "k", 1)
	const writers, each = 8, 100
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if _, err := s.Txn(within(t), nil, []store.Op{store.Put(numbered("k", w*each+i), nil)}, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i, b := range next(t, quick, writers*each) {
		if b.Revision != uint64(i)+2 {
			t.Fatalf("batch %d of the quick watch has revision %d", i, b.Revision)
		}
	}
	wg.Wait()
	b.Compact(t, s)
	last := uint64(1)
	deadline := time.After(patience)
	for last < writers*each+1 {
		select {
		case batch, open := <-slow:
			if !open {
				return // told to list again
			}
			if batch.Revision != last+1 {
				t.Fatalf("slow watch sent revision %d after %d: a gap", batch.Revision, last)
			}
			last = batch.Revision
		case <-deadline:
			t.Fatalf("slow watch neither went on after revision %d nor ended", last)
		}
	}
}
