// Importing a store, and verifying one.

package badger

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"merlon.dev/ca/internal/store"
)

// seq yields pairs, and then err if there is one.
func seq(err error, pairs ...store.KV) iter.Seq2[store.KV, error] {
	return func(yield func(store.KV, error) bool) {
		for _, kv := range pairs {
			if !yield(kv, nil) {
				return
			}
		}
		if err != nil {
			yield(store.KV{}, err)
		}
	}
}

func samePair(a, b store.KV) bool {
	return a.Key == b.Key && bytes.Equal(a.Value, b.Value) && a.ModRevision == b.ModRevision
}

func TestImportKeepsRevisionsAndGoesOnAbove(t *testing.T) {
	var pairs []store.KV
	for i := range uint64(3000) {
		pairs = append(pairs, store.KV{Key: fmt.Sprintf("k/%05d", i), Value: []byte(strings.Repeat("v", int(i%2000))), ModRevision: 100 + (i*7)%900})
	}
	for name, test := range map[string]struct {
		pairs []store.KV
		at    uint64
	}{
		"nothing":    {nil, 1},
		"some":       {pairs, 5000},
		"next epoch": {pairs, store.NextEpoch(5000)},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := Import(dir, Options{}, test.at, seq(nil, test.pairs...)); err != nil {
				t.Fatal(err)
			}
			s := openStore(t, dir, Options{})
			for range 2 {
				got, revision, _, err := s.List(t.Context(), "k/", "", 10_000, 0)
				if err != nil || revision < test.at {
					t.Fatalf("List = revision %d, %v; want %d", revision, err, test.at)
				}
				if !slices.EqualFunc(test.pairs, got, samePair) {
					t.Fatal("the pairs have changed")
				}
				if _, err := s.Watch(t.Context(), "", test.at-1); !errors.Is(err, store.ErrCompacted) {
					t.Errorf("Watch from below the import = %v; want %v", err, store.ErrCompacted)
				}
				if got := txn(t, s, store.Put("later", nil)); got != revision+1 {
					t.Errorf("next revision %d; want %d", got, revision+1)
				}
				s.Close()
				s = openStore(t, dir, Options{})
			}
			if got := watched(t, s, test.at, 2); !cmp.Equal(got, []string{"later= new", "later= was "}) {
				t.Errorf("watch from the import: %q", got)
			}
		})
	}
}

func TestImportThatFailsLeavesNoStore(t *testing.T) {
	read := errors.New("backup ends in the middle")
	for name, test := range map[string]struct {
		at    uint64
		pairs iter.Seq2[store.KV, error]
		want  string
	}{
		"reading fails":    {9, seq(read, store.KV{Key: "a", ModRevision: 1}), read.Error()},
		"not in order":     {9, seq(nil, store.KV{Key: "b", ModRevision: 1}, store.KV{Key: "a", ModRevision: 1}), `key "a" comes after "b"`},
		"twice":            {9, seq(nil, store.KV{Key: "a", ModRevision: 1}, store.KV{Key: "a", ModRevision: 2}), `key "a" comes after "a"`},
		"no revision":      {9, seq(nil, store.KV{Key: "a"}), `key "a" is of revision 0`},
		"revision beyond":  {9, seq(nil, store.KV{Key: "a", ModRevision: 10}), `key "a" is of revision 10, in a store of revision 9`},
		"empty key":        {9, seq(nil, store.KV{ModRevision: 1}), `must be in order`},
		"value too large":  {9, seq(nil, store.KV{Key: "a", Value: make([]byte, store.MaxValueBytes+1), ModRevision: 1}), store.ErrTooLarge.Error()},
		"below revision 1": {0, seq(nil), "begins at 1"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := Import(dir, Options{}, test.at, test.pairs); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("Import = %v; want %q", err, test.want)
			}
			if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
				t.Errorf("left behind: %v, %v", files, err)
			}
			if err := Import(dir, Options{}, 9, seq(nil)); err != nil {
				t.Errorf("next Import = %v", err)
			}
		})
	}
}

