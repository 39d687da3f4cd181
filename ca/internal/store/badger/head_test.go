// The head: what it says survives a torn slot, and nothing is acknowledged
// before it is synced.

package badger

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"merlon.dev/ca/internal/store"
)

var points = rapid.Custom(func(t *rapid.T) point {
	p := point{
		revision: rapid.Uint64().Draw(t, "revision"),
		keys:     rapid.Uint64().Draw(t, "keys"),
		sum:      rapid.Uint64().Draw(t, "sum"),
	}
	copy(p.hash[:], rapid.SliceOfN(rapid.Byte(), len(p.hash), len(p.hash)).Draw(t, "hash"))
	return p
})

func TestPointComesBackAsEncoded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := points.Draw(t, "point")
		if got := decodePoint(want.append(nil)); got != want {
			t.Fatalf("decoded %+v; want %+v", got, want)
		}
		slot := headSlot{serial: rapid.Uint64().Draw(t, "serial"), clean: rapid.Bool().Draw(t, "clean"), tip: want}
		b := slot.encode()
		if got, ok := decodeHeadSlot(b); !ok || got != slot {
			t.Fatalf("decoded %+v, %v; want %+v", got, ok, slot)
		}
		b[rapid.IntRange(0, len(b)-1).Draw(t, "at")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if got, ok := decodeHeadSlot(b); ok {
			t.Fatalf("damaged slot was taken for %+v", got)
		}
	})
}

// TestPointDependsOnAllBeforeIt: what is changed, left out or swapped leads to
// another hash.
func TestPointDependsOnAllBeforeIt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prev, encoded := points.Draw(t, "prev"), rapid.SliceOf(rapid.Byte()).Draw(t, "record")
		change := change{keys: rapid.Uint64().Draw(t, "keys"), sum: rapid.Uint64().Draw(t, "sum")}
		next := prev.next(7, encoded, change)
		if !next.follows(prev, encoded) {
			t.Fatal("a point does not follow the one that it was made from")
		}
		other := prev
		other.hash[3]++
		if next.follows(other, encoded) || next.follows(prev, append(encoded, 0)) {
			t.Fatal("another history leads to the same point")
		}
		for _, p := range []point{{8, next.hash, next.keys, next.sum}, {7, next.hash, next.keys + 1, next.sum}, {7, next.hash, next.keys, next.sum + 1}} {
			if p.follows(prev, encoded) {
				t.Fatalf("%+v was taken for %+v", p, next)
			}
		}
	})
}

func FuzzDecodeHead(f *testing.F) {
	first := headSlot{serial: 1, tip: origin(5, 1, 2)}.encode()
	second := headSlot{serial: 2, clean: true, tip: origin(6, 1, 2)}.encode()
	both := append(append(make([]byte, 0, 2*slotBytes), first...), make([]byte, slotBytes-len(first))...)
	f.Add(first)
	f.Add(append(both, second...))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, ok := decodeHead(b)
		if !ok {
			return
		}
		if again, ok := decodeHeadSlot(h.encode()); !ok || again != h {
			t.Fatalf("%+v became %+v", h, again)
		}
	})
}

func FuzzDecodeValue(f *testing.F) {
	f.Add("a", newState("a", []byte("v"), 7).stored)
	f.Add("", []byte{})
	f.Fuzz(func(t *testing.T, key string, b []byte) {
		st, err := decodeValue(dataKey(key), b)
		if err != nil {
			return
		}
		if again := newState(key, st.value, st.revision); string(again.stored) != string(b) || again.sum != st.sum {
			t.Fatalf("%x became %x", b, again.stored)
		}
	})
}

// TestTornSlotLeavesTheOther damages the slot that was written last, as a crash
// in the middle of its write does, and then the other one too.
func TestTornSlotLeavesTheOther(t *testing.T) {
	dir := sixRevisions(t)
	path := filepath.Join(dir, headName)
	b, err := os.ReadFile(path)
	if err != nil || len(b) != 2*slotBytes {
		t.Fatalf("head of %d bytes, %v; want %d", len(b), err, 2*slotBytes)
	}
	last, _ := decodeHead(b)
	if last.tip.revision != 6 || !last.clean {
		t.Fatalf("head of a closed store is %+v", last)
	}
	b[int(last.serial%2)*slotBytes+30] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, dir, Options{})
	if got := s.head.serial; got != last.serial {
		t.Errorf("serial %d after opening; want the torn %d written again", got, last.serial)
	}
	if got := txn(t, s, store.Put("b", nil)); got != 7 {
		t.Errorf("next revision is %d; want 7", got)
	}
	s.Close()
	for _, at := range []int{30, slotBytes + 30} {
		b[at] ^= 4
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	wantDamage(t, dir, DamagedError{Reason: "HEAD is missing or unreadable", LastGood: 7, First: 8})
}

