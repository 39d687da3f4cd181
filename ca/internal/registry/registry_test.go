// The picture and its feeds, over the real store.

package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/sdk/svid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	td    = spiffeid.RequireTrustDomainFromString("shop.test")
	nodeA = spiffeid.RequireFromPath(td, "/agent/a")
	nodeB = spiffeid.RequireFromPath(td, "/agent/b")
)

func openStore(t testing.TB) store.Store {
	t.Helper()
	st, err := badger.Open(t.TempDir(), badger.Options{KeepRevisions: 200})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return st
}

// start opens a registry over st and keeps it current until the test ends.
func start(t testing.TB, st store.Store) *Registry {
	t.Helper()
	r, err := Open(t.Context(), st, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	run(t, r)
	return r
}

// run keeps r current until the test ends.
func run(t testing.TB, r *Registry) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func put(t testing.TB, st store.Store, r *Registry, parent spiffeid.ID) *entry.Entry {
	t.Helper()
	e := &entry.Entry{
		ID: entry.NewID(), SPIFFEID: spiffeid.RequireFromPath(td, "/web"), ParentID: parent,
		Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}},
	}
	value, err := entry.Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	e.Revision = write(t, st, r, store.Put(EntryPrefix+e.ID, value))
	return e
}

func remove(t testing.TB, st store.Store, r *Registry, e *entry.Entry) {
	t.Helper()
	write(t, st, r, store.Delete(EntryPrefix+e.ID))
}

