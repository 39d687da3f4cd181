package badger

// What Open says of stores that have lost something, and that it leaves them
// as they were.

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bdg "github.com/dgraph-io/badger/v4"
	"github.com/google/go-cmp/cmp"

	"merlon.dev/ca/internal/store"
)

// sixRevisions makes a closed store: "a" is written at 2 to 6, "k2" at 2 and so
// on.
func sixRevisions(t testing.TB) (dir string) {
	t.Helper()
	dir = t.TempDir()
	s := openStore(t, dir, Options{})
	for i := 2; i <= 6; i++ {
		txn(t, s, store.Put("a", fmt.Append(nil, i)), store.Put(fmt.Sprint("k", i), fmt.Append(nil, i)))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// content returns the files of a folder.
func content(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	files := make(map[string][]byte)
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files[path], err = os.ReadFile(filepath.Join(dir, path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// usedBytes leaves out the zeroes at the end: Badger's logs are mostly holes.
func usedBytes(b []byte) int {
	n := len(b)
	for n >= len(zeroes) && bytes.Equal(b[n-len(zeroes):n], zeroes[:]) {
		n -= len(zeroes)
	}
	return len(bytes.TrimRight(b[:n], "\x00"))
}

// put makes files the content of a folder.
func put(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	for path, b := range files {
		path = filepath.Join(dir, path)
		used := b[:usedBytes(b)]
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, used, 0o600), os.Truncate(path, int64(len(b)))); err != nil {
			t.Fatal(err)
		}
	}
}

// changeDB writes past the store, at a revision.
func changeDB(t testing.TB, dir string, at uint64, change func(*bdg.Txn) error) {
	t.Helper()
	db, err := openDB(badgerOptions(dir, slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	txn := db.NewTransactionAt(math.MaxUint64, true)
	if err := errors.Join(change(txn), txn.CommitAt(at, nil), db.Close()); err != nil {
		t.Fatal(err)
	}
}

// flip changes the last byte of what is stored under a key.
func flip(key []byte) func(*bdg.Txn) error {
	return func(txn *bdg.Txn) error {
		b, err := readMeta(txn, key)
		if err != nil {
			return err
		}
		b[len(b)-1] ^= 1
		return txn.Set(key, b)
	}
}

func TestOpenRefusesWhatItDoesNotKnow(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*bdg.Txn) error
		want   string
	}{
		"newer format": {
			func(txn *bdg.Txn) error { return txn.Set(formatKey, []byte("3")) },
			`format version "3", but this merlon-ca knows only "2": a newer one wrote it`,
		},
		"older format": {
			func(txn *bdg.Txn) error { return txn.Set(formatKey, []byte("1")) },
			"format version 1, from before the first release, is not read any more",
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := sixRevisions(t)
			changeDB(t, dir, 6, test.change)
			for range 2 { // a refusal leaves nothing open
				if _, err := Open(dir, Options{}); err == nil || !strings.Contains(err.Error(), test.want) {
					t.Fatalf("Open = %v; want %q", err, test.want)
				}
			}
		})
	}
}

func TestOpenRefusesWhatHasLostSomething(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*bdg.Txn) error
		at     uint64 // 0: 6
		want   DamagedError
	}{
		"gap in the log": {
			func(txn *bdg.Txn) error { return txn.Delete(logKey(3)) }, 0,
			DamagedError{Reason: "goes on at 4 after 2", LastGood: 2, First: 3, Last: 6},
		},
		"end of the log": {
			func(txn *bdg.Txn) error { return errors.Join(txn.Delete(logKey(6)), txn.Delete(logKey(5))) }, 0,
			DamagedError{Reason: "revision 6 was acknowledged, but the revision log ends at 4", LastGood: 4, First: 5, Last: 6},
		},
		"changed record": {
			func(txn *bdg.Txn) error {
				r, after, err := readRecord(txn, 4)
				r.events[0].KV.Value = []byte("other")
				return errors.Join(err, txn.Set(logKey(4), after.appendLink(r.encode())))
			}, 0,
			DamagedError{Reason: "record 4 does not continue the hash chain", LastGood: 3, First: 4, Last: 6},
		},
		"changed link": {
			flip(logKey(6)), 0,
			DamagedError{Reason: "record 6 does not continue the hash chain", LastGood: 5, First: 6, Last: 6},
		},
		"short record": {
			func(txn *bdg.Txn) error { return txn.Set(logKey(6), []byte("x")) }, 0,
			DamagedError{Reason: "record 6 is damaged", LastGood: 5, First: 6, Last: 6},
		},
		"foreign key in the log": {
			func(txn *bdg.Txn) error { return txn.Set([]byte("r/12345678x"), nil) }, 0,
			DamagedError{Reason: "is not a revision", LastGood: 6, First: 7, Last: 7},
		},
		"data above the log": {
			func(txn *bdg.Txn) error { return txn.Set(dataKey("x"), newState("x", nil, 9).stored) }, 9,
			DamagedError{Reason: "data of revision 9, but the revision log ends at 6", Last: 6},
		},
		"changed value": {
			flip(dataKey("k3")), 0,
			DamagedError{Reason: `read key "k3": record damaged: its checksum does not match`, Last: 6},
		},
		"other value": {
			func(txn *bdg.Txn) error { return txn.Set(dataKey("k3"), newState("k3", []byte("other"), 3).stored) }, 0,
			DamagedError{Reason: "the data at revision 6 is not what the revision log says", Last: 6},
		},
		"older value": {
			func(txn *bdg.Txn) error { return txn.Set(dataKey("a"), newState("a", []byte("5"), 5).stored) }, 0,
			DamagedError{Reason: "the data at revision 6 is not what the revision log says", Last: 6},
		},
		"lost key": {
			func(txn *bdg.Txn) error { return txn.Delete(dataKey("k3")) }, 0,
			DamagedError{Reason: "5 keys are there at revision 6, and 6 should be", Last: 6},
		},
		"changed compaction point": {
			flip(compactedKey), 0,
			DamagedError{Reason: "the checksum of the compaction point does not match", Last: 6},
		},
		"no format": {
			func(txn *bdg.Txn) error { return txn.Delete(formatKey) }, 0,
			DamagedError{Reason: "nothing of it is left", First: 1, Last: 6},
		},
		"no compaction point": {
			func(txn *bdg.Txn) error { return txn.Delete(compactedKey) }, 0,
			DamagedError{Reason: "the compaction point is missing", Last: 6},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := sixRevisions(t)
			if test.at == 0 {
				test.at = 6
			}
			changeDB(t, dir, test.at, test.change)
			wantDamage(t, dir, test.want)
		})
	}
}

