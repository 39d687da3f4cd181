package badger

// What only shows from inside: batches, damage, and what stays on disk.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	bdg "github.com/dgraph-io/badger/v4"
	"github.com/google/go-cmp/cmp"

	"merlon.dev/ca/internal/store"
)

func openStore(t testing.TB, dir string, opts Options) *Store {
	t.Helper()
	s, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func txn(t testing.TB, s *Store, ops ...store.Op) uint64 {
	t.Helper()
	res, err := s.Txn(t.Context(), nil, ops, nil)
	if err != nil {
		t.Fatal(err)
	}
	return res.Revision
}

// inOneBatch lets the transactions wait, in order, behind a commit that is
// held up, so that they are committed together.
func inOneBatch(t testing.TB, s *Store, txns ...[]store.Op) {
	t.Helper()
	commitAt := s.commitAt
	held, release := make(chan struct{}), make(chan struct{})
	var commits int
	s.commitAt = func(txn *bdg.Txn, revision uint64) error {
		if commits++; commits == 1 {
			close(held)
			<-release
		}
		return commitAt(txn, revision)
	}
	var wg sync.WaitGroup
	wg.Go(func() { txn(t, s, store.Put("held", nil)) })
	<-held
	for i, ops := range txns {
		wg.Go(func() { txn(t, s, ops...) })
		for len(s.requests) < i+1 {
			// the order of the queue is the order of the batch
		}
	}
	close(release)
	wg.Wait()
	if commits != 2 {
		t.Errorf("%d transactions took %d commits; want 1", len(txns), commits-1)
	}
	s.commitAt = commitAt
}

func TestWaitingTransactionsShareOneCommit(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	var txns [][]store.Op
	for i := range 100 {
		txns = append(txns, []store.Op{store.Put(fmt.Sprint(i), nil)})
	}
	before, _ := s.Revision(t.Context())
	inOneBatch(t, s, txns...)
	if after, _ := s.Revision(t.Context()); after != before+101 {
		t.Errorf("revision %d after %d and 101 transactions", after, before)
	}
}

func TestBatchOnDiskKeepsWhatItsTransactionsSaw(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	txn(t, s, store.Put("a", []byte("0")))
	inOneBatch(t, s,
		[]store.Op{store.Put("a", []byte("1"))},
		[]store.Op{store.Put("a", []byte("2"))},
		[]store.Op{store.Delete("a"), store.Put("b", nil)},
		[]store.Op{store.Put("a", []byte("3")), store.Delete("absent")},
	)
	first := uint64(4)
	want := []string{"a=1 was 0", "a=2 was 1", "a gone was 2, b= new", "a=3 new"}
	check := func(when string) {
		t.Helper()
		for i := range want {
			if got := watched(t, s, first+uint64(i)-1, len(want)-i); !cmp.Equal(got, want[i:]) {
				t.Errorf("%s, watch from %d: %q; want %q", when, first+uint64(i)-1, got, want[i:])
			}
		}
		for revision := first - 2; revision < first+4; revision++ {
			_, _, _, err := s.List(t.Context(), "", "", 10, revision)
			end := revision < first || revision == first+3
			if end != (err == nil) || !end && !errors.Is(err, store.ErrCompacted) {
				t.Errorf("%s, List at revision %d = %v; end of a batch %v", when, revision, err, end)
			}
		}
	}
	check("in memory")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir, Options{})
	check("on disk")
	txn(t, s, store.Put("z", nil))
	check("below the present")
}

// watched tells n batches in short.
func watched(t testing.TB, s *Store, after uint64, n int) (told []string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ch, err := s.Watch(ctx, "", after)
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		var events []string
		for _, e := range (<-ch).Events {
			text := e.KV.Key + "=" + string(e.KV.Value)
			if e.Delete {
				text = e.KV.Key + " gone"
			}
			if e.Prev == nil {
				text += " new"
			} else {
				text += " was " + string(e.Prev)
			}
			events = append(events, text)
		}
		told = append(told, strings.Join(events, ", "))
	}
	return told
}

