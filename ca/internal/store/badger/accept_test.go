package badger_test

// A store that is whole and known to be old.

import (
	"errors"
	"testing"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

func TestWholeStoreGoesOnInTheNextEpochWhenItsRevisionIsNamed(t *testing.T) {
	dir := t.TempDir()
	open := func(accept uint64) (*badger.Store, uint64) {
		t.Helper()
		st, err := badger.Open(dir, badger.Options{AcceptOlder: accept})
		if err != nil {
			t.Fatal(err)
		}
		revision, err := st.Revision(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st, revision
	}
	shut := func(st *badger.Store) {
		t.Helper()
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
	}
	st, _ := open(0)
	res, err := st.Txn(t.Context(), nil, []store.Op{store.Put("a", []byte("1"))}, nil)
	if err != nil {
		t.Fatal(err)
	}
	shut(st)
	st, revision := open(res.Revision - 1) // another one changes nothing
	if shut(st); revision != res.Revision {
		t.Fatalf("revision %d; want %d as before", revision, res.Revision)
	}
	want := store.NextEpoch(res.Revision)
	for range 2 { // a flag that is left in place does not count twice
		st, revision = open(res.Revision)
		kv, _, err := st.Get(t.Context(), "a")
		if err != nil || kv.ModRevision != res.Revision || string(kv.Value) != "1" || revision != want {
			t.Fatalf("%+v, %v at revision %d; want it as it was, at %d", kv, err, revision, want)
		}
		if _, err := st.Watch(t.Context(), "", res.Revision); !errors.Is(err, store.ErrCompacted) {
			t.Errorf("a watch across the loss: %v; want ErrCompacted", err)
		}
		shut(st)
	}
	st, _ = open(0)
	defer shut(st)
	next, err := st.Txn(t.Context(), nil, []store.Op{store.Put("b", nil)}, nil)
	if err != nil || next.Revision != want+1 {
		t.Errorf("the next write: %+v, %v; want revision %d", next, err, want+1)
	}
}

// A store that is put back twice goes on above what was given out meanwhile.
func TestAcceptedStoreGoesOnAboveEveryEpochThatWasSeen(t *testing.T) {
	dir := t.TempDir()
	st, err := badger.Open(dir, badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	seen := store.NextEpoch(store.NextEpoch(0)) + 7
	if st, err = badger.Open(dir, badger.Options{AcceptOlder: 1, Seen: seen}); err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if revision, err := st.Revision(t.Context()); err != nil || revision != store.NextEpoch(seen) {
		t.Errorf("revision %d, %v; want %d", revision, err, store.NextEpoch(seen))
	}
}