// wantDamage opens a damaged store, twice; Reason may be a part of what is
// said. The files must not change.
func wantDamage(t testing.TB, dir string, want DamagedError) {
	t.Helper()
	want.Dir = dir
	before := content(t, dir)
	for range 2 {
		s, err := Open(dir, Options{})
		if err == nil {
			s.Close()
			t.Fatalf("Open took the store; want %v", &want)
		}
		damaged, ok := errors.AsType[*DamagedError](err)
		if !ok || !strings.Contains(damaged.Reason, want.Reason) {
			t.Fatalf("Open = %v; want %v", err, &want)
		}
		want.Reason = damaged.Reason
		if *damaged != want {
			t.Fatalf("Open = %v; want %v", damaged, &want)
		}
		r, err := Verify(dir)
		if err != nil || r.Damage == nil || r.Damage.LastGood != want.LastGood || !strings.HasPrefix(r.Damage.Reason, want.Reason) {
			t.Fatalf("Verify = %+v, %v; want %v", r, err, &want)
		}
	}
	if after := content(t, dir); !maps.EqualFunc(before, after, bytes.Equal) {
		t.Error("files of a refused store have changed")
	}
}

// TestOpenRefusesAnOlderBadgerBesideTheHead: the log ends whole, but too early.
func TestOpenRefusesAnOlderBadgerBesideTheHead(t *testing.T) {
	dir := sixRevisions(t)
	older := content(t, dir)
	s := openStore(t, dir, Options{})
	for range 3 {
		txn(t, s, store.Put("later", nil))
	}
	s.Close()
	newer := content(t, dir)

	older[headName] = newer[headName]
	put(t, dir, older)
	wantDamage(t, dir, DamagedError{Reason: "revision 9 was acknowledged, but the revision log ends at 6", LastGood: 6, First: 7, Last: 9})

	put(t, dir, map[string][]byte{headName: newer[headName]})
	wantDamage(t, dir, DamagedError{Reason: "nothing of it is left", First: 1, Last: 9})

	delete(newer, headName)
	put(t, dir, newer)
	wantDamage(t, dir, DamagedError{Reason: "HEAD is missing", LastGood: 9, First: 10})
}

