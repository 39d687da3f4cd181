// Whether others that were invited come by for our trust bundle. Each has a URL of its
// own, so that this is seen without asking readers who they are (SPIFFE Federation
// §5.2.1.3: no client authentication).

package api

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/store"
)

// keepReaders is how often what was seen is written down.
const keepReaders = 10 * time.Second

// readers are those invited who came by since it was last written down: others are not
// remembered, since anybody can make up URLs. It is safe for concurrent use.
type readers struct {
	mu   sync.Mutex
	seen map[string]reading // guarded by mu
}

type reading struct {
	at       time.Time
	sequence uint64
}

// NoteReader remembers that whoever has the URL that ends with reader was given the
// trust bundle of that sequence.
func (s *Service) NoteReader(reader string, sequence uint64) {
	if !s.registry.Invited(reader) {
		return
	}
	s.readers.mu.Lock()
	defer s.readers.mu.Unlock()
	if s.readers.seen == nil {
		s.readers.seen = make(map[string]reading)
	}
	s.readers.seen[reader] = reading{time.Now(), sequence}
}

func (r *readers) take() map[string]reading {
	r.mu.Lock()
	defer r.mu.Unlock()
	seen := r.seen
	r.seen = nil
	return seen
}

// KeepReaders writes down who came by, until ctx ends.
func (s *Service) KeepReaders(ctx context.Context) {
	tick := time.NewTicker(keepReaders)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if seen := s.readers.take(); len(seen) > 0 {
			if err := s.noteReaders(ctx, seen); err != nil && ctx.Err() == nil {
				s.opts.Log.LogAttrs(ctx, slog.LevelDebug, "readers of the trust bundle not written down", slog.Any("err", err))
			}
		}
	}
}

// noteReaders updates the invites whose URLs were read.
func (s *Service) noteReaders(ctx context.Context, seen map[string]reading) error {
	kvs, err := s.listUnder(ctx, federation.InvitePrefix)
	if err != nil {
		return err
	}
	for _, kv := range kvs {
		held, err := federation.DecodeInvite(kv)
		if err != nil {
			continue
		}
		next := held
		for _, reader := range []string{held.Previous, held.Reader} {
			if read, ok := seen[reader]; ok && held.Is(reader) && read.at.After(next.FetchedAt) {
				next = next.Saw(reader, read.sequence, read.at)
			}
		}
		if next == held {
			continue
		}
		op, err := next.Put()
		if err != nil {
			return err
		}
		// Another replica may have been faster, which is as good.
		if _, err := s.opts.Store.Txn(ctx, []store.Cmp{{Key: kv.Key, ModRevision: kv.ModRevision}}, []store.Op{op}, nil); err != nil {
			return err
		}
	}
	return nil
}
