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

// script writes seven revisions and returns what a watch of everything sees.
func script(t testing.TB, s store.Store) []store.Batch {
	t.Helper()
	var batches []store.Batch
	step := func(events func(at uint64) []store.Event, ops ...store.Op) {
		at := write(t, s, ops...)
		batches = append(batches, store.Batch{Revision: at, Events: events(at)})
	}
	step(func(at uint64) []store.Event { return []store.Event{put("a", "1", at, nil)} },
		store.Put("a", []byte("1")))
	step(func(at uint64) []store.Event {
		return []store.Event{put("a", "2", at, []byte("1")), put("b", "", at, nil)}
	}, store.Put("a", []byte("2")), store.Put("b", nil), store.Delete("absent"))
	write(t, s, store.Delete("absent")) // no revision
	step(func(at uint64) []store.Event { return []store.Event{put("b", "3", at, []byte{})} },
		store.Put("b", []byte("3")))
	step(func(at uint64) []store.Event {
		return []store.Event{del("a", at, []byte("2")), del("b", at, []byte("3"))}
	}, store.Delete("a"), store.Delete("b"))
	step(func(at uint64) []store.Event { return []store.Event{put("a", "4", at, nil)} },
		store.Put("a", []byte("4")))
	step(func(at uint64) []store.Event { return []store.Event{put("p/a", "5", at, nil)} },
		store.Put("p/a", []byte("5")))
	step(func(at uint64) []store.Event {
		return []store.Event{put("p/a", "6", at, []byte("5")), put("a", "7", at, []byte("4"))}
	}, store.Put("p/a", []byte("6")), store.Put("a", []byte("7")))
	return batches
}

func testWatchOrder(t *testing.T, b Backend) {
	s := open(t, b)
	ch := watch(t, s, "", revisionOf(t, s))
	want := script(t, s)
	wantDiff(t, "watch opened before the writes", next(t, ch, len(want)), want)
	wantDiff(t, "watch from 0", next(t, watch(t, s, "", 0), len(want)), want)
}

func testWatchPrefix(t *testing.T, b Backend) {
	s := open(t, b)
	ch := watch(t, s, "p/", revisionOf(t, s))
	all := script(t, s)
	want := []store.Batch{all[5], {Revision: all[6].Revision, Events: all[6].Events[:1]}}
	wantDiff(t, "watch of p/", next(t, ch, len(want)), want)
	last := write(t, s, store.Put("p", nil), store.Put("p/", nil), store.Put("p0", nil))
	wantDiff(t, "watch of p/", next(t, ch, 1), []store.Batch{{Revision: last, Events: []store.Event{put("p/", "", last, nil)}}})
}

func testWatchResume(t *testing.T, b Backend) {
	s := open(t, b)
	begin := revisionOf(t, s)
	want := script(t, s)
	check := func(when string) {
		after := begin
		for i := 0; i <= len(want); i++ {
			rest := want[i:]
			if got := next(t, watch(t, s, "", after), len(rest)); !cmp.Equal(got, slices.Clone(rest)) {
				t.Errorf("%s, watch from %d differs: %s", when, after, cmp.Diff(rest, got))
			}
			if i < len(want) {
				after = want[i].Revision
			}
		}
	}
	check("right away")
	s = reopen(t, b, s)
	check("reopened")
	live := watch(t, s, "", want[4].Revision)
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
	begin := revisionOf(t, s)
	live := watch(t, s, "", begin)
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
	wantDiff(t, "live watch replayed", replay(t, live, begin, revision), want)
	wantDiff(t, "watch replayed", replay(t, watch(t, s, "", begin), begin, revision), want)
	s = reopen(t, b, s)
	wantDiff(t, "watch replayed from disk", replay(t, watch(t, s, "", begin), begin, revision), want)
}

// replay applies a watch from the beginning up to a revision.
func replay(t testing.TB, ch <-chan store.Batch, revision, upTo uint64) []store.KV {
	t.Helper()
	state := make(map[string]store.KV)
	for revision < upTo {
		batch := next(t, ch, 1)[0]
		if batch.Revision <= revision {
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
	begin := revisionOf(t, s)
	idle, err := s.Watch(ctx, "", begin)
	if err != nil {
		t.Fatal(err)
	}
	blocked, err := s.Watch(ctx, "", begin)
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
	begin := revisionOf(t, s)
	idle, blocked := watch(t, s, "", begin), watch(t, s, "", begin)
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
	begin := revisionOf(t, s)
	slow, quick := watch(t, s, "k", begin), watch(t, s, "k", begin)
	const writers, each = 8, 100
	var mu sync.Mutex
	var written []uint64 // guarded by mu
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				res, err := s.Txn(within(t), nil, []store.Op{store.Put(numbered("k", w*each+i), nil)}, nil)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				written = append(written, res.Revision)
				mu.Unlock()
			}
		})
	}
	seen := next(t, quick, writers*each)
	wg.Wait()
	slices.Sort(written)
	for i, batch := range seen {
		if batch.Revision != written[i] {
			t.Fatalf("batch %d of the quick watch has revision %d; want %d", i, batch.Revision, written[i])
		}
	}
	b.Compact(t, s)
	deadline := time.After(patience)
	for _, want := range written {
		select {
		case batch, open := <-slow:
			if !open {
				return // told to list again
			}
			if batch.Revision != want {
				t.Fatalf("slow watch sent revision %d; want %d", batch.Revision, want)
			}
		case <-deadline:
			t.Fatalf("slow watch neither sent revision %d nor ended", want)
		}
	}
}
