// Streams, commits and rounds at the same time: what each stream has been told is,
// after every update, what the store held at the revision that the update names.

package registry

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// revocationEvent is a record that concerns every node.
func revocationEvent(t fataler, n int) store.Event {
	t.Helper()
	op, _, err := revocation.Put(0, svid.Revocation{Serial: fmt.Sprintf("%x", n+1), ExpiresAt: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	return store.Event{KV: store.KV{Key: op.Key, Value: op.Value}}
}

// listener is an agent at the other end of a feed.
type listener struct {
	node     spiffeid.ID
	eager    bool
	at       uint64
	held     map[string]bool
	withdraw map[string]bool // keys of revocations
}

// hear takes an update, and says what is wrong with it, pic being the picture of
// its revision.
func (l *listener) hear(u Update, pic *picture) error {
	if u.Revision < l.at {
		return fmt.Errorf("at revision %d %s is told of %d", l.at, l.node, u.Revision)
	}
	if u.Reset {
		clear(l.held)
		clear(l.withdraw)
	}
	l.at = u.Revision
	for _, e := range u.Entries {
		l.held[e.ID] = true
	}
	for _, id := range u.Removed {
		delete(l.held, id)
	}
	for _, r := range u.Revocations {
		l.withdraw[r.Key] = true
	}
	want := []string{}
	for e := range pic.entries.below(append(pic.aliases(l.node), l.node)...) {
		want = append(want, e.ID)
	}
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(l.held)); !slices.Equal(got, want) {
		return fmt.Errorf("%s at revision %d holds %v; want %v", l.node, l.at, got, want)
	}
	if got, want := len(l.withdraw), len(pic.revocations.After(0, time.Time{})); got != want {
		return fmt.Errorf("%s at revision %d knows %d revocations; want %d", l.node, l.at, got, want)
	}
	return nil
}

// pictures has each picture that was published, by revision.
type pictures struct {
	mu sync.Mutex
	of map[uint64]*picture // guarded by mu
}

// get waits for the picture: it can be taken before whoever makes it notes it down.
func (p *pictures) get(revision uint64) *picture {
	for {
		p.mu.Lock()
		pic := p.of[revision]
		p.mu.Unlock()
		if pic != nil {
			return pic
		}
		time.Sleep(50 * time.Microsecond)
	}
}

// listen takes what comes until it is at the last revision, and comes again after
// every few updates from where it was. An eager one does not wait until it is due.
func (l *listener) listen(ctx context.Context, r *Registry, known *pictures, again int, last uint64) error {
	always := make(chan struct{})
	close(always)
	for {
		f, err := r.Subscribe(ctx, l.node, l.at)
		if err != nil {
			return err
		}
		for range again {
			due := f.Due()
			if l.eager {
				due = always
			}
			select {
			case <-due:
			case <-ctx.Done():
				f.Close()
				return fmt.Errorf("%s is at revision %d of %d and hears nothing", l.node, l.at, last)
			}
			u := f.Take(time.Now())
			if err := l.hear(u, known.get(u.Revision)); err != nil {
				f.Close()
				return err
			}
			if l.at >= last {
				f.Close()
				return nil
			}
		}
		f.Close()
	}
}

func TestStreamsHearOfOnePictureAtATime(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		b := newBatches(t)
		m := &model{entries: map[string]*entry.Entry{}, nodes: map[spiffeid.ID][]entry.Selector{}}
		var commits [][]store.Event
		for i := range rapid.IntRange(1, 30).Draw(rt, "commits") {
			commits = append(commits, m.changes(rt))
			if rapid.IntRange(0, 2).Draw(rt, "revoke") == 0 {
				commits = append(commits, []store.Event{revocationEvent(rt, i)})
			}
		}
		commits = append(commits, []store.Event{revocationEvent(rt, len(commits))}) // of which all hear
		known := &pictures{of: map[uint64]*picture{b.at: b.r.pic.Load()}}
		end := b.at + uint64(len(commits))

		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		var running sync.WaitGroup
		going, stop := context.WithCancel(ctx)
		running.Go(func() { b.r.rounds.run(going, &b.r.feeds) })
		faults := make(chan error, 8)
		for i := range cap(faults) {
			l := &listener{node: []spiffeid.ID{nodeA, nodeB}[i%2], eager: i < 2, held: map[string]bool{}, withdraw: map[string]bool{}}
			running.Go(func() { faults <- l.listen(ctx, b.r, known, 1+100*(i/2), end) })
		}
		for _, events := range commits {
			b.apply(events...)
			known.mu.Lock()
			known.of[b.at] = b.r.pic.Load()
			known.mu.Unlock()
		}
		for range cap(faults) {
			if err := <-faults; err != nil {
				rt.Error(err)
			}
		}
		stop()
		running.Wait()
		if n := len(b.r.feeds.open()); n != 0 {
			rt.Errorf("%d feeds are left", n)
		}
	})
}