func write(t testing.TB, st store.Store, r *Registry, ops ...store.Op) uint64 {
	t.Helper()
	res, err := st.Txn(t.Context(), nil, ops, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Wait(t.Context(), res.Revision); err != nil {
		t.Fatal(err)
	}
	return res.Revision
}

func subscribe(t testing.TB, r *Registry, agent spiffeid.ID, resume uint64) *Feed {
	t.Helper()
	f, err := r.Subscribe(t.Context(), agent, resume)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

func ids(entries []*entry.Entry) []string {
	var out []string
	for _, e := range entries {
		out = append(out, e.ID)
	}
	slices.Sort(out)
	return out
}

func TestFeedTellsItsNodeOnly(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	first := put(t, st, r, nodeA)
	f := subscribe(t, r, nodeA, 0)
	<-f.Due()
	if u := f.Take(time.Now()); !u.Reset || !slices.Equal(ids(u.Entries), []string{first.ID}) {
		t.Fatalf("first update = %+v; want a reset with one entry", u)
	}
	put(t, st, r, nodeB)
	select {
	case <-f.Due():
		t.Error("another node's change woke the feed")
	default:
	}
	second := put(t, st, r, nodeA)
	<-f.Due()
	if u := f.Take(time.Now()); u.Reset || !slices.Equal(ids(u.Entries), []string{second.ID}) || u.Revision != r.Revision() {
		t.Errorf("update = %+v; want the second entry alone", u)
	}
	if u := f.Take(time.Now()); len(u.Entries)+len(u.Removed)+len(u.Revocations) > 0 {
		t.Errorf("nothing changed, and the feed says %+v", u)
	}
}

// A stream that stands still holds up nobody, and what falls together is told
// once.
func TestSlowFeedCoalesces(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	f := subscribe(t, r, nodeA, 0)
	f.Take(time.Now())
	stays := put(t, st, r, nodeA)
	for range 20 {
		remove(t, st, r, put(t, st, r, nodeA))
	}
	u := f.Take(time.Now())
	if !slices.Equal(ids(u.Entries), []string{stays.ID}) || len(u.Removed) != 20 {
		t.Errorf("update has %d entries and %d removals; want 1 and 20", len(u.Entries), len(u.Removed))
	}
}

func TestOverflowingFeedListsAnew(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	e := put(t, st, r, nodeA)
	f := subscribe(t, r, nodeA, 0)
	f.Take(time.Now())
	f.mu.Lock()
	for i := range maxPending + 1 {
		f.mark(fmt.Sprint(i))
	}
	f.mu.Unlock()
	if u := f.Take(time.Now()); !u.Reset || !slices.Equal(ids(u.Entries), []string{e.ID}) || len(u.Removed) != 0 {
		t.Errorf("update = %+v; want a full listing", u)
	}
}

// What went away before this process began is read from the store's history.
func TestResumptionReadsHistoryBack(t *testing.T) {
	st := openStore(t)
	var resume uint64
	var gone *entry.Entry
	t.Run("before", func(t *testing.T) {
		r := start(t, st)
		gone = put(t, st, r, nodeA)
		resume = r.Revision()
		remove(t, st, r, gone)
		remove(t, st, r, put(t, st, r, nodeB))
	})
	r := start(t, st)
	fresh := put(t, st, r, nodeA)
	f := subscribe(t, r, nodeA, resume)
	u := f.Take(time.Now())
	if u.Reset || !slices.Equal(u.Removed, []string{gone.ID}) || !slices.Equal(ids(u.Entries), []string{fresh.ID}) {
		t.Errorf("update = %+v; want the removal of %s and entry %s", u, gone.ID, fresh.ID)
	}
}

func TestResumptionFromACompactedRevisionListsAnew(t *testing.T) {
	st := openStore(t)
	var resume uint64
	t.Run("before", func(t *testing.T) {
		r := start(t, st)
		e := put(t, st, r, nodeA)
		resume = r.Revision()
		remove(t, st, r, e)
		for range 1000 { // far more than the store keeps
			if _, err := st.Txn(t.Context(), nil, []store.Op{store.Put("x", nil)}, nil); err != nil {
				t.Fatal(err)
			}
		}
	})
	r := start(t, st)
	f := subscribe(t, r, nodeA, resume)
	if u := f.Take(time.Now()); !u.Reset || len(u.Entries) != 0 {
		t.Errorf("update = %+v; want an empty full listing", u)
	}
}

func TestHistoryForgetsTheOldest(t *testing.T) {
	var h history
	for i := range uint64(maxRemovals + 1) {
		h.add(removal{revision: i + 1, id: fmt.Sprint(i)})
	}
	if len(h.removals) > maxRemovals || h.known == 0 || h.removals[0].revision <= h.known {
		t.Errorf("history holds %d removals from %d and claims to know all after %d", len(h.removals), h.removals[0].revision, h.known)
	}
	if got := h.after(maxRemovals); len(got) != 1 || got[0].revision != maxRemovals+1 {
		t.Errorf("after(%d) = %v", maxRemovals, got)
	}
}

// A revocation concerns what was issued from an older picture and nothing from
// a newer one.
func TestRevocationRevisionDividesOldFromNew(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	e := put(t, st, r, nodeA)
	old := peerAt(t, e.SPIFFEID, r.Revision())
	op, _, err := revocation.Put(0, svid.Revocation{SPIFFEID: e.SPIFFEID.String(), ExpiresAt: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	write(t, st, r, op)
	if _, revoked := r.Revoked(old); !revoked {
		t.Error("an SVID of an older picture is not concerned")
	}
	if _, revoked := r.Revoked(peerAt(t, e.SPIFFEID, r.Grounds(old).Revision)); revoked {
		t.Error("an SVID of the picture that has the record is concerned")
	}
	if _, revoked := r.Revoked(peerAt(t, spiffeid.RequireFromPath(td, "/other"), 1)); revoked {
		t.Error("another SPIFFE ID is concerned")
	}
}

func peerAt(t testing.TB, id spiffeid.ID, revision uint64) *svid.Peer {
	t.Helper()
	serial, err := svid.NewSerial(1, revision)
	if err != nil {
		t.Fatal(err)
	}
	return &svid.Peer{ID: id, Serial: serial, OurSerial: true, SerialHex: serial.String()}
}

// An authority that overlooks a revocation would be worse than none.
func TestUnreadableRecordStopsTheRegistry(t *testing.T) {
	st := openStore(t)
	r, err := Open(t.Context(), st, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- r.Run(t.Context()) }()
	if _, err := st.Txn(t.Context(), nil, []store.Op{store.Put(revocation.Prefix+"x", []byte("{}"))}, nil); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("Run ended without an error")
	}
	if _, err := Open(t.Context(), st, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("Open took an unreadable revocation")
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	r := start(t, openStore(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Wait(ctx, r.Revision()+1); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait = %v; want context.Canceled", err)
	}
}
