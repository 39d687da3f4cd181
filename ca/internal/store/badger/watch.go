package badger

// Watches. Each has a goroutine with a cursor of its own, so that a reader who
// does not read stops nobody else.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"merlon.dev/ca/internal/store"
)

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, prefix string, afterRevision uint64) (<-chan store.Batch, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.leave()
	if err := s.history.resumable(afterRevision); err != nil {
		return nil, fmt.Errorf("watch %q: %w", prefix, err)
	}
	ch := make(chan store.Batch, 16)
	// Close waits for it: entered means that Close has not begun to.
	s.running.Go(func() {
		defer close(ch)
		s.follow(ctx, prefix, afterRevision, ch)
	})
	return ch, nil
}

// follow sends what lies above cursor until ctx or the store ends, or the
// cursor has been compacted away.
func (s *Store) follow(ctx context.Context, prefix string, cursor uint64, ch chan<- store.Batch) {
	for {
		records, err := s.wait(ctx, cursor)
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, store.ErrClosed) {
				s.log.LogAttrs(ctx, slog.LevelWarn, "watch ended, its reader must list again",
					slog.String("prefix", prefix), slog.Uint64("revision", cursor), slog.Any("err", err))
			}
			return
		}
		for _, r := range records {
			cursor = r.revision
			if !s.send(ctx, ch, r, prefix) {
				return
			}
		}
	}
}

// wait returns the next records above cursor, at least one.
func (s *Store) wait(ctx context.Context, cursor uint64) ([]record, error) {
	for {
		records, onDisk, changed := s.history.after(cursor)
		switch {
		case onDisk:
			return s.readLog(cursor)
		case len(records) > 0:
			return records, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.stop:
			return nil, store.ErrClosed
		}
	}
}

// send delivers what of r lies under prefix, if anything; false: stop.
func (s *Store) send(ctx context.Context, ch chan<- store.Batch, r record, prefix string) bool {
	b := store.Batch{Revision: r.revision}
	for _, e := range r.events {
		if strings.HasPrefix(e.KV.Key, prefix) {
			b.Events = append(b.Events, cloneEvent(e))
		}
	}
	if len(b.Events) == 0 {
		return true
	}
	select {
	case ch <- b:
		return true
	case <-ctx.Done():
	case <-s.stop:
	}
	return false
}
