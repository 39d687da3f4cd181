package storetest

// Opening, closing, leading, and the store as a whole against a model.

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"merlon.dev/ca/internal/store"
)

func testReopen(t *testing.T, b Backend) {
	s := open(t, b)
	for round := range 3 {
		var wg sync.WaitGroup
		for w := range 20 {
			wg.Go(func() {
				for i := range 5 {
					ops := []store.Op{store.Put(fmt.Sprintf("%d/%02d/%d", round, w, i), []byte("v"))}
					if i > 0 {
						ops = append(ops, store.Delete(fmt.Sprintf("%d/%02d/%d", round, w, i-1)))
					}
					if _, err := s.Txn(within(t), nil, ops, nil); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		want, revision := listAll(t, s, "")
		if len(want) != 20*(round+1) {
			t.Fatalf("%d keys before reopening; want %d", len(want), 20*(round+1))
		}
		s = reopen(t, b, s)
		got, again := listAll(t, s, "")
		wantDiff(t, "listing", got, want)
		if again != revision {
			t.Fatalf("revision %d after reopening; want %d", again, revision)
		}
	}
}

func testClosed(t *testing.T, b Backend) {
	s := open(t, b)
	write(t, s, store.Put("a", nil))
	var wg sync.WaitGroup
	for range 20 { // Close meets commits on the way: they are done or refused
		wg.Go(func() {
			for {
				if _, err := s.Txn(within(t), nil, []store.Op{store.Put("a", nil)}, nil); err != nil {
					wantClosed(t, "Txn", err)
					return
				}
				if _, _, err := s.Get(within(t), "a"); err != nil {
					wantClosed(t, "Get", err)
					return
				}
			}
		})
	}
	closeStore(t, s)
	wg.Wait()
	_, _, err := s.Get(within(t), "a")
	wantClosed(t, "Get", err)
	_, _, _, err = s.List(within(t), "", "", 1, 0)
	wantClosed(t, "List", err)
	_, err = s.Txn(within(t), nil, nil, nil)
	wantClosed(t, "Txn", err)
	_, err = s.Watch(within(t), "", 1)
	wantClosed(t, "Watch", err)
	_, err = s.Revision(within(t))
	wantClosed(t, "Revision", err)
	_, err = s.Campaign(within(t), "a", time.Minute)
	wantClosed(t, "Campaign", err)
}

// wantClosed is wantError for any goroutine.
func wantClosed(t testing.TB, what string, err error) {
	t.Helper()
	if err == nil || err.Error() != store.ErrClosed.Error() {
		t.Errorf("%s of a closed store = %v; want %v", what, err, store.ErrClosed)
	}
}

func testCampaign(t *testing.T, b Backend) {
	s := open(t, b)
	var leading, terms atomic.Int32
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			l, err := s.Campaign(within(t), "rotation", time.Minute)
			if err != nil {
				t.Error(err)
				return
			}
			if n := leading.Add(1); n != 1 {
				t.Errorf("%d leaders at once", n)
			}
			terms.Add(1)
			leading.Add(-1)
			for range 2 { // the second does nothing
				if err := l.Resign(within(t)); err != nil {
					t.Error(err)
				}
			}
			<-l.Lost()
		})
	}
	wg.Wait()
	if got := terms.Load(); got != 10 {
		t.Fatalf("%d of 10 came to lead", got)
	}
	if _, err := s.Campaign(within(t), "rotation", time.Minute); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Campaign(within(t), "another name", time.Minute); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := s.Campaign(ctx, "rotation", time.Minute)
	wantError(t, "Campaign for what is led", err, context.DeadlineExceeded)
}

// testFence lets one leader follow another: what the first one still wants to
// write, as a process does that slept through its end, is not written.
func testFence(t *testing.T, b Backend) {
	s := open(t, b)
	lead := func(name string) store.Leadership {
		t.Helper()
		l, err := s.Campaign(within(t), name, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	writes := func(l store.Leadership, value string) bool {
		t.Helper()
		res, err := s.Txn(within(t), []store.Cmp{l.Fence()}, []store.Op{store.Put("fenced", []byte(value))}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return res.Succeeded
	}
	first, other := lead("rotation"), lead("another name")
	if f := first.Fence(); f.ModRevision == 0 {
		t.Fatalf("Fence() = %+v, which holds for a key that does not exist", f)
	}
	for range 2 {
		if !writes(first, "first") {
			t.Fatal("the leader's fence does not hold")
		}
	}
	if err := first.Resign(within(t)); err != nil {
		t.Fatal(err)
	}
	second := lead("rotation")
	if writes(first, "first, late") {
		t.Error("the fence of a former leader holds while another leads")
	}
	if !writes(second, "second") || !writes(other, "other") {
		t.Error("the fence of a leader does not hold")
	}
	if err := second.Resign(within(t)); err != nil {
		t.Fatal(err)
	}
	if writes(first, "first, later still") {
		t.Error("the fence of a former leader holds after another has led")
	}
}

func testCampaignClose(t *testing.T, b Backend) {
	s := open(t, b)
	l, err := s.Campaign(within(t), "rotation", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error)
	go func() {
		_, err := s.Campaign(within(t), "rotation", time.Minute)
		waiting <- err
	}()
	closeStore(t, s)
	select {
	case <-l.Lost():
	case <-time.After(patience):
		t.Fatal("leadership outlived the store")
	}
	wantError(t, "waiting Campaign", <-waiting, store.ErrClosed)
}

// model is what the store should be: a map and a number.
type model struct {
	kvs      map[string]store.KV
	revision uint64
}

// txn runs a transaction that took the revision took, if it changed anything.
func (m *model) txn(cmps []store.Cmp, then, otherwise []store.Op, took uint64) store.TxnResult {
	holds := true
	for _, c := range cmps {
		holds = holds && m.kvs[c.Key].ModRevision == c.ModRevision
	}
	ops := then
	if !holds {
		ops = otherwise
	}
	changed := false
	for _, op := range ops {
		_, exists := m.kvs[op.Key]
		switch {
		case !op.Delete:
			m.kvs[op.Key] = store.KV{Key: op.Key, Value: append([]byte{}, op.Value...), ModRevision: took}
		case exists:
			delete(m.kvs, op.Key)
		default:
			continue
		}
		changed = true
	}
	if changed {
		m.revision = took
	}
	return store.TxnResult{Succeeded: holds, Revision: m.revision}
}

func (m *model) list() []store.KV {
	var kvs []store.KV
	for _, key := range slices.Sorted(maps.Keys(m.kvs)) {
		kvs = append(kvs, m.kvs[key])
	}
	return kvs
}

var (
	keys = rapid.SampledFrom([]string{"a", "a/1", "a/2", "b", "\xff"})
	ops  = rapid.Custom(func(t *rapid.T) store.Op {
		if rapid.Bool().Draw(t, "delete") {
			return store.Delete(keys.Draw(t, "key"))
		}
		return store.Put(keys.Draw(t, "key"), rapid.SliceOfN(rapid.Byte(), 0, 3).Draw(t, "value"))
	})
	branches = rapid.SliceOfNDistinct(ops, 0, 3, func(op store.Op) string { return op.Key })
)

// testModel runs random transactions one after the other on one store and on
// the model. One store serves all examples: opening one costs more than a case.
func testModel(t *testing.T, b Backend) {
	s := open(t, b)
	m := &model{kvs: make(map[string]store.KV), revision: revisionOf(t, s)}
	rapid.Check(t, func(rt *rapid.T) {
		rt.Repeat(map[string]func(*rapid.T){
			"txn": func(rt *rapid.T) {
				var cmps []store.Cmp
				for _, key := range rapid.SliceOfN(keys, 0, 2).Draw(rt, "compared") {
					c := store.Cmp{Key: key, ModRevision: m.kvs[key].ModRevision}
					if rapid.IntRange(0, 3).Draw(rt, "wrong") == 0 {
						c.ModRevision++
					}
					cmps = append(cmps, c)
				}
				then, otherwise := branches.Draw(rt, "then"), branches.Draw(rt, "otherwise")
				got, err := s.Txn(within(t), cmps, then, otherwise)
				if err != nil {
					rt.Fatal(err)
				}
				before := m.revision
				wantDiff(t, "Txn", got, m.txn(cmps, then, otherwise, max(got.Revision, before+1)))
			},
			"get": func(rt *rapid.T) {
				key := keys.Draw(rt, "key")
				got, _, err := s.Get(within(t), key)
				want, exists := m.kvs[key]
				if exists != (err == nil) {
					rt.Fatalf("Get(%q) = %v; exists %v", key, err, exists)
				}
				if exists {
					wantDiff(t, "Get", got, want)
				}
			},
			"list": func(*rapid.T) {
				got, revision := listAll(t, s, "")
				wantDiff(t, "List", got, m.list())
				wantDiff(t, "revision", revision, m.revision)
			},
		})
	})
	s = reopen(t, b, s)
	got, revision := listAll(t, s, "")
	wantDiff(t, "List after reopening", got, m.list())
	wantDiff(t, "revision after reopening", revision, m.revision)
}
