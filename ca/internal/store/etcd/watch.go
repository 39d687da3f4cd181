package etcd

// Watches. Each has a stream of its own, read as fast as its reader takes
// batches: flow control stops etcd, so nothing piles up here for a reader that
// is slow. Broken streams are resumed where they were, by another member.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"merlon.dev/ca/internal/store"
)

const maxResumeDelay = time.Second

// errUnreadable is a change whose record is damaged, or of another format.
var errUnreadable = errors.New("change cannot be read")

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, prefix string, afterRevision uint64) (<-chan store.Batch, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.leave()
	cursor, err := s.resumable(ctx, prefix, afterRevision)
	if err != nil {
		return nil, err
	}
	w := &watch{store: s, prefix: prefix, cursor: cursor, ch: make(chan store.Batch, 16)}
	s.running.Go(func() {
		defer close(w.ch)
		w.follow(ctx)
	})
	return w.ch, nil
}

// resumable returns etcd's revision from which the store's is followed.
func (s *Store) resumable(ctx context.Context, prefix string, after uint64) (int64, error) {
	what := fmt.Sprintf("watch %q from revision %d", prefix, after)
	if after < s.layout.first {
		if s.layout.Imported {
			return 0, fmt.Errorf("%s: the store was imported at revision %d: %w", what, s.layout.first, store.ErrCompacted)
		}
		after = s.layout.first // nothing is below
	}
	cursor := s.layout.native(after)
	if cursor == 0 {
		return 0, fmt.Errorf("%s: it was lost when the store was put back: %w", what, store.ErrCompacted)
	}
	err := s.read(ctx, what, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.Get(ctx, s.keys.layout(), clientv3.WithCountOnly(), clientv3.WithRev(cursor))
		return err
	})
	return cursor, err
}

// watch belongs to one goroutine.
type watch struct {
	store   *Store
	prefix  string
	cursor  int64 // etcd's revision of the last batch
	ch      chan store.Batch
	pending []*mvccpb.Event // of one revision that is not complete yet
}

// follow sends what lies above the cursor until ctx or the store ends, or the
// cursor has been compacted away.
func (w *watch) follow(ctx context.Context) {
	ctx, cancel := w.store.untilClosed(ctx)
	defer cancel()
	for delay := retryDelay; ; {
		before := w.cursor
		err := w.stream(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, store.ErrCompacted), errors.Is(err, errUnreadable):
			w.log(ctx, slog.LevelWarn, "watch ended, its reader must list again", err)
			return
		}
		w.log(ctx, slog.LevelDebug, "watch interrupted", err)
		if w.cursor > before {
			delay = retryDelay
		}
		if !sleep(ctx, delay) {
			return
		}
		delay = min(2*delay, maxResumeDelay)
	}
}

func (w *watch) log(ctx context.Context, level slog.Level, message string, err error) {
	w.store.log.LogAttrs(ctx, level, message, //nolint:sloglint // two constants
		slog.String("prefix", w.prefix), slog.Uint64("revision", w.store.layout.revision(w.cursor)), slog.Any("err", err))
}

// stream follows one member until it fails.
func (w *watch) stream(ctx context.Context) error {
	m := w.store.members.pick()
	attempt, cancel := m.while(ctx)
	defer cancel()
	stream, err := w.open(attempt, m)
	for err == nil {
		var res *pb.WatchResponse
		if res, err = stream.Recv(); err == nil {
			err = w.take(ctx, res)
		}
	}
	if ctx.Err() == nil && faultOf(err) != permanent {
		w.store.members.leave(m)
	}
	return err
}

func (w *watch) open(ctx context.Context, m *member) (pb.Watch_WatchClient, error) {
	connecting, stop := context.WithTimeout(ctx, connectTimeout)
	defer stop()
	if err := m.connected(connecting); err != nil {
		return nil, err
	}
	stream, err := pb.NewWatchClient(m.client.ActiveConnection()).Watch(clientv3.WithRequireLeader(ctx), grpc.MaxCallRecvMsgSize(math.MaxInt32))
	if err != nil {
		return nil, err
	}
	w.pending = nil
	from, end := w.store.keys.under(w.prefix)
	return stream, stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte(from), RangeEnd: []byte(end), StartRevision: w.cursor + 1, PrevKv: true, Fragment: true,
	}}})
}

// take sends on what a response completes.
func (w *watch) take(ctx context.Context, res *pb.WatchResponse) error {
	switch {
	case res.CompactRevision != 0:
		return fmt.Errorf("etcd was compacted to its revision %d: %w", res.CompactRevision, store.ErrCompacted)
	case res.Canceled:
		return fmt.Errorf("etcd ended the watch: %s", res.CancelReason)
	}
	for _, ev := range res.Events {
		if len(w.pending) > 0 && w.pending[0].Kv.ModRevision != ev.Kv.ModRevision {
			if err := w.flush(ctx); err != nil {
				return err
			}
		}
		w.pending = append(w.pending, ev)
	}
	if res.Fragment {
		return nil // the last revision may go on
	}
	return w.flush(ctx)
}

// flush sends the pending revision.
func (w *watch) flush(ctx context.Context) error {
	if len(w.pending) == 0 {
		return nil
	}
	at := w.pending[0].Kv.ModRevision
	b := store.Batch{Revision: w.store.layout.revision(at)}
	for _, ev := range w.pending {
		e, err := w.event(ev)
		if err != nil {
			return err
		}
		b.Events = append(b.Events, e)
	}
	w.pending = nil
	if at <= w.cursor {
		return nil
	}
	select {
	case w.ch <- b:
		w.cursor = at
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *watch) event(ev *mvccpb.Event) (store.Event, error) {
	e := store.Event{Delete: ev.Type == mvccpb.Event_DELETE}
	if e.Delete {
		e.KV = store.KV{Key: w.store.keys.strip(ev.Kv.Key), ModRevision: w.store.layout.revision(ev.Kv.ModRevision)}
	} else {
		kv, err := w.store.keyValue(ev.Kv)
		if err != nil {
			return store.Event{}, fmt.Errorf("%w: %w", errUnreadable, err)
		}
		e.KV = kv
	}
	if ev.PrevKv != nil {
		prev, err := w.store.keyValue(ev.PrevKv)
		if err != nil {
			return store.Event{}, fmt.Errorf("%w: %w", errUnreadable, err)
		}
		e.Prev = prev.Value
		return e, nil
	}
	if e.Delete || ev.Kv.CreateRevision != ev.Kv.ModRevision {
		// There was a value before: etcd no longer has it.
		return store.Event{}, fmt.Errorf("the value before revision %d of %q: %w", e.KV.ModRevision, e.KV.Key, store.ErrCompacted)
	}
	return e, nil
}
