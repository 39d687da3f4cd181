// What the registry does while the store is away, behind or put back, and what
// streams hear of it.

package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// line is a store whose line can be cut, and which can be put in the place of
// another.
type line struct {
	mu     sync.Mutex // guards what follows
	behind store.Store
	fault  error              // of Watch and List, while the line is cut
	cut    context.CancelFunc // ends the open watch
	asked  chan struct{}      // receives when Watch was refused
}

func newLine(st store.Store) *line { return &line{behind: st, asked: make(chan struct{}, 1)} }

func (l *line) Watch(ctx context.Context, prefix string, after uint64) (<-chan store.Batch, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fault != nil {
		select {
		case l.asked <- struct{}{}:
		default:
		}
		return nil, l.fault
	}
	ctx, l.cut = context.WithCancel(ctx)
	return l.behind.Watch(ctx, prefix, after)
}

func (l *line) List(ctx context.Context, prefix, after string, limit int, at uint64) ([]store.KV, uint64, bool, error) {
	st, err := l.now()
	if err != nil && !errors.Is(err, store.ErrCompacted) {
		return nil, 0, false, err
	}
	return st.List(ctx, prefix, after, limit, at)
}

func (l *line) now() (store.Store, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.behind, l.fault
}

// set cuts the line, or mends it with a nil fault.
func (l *line) set(st store.Store, fault error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.behind, l.fault = st, fault
	if l.cut != nil {
		l.cut()
	}
}

// lineStore gives the registry a line.
type lineStore struct {
	store.Store
	*line
}

func (s lineStore) Watch(ctx context.Context, prefix string, after uint64) (<-chan store.Batch, error) {
	return s.line.Watch(ctx, prefix, after)
}

func (s lineStore) List(ctx context.Context, prefix, after string, limit int, at uint64) ([]store.KV, uint64, bool, error) {
	return s.line.List(ctx, prefix, after, limit, at)
}

// lockedBuffer takes log lines from any goroutine.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) count(text string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Count(b.buf.String(), text)
}

func TestPictureStaysWhileTheStoreIsAway(t *testing.T) {
	st := openStore(t)
	l := newLine(st)
	var logged lockedBuffer
	r, err := Open(t.Context(), lineStore{st, l}, slog.New(slog.NewTextHandler(&logged, nil)))
	if err != nil {
		t.Fatal(err)
	}
	run(t, r)
	e := put(t, st, r, nodeA)
	f := subscribe(t, r, nodeA, 0)
	f.Take(noon)
	l.set(st, fmt.Errorf("dial: %w", store.ErrUnavailable))
	for range 3 { // it goes on trying
		<-l.asked
	}
	if _, ok := r.Entry(e.ID); !ok || r.Fault() == nil {
		t.Errorf("the entry is known: %t, Fault() = %v; want the last picture, and a fault", ok, r.Fault())
	}
	l.set(st, nil)
	second := put(t, st, r, nodeA)
	if r.Fault() != nil {
		t.Errorf("the store is back, and Fault() = %v", r.Fault())
	}
	if u := f.Take(noon); u.Reset || !slices.Equal(ids(u.Entries), []string{second.ID}) {
		t.Errorf("update = %+v; want the new entry alone", u)
	}
	if lost, back := logged.count("cannot be followed"), logged.count("followed again"); lost != 1 || back != 1 {
		t.Errorf("logged %d times that it went and %d times that it came; want once each", lost, back)
	}
}

