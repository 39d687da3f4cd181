// Rounds: what concerns every node is told by going round the streams, so many at
// a time as are served. Were all woken with each commit, ten thousand of them would
// keep everybody else from the processors, those who make the next picture first of
// all. What is committed while a round goes on falls together in the next.

package registry

import (
	"context"
	"slices"
	"sync/atomic"
	"time"
)

const (
	// wakeTogether is how many streams are woken at a time.
	wakeTogether = 64
	// The round looks every takeLook whether they have taken their updates, and goes
	// on after takePatience all the same: who is busy sending must not hold up others.
	takeLook     = time.Millisecond
	takePatience = 20 * time.Millisecond
)

// rounds is safe for concurrent use.
type rounds struct {
	due    atomic.Uint64 // every stream is to be told of this revision
	signal chan struct{} // holds a token when due was raised
}

func newRounds() rounds { return rounds{signal: make(chan struct{}, 1)} }

// ask has every stream told of revision. One goroutine at a time calls it.
func (r *rounds) ask(revision uint64) {
	r.due.Store(revision)
	select {
	case r.signal <- struct{}{}:
	default: // a round begins anyway
	}
}

// run goes round until ctx ends.
func (r *rounds) run(ctx context.Context, s *feeds) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.signal:
		}
		// A feed that is opened later begins with a picture that has it.
		for some := range slices.Chunk(s.open(), wakeTogether) {
			r.tell(ctx, some)
		}
	}
}

// tell wakes those that have not been told yet, and waits until they take it.
func (r *rounds) tell(ctx context.Context, some []*Feed) {
	due := r.due.Load()
	woken := slices.DeleteFunc(some, func(f *Feed) bool { return !f.behind(due) || !f.wake() })
	for range takePatience / takeLook {
		if len(woken) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(takeLook):
		}
		woken = slices.DeleteFunc(woken, func(f *Feed) bool { return !f.behind(due) })
	}
}