func TestOpenRefusesTheHeadOfAnotherStore(t *testing.T) {
	dir, other := sixRevisions(t), t.TempDir()
	s := openStore(t, other, Options{})
	for range 4 {
		txn(t, s, store.Put("b", nil))
	}
	s.Close()
	files := content(t, dir)
	files[headName] = content(t, other)[headName]
	put(t, dir, files)
	wantDamage(t, dir, DamagedError{Reason: "head and revision log have different histories at revision 5", LastGood: 6, First: 7})
}

func TestDamageSaysWhatToDo(t *testing.T) {
	for want, e := range map[string]DamagedError{
		"store d is damaged: r; the last good revision is 7, revisions 8 to 9 are missing. Nothing was changed. " +
			"Inspect it with: merlon store verify d. Restore a backup, or go on without what is missing: merlon-ca -accept-older-store=7": {
			Dir: "d", Reason: "r", LastGood: 7, First: 8, Last: 9,
		},
		"store d is damaged: r; the last good revision is 7, revision 8 is missing. -accept-older-store=6 is not the last good revision. " +
			"Nothing was changed. Inspect it with: merlon store verify d. Restore a backup, or go on without what is missing: merlon-ca -accept-older-store=7": {
			Dir: "d", Reason: "r", LastGood: 7, First: 8, Last: 8, Refused: 6,
		},
		"store d is damaged: r; no revision is whole, what is missing is not known. Nothing was changed. " +
			"Inspect it with: merlon store verify d. Restore a backup": {Dir: "d", Reason: "r", Refused: 6},
		"store d is damaged: r; no revision is whole, any of revisions 1 to 9 may be missing. Nothing was changed. " +
			"Inspect it with: merlon store verify d. Restore a backup": {Dir: "d", Reason: "r", Last: 9},
	} {
		if got := e.Error(); got != want {
			t.Errorf("%+v says\n%s\nwant\n%s", e, got, want)
		}
	}
}