// What went away unseen must reach the agents all the same.
func TestRelistingTellsEveryStreamEverything(t *testing.T) {
	st := openStore(t)
	l := newLine(st)
	r, err := Open(t.Context(), lineStore{st, l}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	run(t, r)
	gone, kept := put(t, st, r, nodeA), put(t, st, r, nodeA)
	a, b := subscribe(t, r, nodeA, 0), subscribe(t, r, nodeB, 0)
	a.Take(noon)
	b.Take(noon)
	heads := r.HeadsChanged()
	l.set(st, store.ErrUnavailable)
	<-l.asked
	res, err := st.Txn(t.Context(), nil, []store.Op{store.Delete(EntryPrefix + gone.ID)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.set(st, store.ErrCompacted)
	if err := r.Wait(t.Context(), res.Revision); err != nil {
		t.Fatal(err)
	}
	l.set(st, nil)
	<-heads
	for _, f := range []*Feed{a, b} {
		u := f.Take(noon)
		want := []string(nil)
		if f == a {
			want = []string{kept.ID}
		}
		if !u.Reset || !slices.Equal(ids(u.Entries), want) {
			t.Errorf("update = %+v; want a full listing of %v", u, want)
		}
	}
}

func TestStoreThatWentBackEndsTheRegistry(t *testing.T) {
	st, older := openStore(t), openStore(t)
	l := newLine(st)
	r, err := Open(t.Context(), lineStore{st, l}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- r.Run(t.Context()) }()
	put(t, st, r, nodeA)
	l.set(older, store.ErrUnavailable)
	<-l.asked
	l.set(older, nil)
	if err := <-done; !errors.Is(err, errBackwards) {
		t.Errorf("Run = %v; want %v", err, errBackwards)
	}
}

// An agent that comes from a replica that was ahead must not be set back.
func TestSubscribeWaitsForWhatTheAgentHasSeen(t *testing.T) {
	st := openStore(t)
	r, err := Open(t.Context(), st, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	seen, err := st.Txn(t.Context(), nil, []store.Op{store.Put("x", nil)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if f, err := r.Subscribe(ctx, nodeA, seen.Revision); !errors.Is(err, context.Canceled) {
		t.Fatalf("Subscribe = %v, %v before the picture is there; want context.Canceled", f, err)
	}
	if _, _, _, streams := r.Counts(); streams != 0 {
		t.Errorf("%d streams are left of it", streams)
	}
	run(t, r)
	f := subscribe(t, r, nodeA, seen.Revision)
	if u := f.Take(noon); u.Reset || u.Revision < seen.Revision {
		t.Errorf("update = %+v; want one from revision %d on, and no listing", u, seen.Revision)
	}
}

func TestAgentOfAnotherEpochGetsAFullListing(t *testing.T) {
	r := start(t, openStore(t))
	for _, resume := range []uint64{store.NextEpoch(r.Revision()), store.NextEpoch(r.Revision()) + 7} {
		if u := subscribe(t, r, nodeA, resume).Take(noon); !u.Reset {
			t.Errorf("resumed from %d: %+v; want a full listing", resume, u)
		}
	}
	pic := *r.pic.Load()
	pic.revision = store.NextEpoch(pic.revision)
	restored := newRegistry(r.store, r.log, &pic)
	restored.history.known = 0 // it knows no removal, and must not think that there was none
	if u := subscribe(t, restored, nodeA, r.Revision()).Take(noon); !u.Reset {
		t.Errorf("resumed from before a restore: %+v; want a full listing", u)
	}
}

// Both nodes hear of it, also one that was away.
func TestEntryMovesToAnotherNode(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	e := put(t, st, r, nodeA)
	a, b := subscribe(t, r, nodeA, 0), subscribe(t, r, nodeB, 0)
	a.Take(noon)
	b.Take(noon)
	moved := *e
	moved.ParentID = nodeB
	write(t, st, r, encoded(t, &moved))
	restarted := start(t, st)
	for name, f := range map[string]*Feed{"open": a, "resumed": subscribe(t, r, nodeA, e.Revision), "resumed after a restart": subscribe(t, restarted, nodeA, e.Revision)} {
		if u := f.Take(noon); u.Reset || !slices.Equal(u.Removed, []string{e.ID}) || len(u.Entries) != 0 {
			t.Errorf("%s: the old node is told %+v; want the removal", name, u)
		}
	}
	if u := b.Take(noon); !slices.Equal(ids(u.Entries), []string{e.ID}) {
		t.Errorf("the new node is told %+v; want the entry", u)
	}
}

// Readers see whole transactions while the store changes: an entry and the
// revocation that goes with it never both.
func TestReadersSeeOneRevision(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	e := &entry.Entry{ID: entry.NewID(), SPIFFEID: spiffeid.RequireFromPath(td, "/web"), ParentID: nodeA, Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}}
	create := encoded(t, e)
	revoke, _, err := revocation.Put(0, svid.Revocation{SPIFFEID: e.SPIFFEID.String(), ExpiresAt: noon})
	if err != nil {
		t.Fatal(err)
	}
	write(t, st, r, create)
	old := peerAt(t, e.SPIFFEID, 1)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	defer readers.Wait()
	defer close(stop)
	reader := func(read func()) {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					read()
				}
			}
		})
	}
	reader(func() {
		if g := r.Grounds(old, e.ID); g.Revoked == (g.Entries[0] != nil) {
			t.Errorf("at %d: revoked=%t, entry=%v; want exactly one", g.Revision, g.Revoked, g.Entries[0])
		}
	})
	reader(func() {
		r.Agents()
		r.Entries(Filter{ParentID: nodeA.String()}, "", 10)
		r.Revocations(time.Time{})
		r.ExpiredRevocations(noon)
		r.Counts()
	})
	var held []string
	f := subscribe(t, r, nodeA, 0)
	for i := range 200 {
		if i%2 == 0 {
			write(t, st, r, store.Delete(create.Key), revoke)
		} else {
			write(t, st, r, create, store.Delete(revoke.Key))
		}
		u := f.Take(time.Time{})
		held = slices.DeleteFunc(append(held, ids(u.Entries)...), func(id string) bool { return slices.Contains(u.Removed, id) })
		held = slices.Compact(held)
		if want := i % 2; len(held) != want {
			t.Fatalf("change %d: the stream holds %v; want %d", i, held, want)
		}
	}
}