// TestCreationSurvivesACrash: the head comes first, and says nothing yet.
func TestCreationSurvivesACrash(t *testing.T) {
	whole := t.TempDir()
	openStore(t, whole, Options{}).Close()
	files := content(t, whole)
	born := t.TempDir()
	if _, err := examineEmpty(born, Options{}, headSlot{}, errNoHead); err != nil {
		t.Fatal(err)
	}
	unborn := content(t, born)[headName]
	for name, at := range map[string]map[string][]byte{
		"torn head":    {headName: unborn[:40]},
		"head":         {headName: unborn},
		"whole Badger": {headName: unborn, "MANIFEST": files["MANIFEST"], "000001.sst": files["000001.sst"]},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, at)
			s := openStore(t, dir, Options{})
			if got := txn(t, s, store.Put("a", nil)); got != 2 {
				t.Errorf("first revision %d; want 2", got)
			}
		})
	}
}

// await fails the test if ch is not closed soon.
func await(t *testing.T, what string, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: nothing happened", what)
	}
}

// holdHead makes the next sync of the head wait until release is called, which
// may give it an error. held is closed when it waits.
func holdHead(s *Store) (held <-chan struct{}, release func(error)) {
	sync, waits, result := s.head.sync, make(chan struct{}), make(chan error)
	s.head.sync = func() error {
		s.head.sync = sync
		close(waits)
		if err := <-result; err != nil {
			return err
		}
		return sync()
	}
	return waits, func(err error) { result <- err }
}

func TestNothingIsAcknowledgedBeforeTheHeadIsSynced(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	before := txn(t, s, store.Put("a", []byte("before")))
	ch, err := s.Watch(t.Context(), "", before)
	if err != nil {
		t.Fatal(err)
	}
	held, release := holdHead(s)
	answered := make(chan uint64, 2)
	var wg sync.WaitGroup
	wg.Go(func() { answered <- txn(t, s, store.Put("a", []byte("first"))) })
	await(t, "sync of the head", held)
	// The committer goes on, and sees what nobody else sees.
	wg.Go(func() {
		res, err := s.Txn(t.Context(), []store.Cmp{{Key: "a", ModRevision: before + 1}}, []store.Op{store.Put("a", []byte("second"))}, nil)
		if err != nil || !res.Succeeded {
			t.Errorf("second Txn = %+v, %v", res, err)
		}
		answered <- res.Revision
	})
	for len(s.committed) == 0 {
		// until it is committed, and waits for the head
	}
	if st, err := s.read(before+2, "a"); err != nil || st.revision != before+2 {
		t.Errorf("Badger is at %d, %v; want both writes", st.revision, err)
	}
	kv, revision, err := s.Get(t.Context(), "a")
	if err != nil || revision != before || string(kv.Value) != "before" {
		t.Errorf("Get = %+v at %d, %v; want what was acknowledged", kv, revision, err)
	}
	select {
	case b := <-ch:
		t.Errorf("a watcher saw %+v", b)
	case revision := <-answered:
		t.Errorf("revision %d was acknowledged", revision)
	default:
	}
	release(nil)
	wg.Wait()
	if t.Failed() {
		return // what comes on the channel has come
	}
	for want := before + 1; want <= before+2; want++ {
		if b := <-ch; b.Revision != want {
			t.Errorf("watch sent %d; want %d", b.Revision, want)
		}
	}
	if h, err := readHead(s.dir); err != nil || h.tip.revision != before+2 || h.clean {
		t.Errorf("head is %+v, %v; want revision %d", h, err, before+2)
	}
}

