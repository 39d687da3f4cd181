package etcd_test

// Imports: what was there keeps its revisions, and compares on them.

import (
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"testing"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/integration/stage"
)

// past is the content of a store at revision 1 000 000.
const pastRevision = 1_000_000

func past(n int) []store.KV {
	kvs := make([]store.KV, n)
	for i := range kvs {
		kvs[i] = store.KV{Key: fmt.Sprintf("entry/%05d", i), Value: fmt.Appendf(nil, "value %d", i), ModRevision: uint64(7 + i)}
	}
	return kvs
}

func each(kvs []store.KV) iter.Seq2[store.KV, error] {
	return func(yield func(store.KV, error) bool) {
		for _, kv := range kvs {
			if !yield(kv, nil) {
				return
			}
		}
	}
}

func TestImportKeepsRevisions(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	want := past(1000)
	if err := etcd.Import(t.Context(), cfg, pastRevision, each(want)); err != nil {
		t.Fatal(err)
	}
	s := open(t, cfg)
	defer s.Close()
	got, revision, _, err := s.List(t.Context(), "", "", 2000, 0)
	if err != nil || revision <= pastRevision {
		t.Fatalf("List = revision %d, %v; want above %d", revision, err, pastRevision)
	}
	if len(got) != len(want) {
		t.Fatalf("%d keys; want %d", len(got), len(want))
	}
	for i := range got {
		if fmt.Sprint(got[i]) != fmt.Sprint(want[i]) {
			t.Fatalf("key %d is %v; want %v", i, got[i], want[i])
		}
	}
	for _, after := range []uint64{0, 7, pastRevision} {
		if _, err := s.Watch(t.Context(), "", after); !errors.Is(err, store.ErrCompacted) {
			t.Errorf("Watch from %d = %v; want %v", after, err, store.ErrCompacted)
		}
	}
	batches, err := s.Watch(t.Context(), "", revision)
	if err != nil {
		t.Fatal(err)
	}
	at := put(t, s, want[0].Key, "new")
	if b := <-batches; b.Revision != at || at <= revision || string(b.Events[0].Prev) != string(want[0].Value) {
		t.Errorf("watch sent %+v; want revision %d, above %d", b, at, revision)
	}
	if err := etcd.Import(t.Context(), cfg, pastRevision, each(want)); err == nil {
		t.Error("a second import into the same prefix was taken")
	}
}

func TestComparesOfImportedKeys(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	if err := etcd.Import(t.Context(), cfg, pastRevision, each(past(3))); err != nil {
		t.Fatal(err)
	}
	s := open(t, cfg)
	defer s.Close()
	fresh := put(t, s, "fresh", "v")
	for name, test := range map[string]struct {
		cmp  store.Cmp
		want bool
	}{
		"imported":                    {store.Cmp{Key: "entry/00000", ModRevision: 7}, true},
		"imported, of another":        {store.Cmp{Key: "entry/00000", ModRevision: 8}, false},
		"imported, absent":            {store.Cmp{Key: "entry/00000"}, false},
		"imported, as etcd counts":    {store.Cmp{Key: "entry/00000", ModRevision: 4}, false},
		"imported, with a new number": {store.Cmp{Key: "entry/00000", ModRevision: fresh}, false},
		"new":                         {store.Cmp{Key: "fresh", ModRevision: fresh}, true},
		"new, with an old number":     {store.Cmp{Key: "fresh", ModRevision: 7}, false},
		"no such key":                 {store.Cmp{Key: "gone", ModRevision: 7}, false},
		"no such key, absent":         {store.Cmp{Key: "gone"}, true},
		"the largest number":          {store.Cmp{Key: "fresh", ModRevision: 1<<64 - 1}, false},
	} {
		res, err := s.Txn(t.Context(), []store.Cmp{test.cmp, {Key: "fresh", ModRevision: fresh}}, nil, nil)
		if err != nil || res.Succeeded != test.want {
			t.Errorf("%s: Txn = %v, %v; want %v", name, res.Succeeded, err, test.want)
		}
	}
	var winners atomic.Int32
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			res, err := s.Txn(t.Context(), []store.Cmp{{Key: "entry/00001", ModRevision: 8}}, []store.Op{store.Delete("entry/00001")}, nil)
			if err != nil {
				t.Error(err)
			}
			if res.Succeeded {
				winners.Add(1)
			}
		})
	}
	wg.Wait()
	if winners.Load() != 1 {
		t.Errorf("%d of 200 deleted an imported key; want 1", winners.Load())
	}
	put(t, s, "entry/00001", "again")
	res, err := s.Txn(t.Context(), []store.Cmp{{Key: "entry/00001", ModRevision: 8}}, nil, nil)
	if err != nil || res.Succeeded {
		t.Errorf("compare with the imported revision after a rewrite = %v, %v; want false", res.Succeeded, err)
	}
}

func TestBrokenImport(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	broken := errors.New("the source broke")
	err := etcd.Import(t.Context(), cfg, pastRevision, func(yield func(store.KV, error) bool) {
		for _, kv := range past(500) {
			if !yield(store.KV{Key: "left/" + kv.Key, Value: kv.Value, ModRevision: kv.ModRevision}, nil) {
				return
			}
		}
		yield(store.KV{}, broken)
	})
	if !errors.Is(err, broken) {
		t.Fatalf("Import = %v; want %v", err, broken)
	}
	if _, err := etcd.Open(t.Context(), cfg); !errors.Is(err, store.ErrUnfinished) {
		t.Fatalf("Open of a broken import = %v; want an error that says so", err)
	}
	if err := etcd.Import(t.Context(), cfg, pastRevision, each(past(10))); err != nil {
		t.Fatal(err)
	}
	s := open(t, cfg)
	defer s.Close()
	if kvs, _, _, err := s.List(t.Context(), "", "", 1000, 0); err != nil || len(kvs) != 10 {
		t.Errorf("%d keys, %v; want the 10 of the second import", len(kvs), err)
	}
}

// Whoever imports later wins; the other one ends.
func TestImportThatIsOvertaken(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	err := etcd.Import(t.Context(), cfg, pastRevision, func(yield func(store.KV, error) bool) {
		if err := etcd.Import(t.Context(), cfg, pastRevision, each(past(10))); err != nil {
			t.Error(err)
		}
		yield(store.KV{Key: "late", ModRevision: 1}, nil)
	})
	if err == nil {
		t.Error("an import that was overtaken ended without an error")
	}
	s := open(t, cfg)
	defer s.Close()
	if kvs, _, _, err := s.List(t.Context(), "", "", 1000, 0); err != nil || len(kvs) != 10 {
		t.Errorf("%d keys, %v; want the 10 of the import that ended", len(kvs), err)
	}
}

func TestImportRefusesWhatNoStoreHas(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	for name, kvs := range map[string][]store.KV{
		"revision 0":        {{Key: "a"}},
		"revision above at": {{Key: "a", ModRevision: pastRevision + 1}},
		"empty key":         {{ModRevision: 1}},
		"key twice":         {{Key: "a", ModRevision: 1}, {Key: "a", ModRevision: 2}},
	} {
		if err := etcd.Import(t.Context(), config(e), pastRevision, each(kvs)); err == nil {
			t.Errorf("%s: imported", name)
		}
	}
}