func TestAcceptedLossGoesOnInTheNextEpoch(t *testing.T) {
	dir := sixRevisions(t)
	changeDB(t, dir, 6, func(txn *bdg.Txn) error { return txn.Delete(logKey(5)) })
	wantDamage(t, dir, DamagedError{Reason: "goes on at 6 after 4", LastGood: 4, First: 5, Last: 6})
	for _, wrong := range []uint64{3, 5, 6} {
		_, err := Open(dir, Options{AcceptOlder: wrong})
		damaged, ok := errors.AsType[*DamagedError](err)
		if !ok || damaged.Refused != wrong || damaged.LastGood != 4 {
			t.Fatalf("Open that accepts %d = %v", wrong, err)
		}
	}
	damaged := content(t, dir)
	opts := Options{AcceptOlder: 4}
	s := openStore(t, dir, opts)
	want := []store.KV{{Key: "a", Value: []byte("4"), ModRevision: 4}}
	for i := uint64(2); i <= 4; i++ {
		want = append(want, store.KV{Key: fmt.Sprint("k", i), Value: fmt.Append(nil, i), ModRevision: i})
	}
	check := func(wantRevision uint64) {
		t.Helper()
		got, revision, _, err := s.List(t.Context(), "", "", 100, 0)
		if err != nil || revision != wantRevision {
			t.Fatalf("List = revision %d, %v; want %d", revision, err, wantRevision)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
	}
	epoch := store.NextEpoch(6)
	check(epoch)
	for _, after := range []uint64{0, 4, 6} {
		if _, err := s.Watch(t.Context(), "", after); !errors.Is(err, store.ErrCompacted) {
			t.Errorf("Watch from %d = %v; want %v", after, err, store.ErrCompacted)
		}
	}
	if got := txn(t, s, store.Put("a", []byte("new"))); got != epoch+1 {
		t.Errorf("next revision %d; want %d", got, epoch+1)
	}
	want[0] = store.KV{Key: "a", Value: []byte("new"), ModRevision: epoch + 1}
	s.Close()
	s = openStore(t, dir, opts) // the flag was left in the unit file
	check(epoch + 1)

	kept, err := filepath.Glob(filepath.Join(dir, damagedName+"*"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("folders of damaged stores %v, %v", kept, err)
	}
	if !maps.EqualFunc(damaged, content(t, kept[0]), bytes.Equal) {
		t.Error("the damaged store was not kept as it was")
	}
}

// TestAcceptedLossSurvivesACrash breaks the installation off after each step.
func TestAcceptedLossSurvivesACrash(t *testing.T) {
	dir := sixRevisions(t)
	changeDB(t, dir, 6, func(txn *bdg.Txn) error { return txn.Delete(logKey(6)) })
	damaged := content(t, dir)
	s := openStore(t, dir, Options{AcceptOlder: 5})
	s.Close()
	whole := content(t, dir)
	for path := range whole {
		if strings.Contains(path, "/") {
			delete(whole, path)
		}
	}
	in := func(folder string, files map[string][]byte) map[string][]byte {
		moved := make(map[string][]byte)
		for name, b := range files {
			moved[filepath.Join(folder, name)] = b
		}
		return moved
	}
	join := func(parts ...map[string][]byte) map[string][]byte {
		all := make(map[string][]byte)
		for _, p := range parts {
			maps.Copy(all, p)
		}
		return all
	}
	tables := maps.Clone(whole)
	delete(tables, headName)
	onlyHead := map[string][]byte{headName: whole[headName]}
	for name, test := range map[string]struct {
		files map[string][]byte
		opts  Options
	}{
		"while it is built":      {join(damaged, in(partialName, tables)), Options{AcceptOlder: 5}},
		"when it is staged":      {join(damaged, in(incomingName, whole)), Options{AcceptOlder: 5}},
		"when it is decided":     {join(damaged, in(clearingName, whole)), Options{}},
		"when some are aside":    {join(onlyHead, in(damagedName+"x", damaged), in(clearingName, whole)), Options{}},
		"when all are aside":     {join(in(damagedName+"x", damaged), in(clearingName, whole)), Options{}},
		"before any is moved up": {in(movingName, whole), Options{}},
		"when some are moved up": {join(tables, in(movingName, onlyHead)), Options{}},
		"when all are moved up":  {join(whole, map[string][]byte{}), Options{}},
	} {
		t.Run(name, func(t *testing.T) {
			put(t, dir, test.files)
			s := openStore(t, dir, test.opts)
			kv, revision, err := s.Get(t.Context(), "a")
			if err != nil || revision != store.NextEpoch(6) || string(kv.Value) != "5" {
				t.Errorf("Get = %+v, %d, %v", kv, revision, err)
			}
			s.Close()
		})
	}
	put(t, dir, join(damaged, in(incomingName, whole)))
	wantDamage(t, dir, DamagedError{Reason: "revision 6 was acknowledged", LastGood: 5, First: 6, Last: 6})
}

// TestEveryFileMatters cuts and flips each file that counts in a few places: either all is
// there afterwards, or the store is refused.
func TestEveryFileMatters(t *testing.T) {
	const places = 2 // the sweep over all of them is another test's (crashtest)
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	for i := range 40 {
		txn(t, s, store.Put("a", fmt.Append(nil, i)), store.Put(fmt.Sprint("k", i), bytes.Repeat([]byte{byte(i)}, 500)))
	}
	s.Close()
	s = openStore(t, dir, Options{})
	for i := range 40 {
		txn(t, s, store.Put("b", fmt.Append(nil, i)))
	}
	want, _, _, err := s.List(t.Context(), "", "", 1000, 0)
	if err != nil {
		t.Fatal(err)
	}
	running := content(t, dir) // as SIGKILL leaves it
	s.Close()
	closed := content(t, dir)
	for state, files := range map[string]map[string][]byte{"running": running, "closed": closed} {
		for name, whole := range files {
			used := usedBytes(whole)
			if used == 0 || holdsNothing(name) || name == lockName {
				continue
			}
			for i := range places {
				at := used * i / places
				cut := whole[:at]
				flipped := bytes.Clone(whole)
				if at < len(whole) {
					flipped[at] ^= 1 << (i % 8)
				}
				for what, b := range map[string][]byte{"cut": cut, "flipped": flipped} {
					damaged := maps.Clone(files)
					damaged[name] = b
					put(t, dir, damaged)
					wantAllOrNothing(t, fmt.Sprintf("%s, %s %s at %d", state, name, what, at), dir, want)
				}
			}
		}
	}
}

func wantAllOrNothing(t *testing.T, what, dir string, want []store.KV) {
	t.Helper()
	s, err := Open(dir, Options{})
	if err != nil {
		if _, ok := errors.AsType[*DamagedError](err); !ok {
			t.Errorf("%s: Open = %v", what, err)
		}
		return
	}
	defer s.Close()
	got, _, _, err := s.List(t.Context(), "", "", 1000, 0)
	if err != nil || !cmp.Equal(got, want) {
		t.Errorf("%s: List = %d pairs, %v; want %d", what, len(got), err, len(want))
	}
}
