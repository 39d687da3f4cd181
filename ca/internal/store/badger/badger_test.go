package badger_test

// The conformance suite on Badger, with a history as it ships and with one so
// short that everything is read from disk and compacted all the time.

import (
	"context"
	"testing"

	"go.uber.org/goleak"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/store/storetest"
)

func TestMain(m *testing.M) {
	runChild() // these do not return in a child process
	runDiskChild()
	goleak.VerifyTestMain(m)
}

func TestConformance(t *testing.T) {
	storetest.Run(t, backend(badger.Options{}))
}

func TestConformanceWithShortHistory(t *testing.T) {
	storetest.Run(t, backend(badger.Options{KeepRevisions: 300, RecentRevisions: 2}))
}

// dirs remembers where each store of the suite lives.
type dirs map[store.Store]string

func backend(opts badger.Options) storetest.Backend {
	at := dirs{}
	keep := opts.KeepRevisions
	if keep == 0 {
		keep = 1_000
	}
	opts.KeepRevisions = keep
	return storetest.Backend{
		Open: func(t testing.TB) store.Store {
			dir := t.TempDir()
			s := open(t, dir, opts)
			at[s] = dir
			return s
		},
		Reopen: func(t testing.TB, s store.Store) store.Store {
			dir := at[s]
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, dir, opts)
			at[s] = dir
			return s
		},
		Compact: func(t testing.TB, s store.Store) { outwrite(t, s, keep) },
	}
}

func open(t testing.TB, dir string, opts badger.Options) *badger.Store {
	t.Helper()
	s, err := badger.Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// outwrite makes n revisions, so that those before are compacted.
func outwrite(t testing.TB, s store.Store, n uint64) {
	t.Helper()
	const writers = 64
	done := make(chan error)
	for range writers {
		go func() {
			var err error
			for i := uint64(0); i <= n/writers+8 && err == nil; i++ {
				_, err = s.Txn(context.Background(), nil, []store.Op{store.Put("compact/", nil)}, nil)
			}
			done <- err
		}()
	}
	for range writers {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}