func TestFailedSyncStopsWritesForGood(t *testing.T) {
	var logged bytes.Buffer
	s := openStore(t, t.TempDir(), Options{Logger: slog.New(slog.NewTextHandler(&logged, nil))})
	before := txn(t, s, store.Put("a", []byte("kept")))
	eio := errors.New("input/output error")
	commitAt := s.commitAt
	s.commitAt = func(txn *bdg.Txn, revision uint64) error {
		return errors.Join(commitAt(txn, revision), eio) // written, but perhaps not synced
	}
	for range 2 {
		_, err := s.Txn(t.Context(), nil, []store.Op{store.Put("a", []byte("lost"))}, nil)
		if !errors.Is(err, store.ErrReadOnly) || !errors.Is(err, eio) {
			t.Fatalf("Txn = %v; want %v", err, store.ErrReadOnly)
		}
		s.commitAt = commitAt // the disk is said to be well again
	}
	// Also one that writes nothing: what it compared is not known to be there.
	if _, err := s.Txn(t.Context(), nil, nil, nil); !errors.Is(err, store.ErrReadOnly) {
		t.Errorf("empty Txn = %v; want %v", err, store.ErrReadOnly)
	}
	kv, revision, err := s.Get(t.Context(), "a")
	if err != nil || string(kv.Value) != "kept" || revision != before {
		t.Errorf("Get = %+v, %d, %v; want what was acknowledged", kv, revision, err)
	}
	kvs, _, _, err := s.List(t.Context(), "", "", 10, 0)
	if err != nil || len(kvs) != 1 || string(kvs[0].Value) != "kept" {
		t.Errorf("List = %+v, %v; want what was acknowledged", kvs, err)
	}
	if n := strings.Count(logged.String(), "level=ERROR"); n != 1 {
		t.Errorf("%d errors logged; want 1:\n%s", n, &logged)
	}
}

func TestTransactionWhoseCallerLeftBeforehandIsNotRun(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	commitAt := s.commitAt
	held, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.commitAt = func(txn *bdg.Txn, revision uint64) error {
		once.Do(func() { close(held); <-release })
		return commitAt(txn, revision)
	}
	var wg sync.WaitGroup
	wg.Go(func() { txn(t, s, store.Put("held", nil)) })
	<-held
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() {
		if _, err := s.Txn(ctx, nil, []store.Op{store.Put("late", nil)}, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("Txn = %v; want %v", err, context.Canceled)
		}
	})
	for len(s.requests) == 0 {
		// until it waits
	}
	cancel()
	close(release)
	wg.Wait()
	txn(t, s, store.Put("next", nil))
	if _, _, err := s.Get(t.Context(), "late"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Get = %v; want %v", err, store.ErrNotFound)
	}
}

// TestHistoryOnDiskIsBounded writes one key again and again: the log keeps its
// length, and Badger drops the versions below it.
func TestHistoryOnDiskIsBounded(t *testing.T) {
	const keep = 50
	dir := t.TempDir()
	s := openStore(t, dir, Options{KeepRevisions: keep})
	overwrite := func(n int) {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range n / 8 {
					txn(t, s, store.Put("hot", []byte("v")))
				}
			})
		}
		wg.Wait()
	}
	overwrite(2000)
	latest, _ := s.Revision(t.Context())
	// Compaction stops at the end of a batch, of at most 8 here.
	if from := s.history.compactedTo(); latest-from < keep || latest-from > keep+16 {
		t.Errorf("compacted to %d of %d; want about %d kept", from, latest, keep)
	}
	again := func() {
		if err := s.Close(); err != nil { // leaves a table on the first level
			t.Fatal(err)
		}
		s = openStore(t, dir, Options{KeepRevisions: keep})
	}
	flatten := func() {
		if err := s.db.Flatten(1); err != nil {
			t.Fatal(err)
		}
	}
	for range 7 { // Flatten moves a first level of fewer tables only onto another
		again()
		overwrite(80)
	}
	flatten()
	again()
	for range 2 * keep { // so that all of "hot" lies below the compaction point
		txn(t, s, store.Put("other", nil))
	}
	flatten()
	if n := countVersions(s, dataKey("hot")); n != 1 {
		t.Errorf("%d versions of the key on disk; want 1", n)
	}
	// A removed record stays, under its tombstone, until the tombstone itself
	// is below the compaction point; and the memtable is not flattened.
	if n := countVersions(s, logPrefix); n < keep || n > 10*keep {
		t.Errorf("%d records and tombstones on disk; want about %d", n, 6*keep)
	}
}