func TestImportRefusesAStore(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	if err := Import(dir, Options{}, 9, seq(nil)); err == nil || !strings.Contains(err.Error(), "in use by another merlon-ca") {
		t.Errorf("Import into an open store = %v", err)
	}
	s.Close()
	before := content(t, dir)
	if err := Import(dir, Options{}, 9, seq(nil)); err == nil || !strings.Contains(err.Error(), "there is a store already") {
		t.Errorf("Import = %v", err)
	}
	if !maps.EqualFunc(before, content(t, dir), bytes.Equal) {
		t.Error("a refused import changed the store")
	}
}

func TestVerifyTellsWhatIsThere(t *testing.T) {
	dir := sixRevisions(t)
	want := Report{Revision: 6, Acknowledged: 6, Clean: true, Keys: 6, Bytes: 1 + 1 + 5*(2+1)}
	if got, err := Verify(dir); err != nil || got != want {
		t.Errorf("Verify = %+v, %v; want %+v", got, err, want)
	}
	s := openStore(t, dir, Options{KeepRevisions: 2})
	if _, err := Verify(dir); err == nil || !strings.Contains(err.Error(), "in use by another merlon-ca (pid") {
		t.Errorf("Verify of an open store = %v", err)
	}
	txn(t, s, store.Delete("k2"))
	txn(t, s, store.Put("a", nil))
	crashed := content(t, dir)
	s.Close()
	put(t, dir, crashed)
	want = Report{Compacted: 6, Revision: 8, Acknowledged: 8, Keys: 5, Bytes: 1 + 4*(2+1)}
	if got, err := Verify(dir); err != nil || got != want {
		t.Errorf("Verify = %+v, %v; want %+v", got, err, want)
	}
	if _, err := Verify(t.TempDir()); !errors.Is(err, store.ErrNone) {
		t.Errorf("Verify of nothing = %v", err)
	}
}

// A kill in the middle of an import leaves no store, and nothing may take it for
// one but the import that comes after it.
func TestImportThatWasBrokenOffIsNoStore(t *testing.T) {
	for _, state := range []string{"incoming-partial", "incoming"} {
		t.Run(state, func(t *testing.T) {
			dir := t.TempDir()
			left := filepath.Join(dir, state)
			if err := Import(left, Options{}, 5, seq(nil)); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(dir, "lost+found"), 0o700); err != nil {
				t.Fatal(err)
			}
			if there, err := Exists(dir); there || !errors.Is(err, store.ErrUnfinished) {
				t.Errorf("Exists = %t, %v", there, err)
			}
			if _, err := Open(dir, Options{}); !errors.Is(err, store.ErrUnfinished) {
				t.Errorf("Open = %v", err)
			}
			if _, err := Verify(dir); !errors.Is(err, store.ErrUnfinished) {
				t.Errorf("Verify = %v", err)
			}
			want := []store.KV{{Key: "a", Value: []byte("1"), ModRevision: 3}}
			if err := Import(dir, Options{}, 7, seq(nil, want...)); err != nil {
				t.Fatal(err)
			}
			// Beside a store it is nothing but waste, such as an accepted store leaves.
			if err := Import(left, Options{}, 5, seq(nil)); err != nil {
				t.Fatal(err)
			}
			st, err := Open(dir, Options{Existing: true})
			if err != nil {
				t.Fatal(err)
			}
			defer st.Close()
			if kv, revision, err := st.Get(t.Context(), "a"); err != nil || revision != 7 || kv.ModRevision != 3 {
				t.Errorf("Get = %+v at revision %d, %v", kv, revision, err)
			}
			if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is still there: %v", state, err)
			}
		})
	}
}

func TestOpenBeginsNoStoreWhereOneMustBe(t *testing.T) {
	empty := t.TempDir()
	if err := os.Mkdir(filepath.Join(empty, "lost+found"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{empty, filepath.Join(empty, "nowhere")} {
		if _, err := Open(dir, Options{Existing: true}); !errors.Is(err, store.ErrNone) {
			t.Errorf("Open(%s) = %v; want ErrNone", dir, err)
		}
	}
	// All that is left is a head that says nothing.
	if err := os.WriteFile(filepath.Join(empty, "HEAD"), []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(empty, Options{Existing: true}); !isDamaged(err) {
		t.Errorf("Open of a torn head = %v; want a DamagedError", err)
	}
	st, err := Open(empty, Options{}) // the first start of all
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}

func isDamaged(err error) bool {
	_, damaged := errors.AsType[*DamagedError](err)
	return damaged
}