func TestFailedSyncOfTheHeadStopsWritesForGood(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	before := txn(t, s, store.Put("a", []byte("kept")))
	held, release := holdHead(s)
	errs := make(chan error)
	write := func() {
		_, err := s.Txn(context.Background(), nil, []store.Op{store.Put("a", []byte("unknown"))}, nil)
		errs <- err
	}
	go write()
	await(t, "sync of the head", held)
	go write() // is in Badger when the first one fails
	for len(s.committed) == 0 {
	}
	eio := errors.New("input/output error")
	release(eio)
	for range 2 {
		if err := <-errs; !errors.Is(err, store.ErrReadOnly) || !errors.Is(err, store.ErrUncertain) || !errors.Is(err, eio) {
			t.Errorf("Txn = %v; want %v and %v", err, store.ErrReadOnly, store.ErrUncertain)
		}
	}
	if _, err := s.Txn(t.Context(), nil, []store.Op{store.Put("a", nil)}, nil); !errors.Is(err, store.ErrReadOnly) || errors.Is(err, store.ErrUncertain) {
		t.Errorf("Txn = %v; want %v alone: it began after the failure", err, store.ErrReadOnly)
	}
	if st, err := s.read(before+3, "a"); err != nil || st.revision != before+2 {
		t.Errorf("Badger went on to %d, %v", st.revision, err)
	}
	kv, revision, err := s.Get(t.Context(), "a")
	if err != nil || revision != before || string(kv.Value) != "kept" {
		t.Errorf("Get = %+v at %d, %v; want what was acknowledged", kv, revision, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if h, err := readHead(dir); err != nil || h.clean {
		t.Errorf("head after a failure is %+v, %v; want it not clean", h, err)
	}
	s = openStore(t, dir, Options{}) // what was written may be kept: nobody was told
	if kv, revision, err := s.Get(t.Context(), "a"); err != nil || revision != before+2 || string(kv.Value) != "unknown" {
		t.Errorf("Get after reopening = %+v at %d, %v", kv, revision, err)
	}
}

// TestDamagedValueIsAnErrorWhereItIsRead: a value that rots while the store is
// open is never handed out.
func TestDamagedValueIsAnErrorWhereItIsRead(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	revision := txn(t, s, store.Put("k/rotten", []byte("value")))
	view := s.db.NewTransactionAt(revision, true)
	if err := errors.Join(flip(dataKey("k/rotten"))(view), view.CommitAt(revision, nil)); err != nil {
		t.Fatal(err)
	}
	const want = `read key "k/rotten": record damaged: its checksum does not match`
	_, _, getErr := s.Get(t.Context(), "k/rotten")
	_, _, _, listErr := s.List(t.Context(), "", "", 10, 0)
	_, cmpErr := s.Txn(t.Context(), []store.Cmp{{Key: "k/rotten", ModRevision: revision}}, nil, nil)
	_, putErr := s.Txn(t.Context(), nil, []store.Op{store.Put("k/rotten", nil)}, nil)
	for what, err := range map[string]error{"Get": getErr, "List": listErr, "compare": cmpErr, "Put": putErr} {
		if err == nil || err.Error() != want || !errors.Is(err, store.ErrDamaged) {
			t.Errorf("%s = %v; want %s", what, err, want)
		}
	}
}

// TestDamagedRecordEndsTheWatchThatReadsIt: likewise a record of the revision
// log, which a watcher that is behind reads from the disk.
func TestDamagedRecordEndsTheWatchThatReadsIt(t *testing.T) {
	for name, rot := range map[string]func(r *record, after *point){
		"another value":  func(r *record, _ *point) { r.events[0].KV.Value = []byte("fOrty") },
		"another key":    func(r *record, _ *point) { r.events[0].KV.Key = "K" },
		"a put, deleted": func(r *record, _ *point) { r.events[0].Delete, r.events[0].KV.Value = true, nil },
		"another link":   func(_ *record, after *point) { after.sum++ },
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, t.TempDir(), Options{RecentRevisions: 1})
			txn(t, s, store.Put("k", []byte("three")))
			rotten := txn(t, s, store.Put("k", []byte("forty")))
			last := txn(t, s, store.Put("k", []byte("five")))
			view := s.db.NewTransactionAt(last, true)
			r, after, err := readRecord(view, rotten)
			if err != nil {
				t.Fatal(err)
			}
			rot(&r, &after)
			if err := errors.Join(view.Set(logKey(rotten), after.appendLink(r.encode())), view.CommitAt(last, nil)); err != nil {
				t.Fatal(err)
			}
			for _, from := range []uint64{0, rotten - 1} {
				ch, err := s.Watch(t.Context(), "", from)
				if err != nil {
					t.Fatal(err)
				}
				for b := range ch {
					if b.Revision >= rotten {
						t.Errorf("from %d the watch sent %+v", from, b)
						break
					}
				}
			}
			if _, err := s.readLog(rotten - 1); !errors.Is(err, store.ErrDamaged) {
				t.Errorf("readLog = %v; want %v", err, store.ErrDamaged)
			}
		})
	}
}