func countVersions(s *Store, prefix []byte) (n int) {
	view := s.db.NewTransactionAt(math.MaxUint64, false)
	defer view.Discard()
	opts := bdg.DefaultIteratorOptions
	opts.AllVersions, opts.Prefix, opts.PrefetchValues = true, prefix, false
	it := view.NewIterator(opts)
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		n++
	}
	return n
}

func TestLoweredKeepRevisionsShrinksTheLog(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	var txns [][]store.Op
	for i := range 400 {
		txns = append(txns, []store.Op{store.Put(fmt.Sprint(i), nil)})
	}
	for range 4 {
		inOneBatch(t, s, txns...)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir, Options{KeepRevisions: 5})
	for range 12 {
		txn(t, s, store.Put("a", nil))
	}
	latest, _ := s.Revision(t.Context())
	if from := s.history.compactedTo(); latest-from != 5 {
		t.Errorf("compacted to %d of %d; want 5 kept", from, latest)
	}
}

func TestDirectoryIsPrivate(t *testing.T) {
	dir := t.TempDir()
	for _, dir := range []string{dir, filepath.Join(dir, "new", "store")} {
		openStore(t, dir, Options{})
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("mode of %s = %v, %v; want 0700", dir, info.Mode(), err)
		}
	}
}

// hookContext calls hook at the first look at its error, which a read takes
// between choosing its revision and reading at it.
type hookContext struct {
	context.Context
	once sync.Once
	hook func()
}

func (c *hookContext) Err() error {
	c.once.Do(c.hook)
	return c.Context.Err()
}

// TestReadIsNeverBelowTheCompactionPoint: what Badger dropped there would look
// like keys that are absent.
func TestReadIsNeverBelowTheCompactionPoint(t *testing.T) {
	const keep = 5
	s := openStore(t, t.TempDir(), Options{KeepRevisions: keep})
	txn(t, s, store.Put("a", nil))
	overtaken := func() context.Context {
		return &hookContext{Context: t.Context(), hook: func() {
			for range 2 * keep {
				txn(t, s, store.Put("a", nil))
			}
		}}
	}
	kv, revision, err := s.Get(overtaken(), "a")
	if from := s.history.compactedTo(); err != nil || revision < from || kv.ModRevision < from {
		t.Errorf("Get = %+v at revision %d, %v; compacted to %d", kv, revision, err, from)
	}
	_, _, _, err = s.List(overtaken(), "", "", 10, 0)
	if !errors.Is(err, store.ErrCompacted) {
		t.Errorf("List = %v; want %v", err, store.ErrCompacted)
	}
}

// TestValueLogStaysEmpty: its synced writes are not checked by Badger.
func TestValueLogStaysEmpty(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	txn(t, s,
		store.Put("a", make([]byte, store.MaxValueBytes)),
		store.Put("b", make([]byte, store.MaxTxnBytes-store.MaxValueBytes-2)))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	logs, err := filepath.Glob(filepath.Join(dir, "*.vlog"))
	if err != nil || len(logs) == 0 {
		t.Fatalf("value logs %v, %v", logs, err)
	}
	for _, path := range logs {
		if info, err := os.Stat(path); err != nil || info.Size() > 64 {
			t.Errorf("%s has %d bytes, %v; want a header only", path, info.Size(), err)
		}
	}
}

func TestBadgerLogsAtDebugAndWarn(t *testing.T) {
	var out bytes.Buffer
	l := logger{slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	l.Errorf("e %d\n", 1)
	l.Warningf("w %s", "\x1b[31m")
	l.Infof("i\n")
	l.Debugf("d")
	for _, want := range []string{
		`level=WARN msg=badger detail="e 1"`, `level=WARN msg=badger detail="w \x1b[31m"`,
		`level=DEBUG msg=badger detail=i`, `level=DEBUG msg=badger detail=d`,
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %s in\n%s", want, &out)
		}
	}
	out.Reset()
	logger{slog.New(slog.NewTextHandler(&out, nil))}.Infof("i")
	if out.Len() > 0 {
		t.Errorf("logged at info: %s", &out)
	}
}
