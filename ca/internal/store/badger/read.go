package badger

// Reads run on a Badger snapshot at the published revision. Managed mode does
// not pin what a snapshot reads, so each read checks afterwards that the
// compaction point has not passed it.

import (
	"context"
	"errors"
	"fmt"

	"merlon.dev/ca/internal/store"
)

// Revision implements store.Store.
func (s *Store) Revision(ctx context.Context) (uint64, error) {
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.leave()
	return s.history.latest(), ctx.Err()
}

// Get implements store.Store.
func (s *Store) Get(ctx context.Context, key string) (store.KV, uint64, error) {
	if err := s.enter(); err != nil {
		return store.KV{}, 0, err
	}
	defer s.leave()
	for {
		revision := s.history.latest()
		if err := ctx.Err(); err != nil {
			return store.KV{}, 0, err
		}
		st, err := s.read(revision, key)
		if s.history.compactedTo() > revision {
			continue // compacted under us: read again, higher
		}
		switch {
		case err != nil:
			return store.KV{}, 0, err
		case st.revision == 0:
			return store.KV{}, revision, store.ErrNotFound
		}
		return store.KV{Key: key, Value: st.value, ModRevision: st.revision}, revision, nil
	}
}

func (s *Store) read(revision uint64, key string) (state, error) {
	view := s.db.NewTransactionAt(revision, false)
	defer view.Discard()
	return readState(view, key)
}

// List implements store.Store.
func (s *Store) List(ctx context.Context, prefix, after string, limit int, atRevision uint64) ([]store.KV, uint64, bool, error) {
	if limit < 1 {
		return nil, 0, false, errors.New("list with a limit below 1")
	}
	if err := s.enter(); err != nil {
		return nil, 0, false, err
	}
	defer s.leave()
	revision := atRevision
	if revision == 0 {
		revision = s.history.latest()
	} else if err := s.listable(revision); err != nil {
		return nil, 0, false, fmt.Errorf("list %q: %w", prefix, err)
	}
	kvs, more, err := s.page(ctx, prefix, after, limit, revision)
	if s.history.compactedTo() > revision {
		return nil, 0, false, fmt.Errorf("list %q at revision %d: %w", prefix, revision, store.ErrCompacted)
	}
	if err != nil {
		return nil, 0, false, err
	}
	return kvs, revision, more, nil
}

// listable tells whether a snapshot is exactly this revision: the end of a
// batch that is still kept.
func (s *Store) listable(revision uint64) error {
	if err := s.history.resumable(revision); err != nil {
		return err
	}
	latest := s.history.latest()
	if revision == latest {
		return nil
	}
	view := s.db.NewTransactionAt(latest, false)
	defer view.Discard()
	at, _, err := readRecord(view, revision)
	switch compactErr := s.history.resumable(revision); {
	case compactErr != nil:
		return compactErr
	case s.history.compactedTo() == revision:
		return nil // the record is gone, and it was the end of a batch
	}
	if err == nil && at.last != revision {
		return fmt.Errorf("revision %d is not one that a listing returned: %w", revision, store.ErrCompacted)
	}
	return err
}

func (s *Store) page(ctx context.Context, prefix, after string, limit int, revision uint64) (kvs []store.KV, more bool, err error) {
	view := s.db.NewTransactionAt(revision, false)
	defer view.Discard()
	start := dataKey(prefix)
	it := under(view, start)
	defer it.Close()
	if after >= prefix {
		start = dataKey(after + "\x00")
	}
	for it.Seek(start); it.Valid(); it.Next() {
		if len(kvs) == limit {
			return kvs, true, nil
		}
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
		st, err := itemState(it.Item())
		if err != nil {
			return nil, false, err
		}
		key := string(it.Item().Key()[len(dataPrefix):])
		kvs = append(kvs, store.KV{Key: key, Value: st.value, ModRevision: st.revision})
	}
	return kvs, false, nil
}
