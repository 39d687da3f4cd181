// Following the store: each batch of the watch makes the next picture. A store
// that is away leaves the picture as it is; whoever asks Fault learns that.

package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"merlon.dev/ca/internal/store"
)

const (
	// retryDelay keeps a store that cannot be watched from being asked in a busy
	// loop; it doubles up to maxRetryDelay.
	retryDelay    = 100 * time.Millisecond
	maxRetryDelay = 2 * time.Second
)

// errBackwards ends Run: who follows a store into its past takes revocations
// back.
var errBackwards = errors.New("the store went back to an earlier state, as after a restore: start the CA again")

// Run keeps the picture current until ctx ends. While the store is away, or
// holds a record that is damaged, it keeps the last picture and goes on trying.
// It returns early only with a record that it must not overlook (see put) and
// with a store that went back.
func (r *Registry) Run(ctx context.Context) error {
	going, stop := context.WithCancel(ctx)
	var telling sync.WaitGroup
	telling.Go(func() { r.rounds.run(going, &r.feeds) })
	defer telling.Wait()
	defer stop()
	delay, list := retryDelay, false
	for {
		before := r.Revision()
		var err error
		if !list {
			err = r.follow(ctx)
			// A watch that ends where it began cannot go on from there.
			list = errors.Is(err, store.ErrCompacted) || err == nil && r.Revision() == before
		}
		if list && ctx.Err() == nil {
			err = r.relist(ctx)
			list = err != nil
		}
		switch {
		case ctx.Err() != nil || errors.Is(err, store.ErrClosed):
			return nil
		case err != nil && !errors.Is(err, store.ErrUnavailable) && !errors.Is(err, store.ErrDamaged):
			return err
		case r.Revision() != before:
			delay = retryDelay
		}
		if err != nil {
			r.setFault(ctx, err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
		delay = min(2*delay, maxRetryDelay)
	}
}

// follow applies batches until the watch ends; that it ended says nothing about
// why: to watch again does.
func (r *Registry) follow(ctx context.Context) error {
	batches, err := r.store.Watch(ctx, "", r.Revision())
	if err != nil {
		return fmt.Errorf("watch the store: %w", err)
	}
	r.setFault(ctx, nil)
	for b := range batches {
		if err := r.apply(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

// Fault says why the picture may be out of date; nil while it follows the
// store.
func (r *Registry) Fault() error {
	if err := r.fault.Load(); err != nil {
		return *err
	}
	return nil
}

// setFault logs when it begins and when it ends.
func (r *Registry) setFault(ctx context.Context, err error) {
	before := r.Fault()
	switch {
	case err != nil && before == nil:
		r.log.LogAttrs(ctx, slog.LevelWarn, "store cannot be followed, the CA keeps its last picture of it",
			slog.Uint64("revision", r.Revision()), slog.Any("err", err))
	case err == nil && before != nil:
		r.log.LogAttrs(ctx, slog.LevelInfo, "store is followed again", slog.Uint64("revision", r.Revision()))
	}
	if err == nil {
		r.fault.Store(nil)
		return
	}
	r.fault.Store(&err)
}

// apply makes the next picture and tells the streams concerned. Only Run calls
// it.
func (r *Registry) apply(ctx context.Context, b store.Batch) error {
	next := *r.pic.Load()
	c, err := next.apply(b, &r.decoder)
	if err != nil {
		return err
	}
	r.logLeftOut(ctx, c.leftOut)
	r.acks.forget(c.lost)
	r.feeds.mu.Lock()
	defer r.feeds.mu.Unlock()
	turns := r.feeds.turns(&next, c)
	concerned := r.feeds.concerned(c, turns)
	for f := range concerned {
		f.mu.Lock()
		defer f.mu.Unlock() // when all are marked
	}
	r.publish(&next, c)
	for _, t := range c.touched {
		for f := range r.feeds.below(t.node) {
			f.mark(t.id)
		}
	}
	for _, t := range turns {
		t.take(&next)
	}
	for _, agent := range c.named {
		for f := range r.feeds.byAgent[agent] {
			f.wake()
		}
	}
	if c.forAll {
		r.rounds.ask(next.revision)
	}
	return nil
}

func (r *Registry) logLeftOut(ctx context.Context, records []error) {
	for _, err := range records {
		r.log.LogAttrs(ctx, slog.LevelError, "record cannot be read and is left out", slog.Any("err", err))
	}
}

// relist replaces the picture; every stream gets a full listing.
func (r *Registry) relist(ctx context.Context) error {
	r.log.LogAttrs(ctx, slog.LevelWarn, "registry fell behind the store and lists it again")
	pic, c, err := list(ctx, r.store)
	if err != nil {
		return err
	}
	if now := r.Revision(); pic.revision < now {
		return fmt.Errorf("revision %d after %d: %w", pic.revision, now, errBackwards)
	}
	r.logLeftOut(ctx, c.leftOut)
	r.feeds.mu.Lock()
	defer r.feeds.mu.Unlock()
	all := r.feeds.all()
	for _, f := range all {
		f.mu.Lock()
		defer f.mu.Unlock()
	}
	r.publishAnew(pic)
	for _, f := range all {
		f.aliasesAnew(pic)
		f.relist()
	}
	return nil
}

// publish makes pic, which is the picture after c, the picture, and wakes those who
// wait for it.
func (r *Registry) publish(pic *picture, c change) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, gone := range c.gone {
		r.history.add(gone)
	}
	r.pic.Store(pic)
	renew(&r.changed)
	if c.heads {
		renew(&r.heads)
	}
	if c.steps {
		renew(&r.steps)
	}
}

// publishAnew is publish of a picture of which it is not known what changed.
func (r *Registry) publishAnew(pic *picture) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.history = history{known: pic.revision}
	r.pic.Store(pic)
	renew(&r.changed)
	renew(&r.heads)
	renew(&r.steps)
}

// renew wakes those who wait for the channel to be closed. r.mu is held.
func renew(signal *chan struct{}) {
	close(*signal)
	*signal = make(chan struct{})
}