// changes are some of one transaction.
func (m *model) changes(t *rapid.T) (events []store.Event) {
	for range rapid.IntRange(1, 10).Draw(t, "changes") {
		ev := m.change(t)
		if slices.ContainsFunc(events, func(e store.Event) bool { return e.KV.Key == ev.KV.Key }) {
			continue
		}
		events = append(events, ev)
	}
	return events
}

// Whoever sends, or looks into the picture that it has, holds up nobody.
func TestNewPictureWaitsForNoStreamThatItDoesNotConcern(t *testing.T) {
	b := newBatches(t)
	one, other := subscribe(t, b.r, nodeA, 0), subscribe(t, b.r, nodeB, 0)
	one.Take(noon)
	other.Take(noon)
	other.mu.Lock() // as in the middle of Take
	b.apply(revocationEvent(t, 1))
	b.apply(putEvent(t, below(nodeA)), revocationEvent(t, 2))
	if u := one.Take(noon); u.Revision != b.at || len(u.Entries) != 1 || len(u.Revocations) != 2 {
		t.Errorf("update = %+v; want an entry and two revocations", u)
	}
	other.mu.Unlock()
	if u := other.Take(noon); u.Revision != b.at || len(u.Entries) != 0 || len(u.Revocations) != 2 {
		t.Errorf("update = %+v; want two revocations", u)
	}
}

// An agent that is banned hears of it with the commit, whatever else is told.
func TestWhomARevocationNamesIsDueAtOnce(t *testing.T) {
	b := newBatches(t)
	b.apply(agentEvent(t, nodeA, 7), agentEvent(t, nodeB, 8))
	banned, other := subscribe(t, b.r, nodeA, 0), subscribe(t, b.r, nodeB, 0)
	take(banned)
	take(other)
	op, _, err := revocation.Put(0, svid.Revocation{AgentID: nodeA.String(), AgentHandle: 7, ExpiresAt: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	b.apply(store.Event{KV: store.KV{Key: op.Key, Value: op.Value}}) // nobody goes round here
	select {
	case <-banned.Due():
	default:
		t.Error("the agent that is banned is not due")
	}
}

// What is committed while a round goes on is told in the next, all together. A
// stream that takes nothing holds up no other.
func TestStreamsHearOfAStormInFewMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBatches(t)
		const streams, storm = 200, 3000
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { b.r.rounds.run(ctx, &b.r.feeds) })
		var updates atomic.Int64
		for i := range streams {
			f := subscribe(t, b.r, spiffeid.RequireFromPathf(td, "/agent/n%d", i), 0)
			if i%10 == 0 {
				continue // it hangs
			}
			running.Go(func() {
				for heard := 0; heard < storm; {
					select {
					case <-f.Due():
					case <-ctx.Done():
						t.Errorf("a stream heard of %d revocations; want %d", heard, storm)
						return
					}
					updates.Add(1)
					heard += len(f.Take(noon).Revocations)
				}
			})
		}
		synctest.Wait()
		for n := range storm {
			b.apply(revocationEvent(t, n))
		}
		time.Sleep(time.Second)
		stop()
		running.Wait()
		// The beginning, the round that the storm met, the round after, and one for what
		// came while that looked who was behind.
		if n := updates.Load(); n > 4*streams {
			t.Errorf("%d streams were told of %d revocations in %d messages", streams, storm, n)
		}
	})
}
