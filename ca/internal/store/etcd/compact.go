package etcd

// Compaction: etcd keeps every change until it is told to forget. One replica
// does that, and keeps what is younger than an hour.

import (
	"context"
	"errors"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"merlon.dev/ca/internal/store"
)

// samples is how often a KeepHistory the revision is noted.
const samples = 6

// sample says what the latest revision of etcd's was at a time.
type sample struct {
	at       time.Time
	revision int64
}

// compactInTurns waits for its turn and compacts as long as it lasts. Nothing
// is written before the first sample.
func (s *Store) compactInTurns() {
	ctx, cancel := s.untilClosed(context.Background())
	defer cancel()
	var notes []sample
	for sleep(ctx, s.cfg.KeepHistory/samples) {
		notes = s.note(ctx, notes)
		leader, err := s.Campaign(ctx, "compaction", store.CampaignTTL)
		if err != nil {
			if ctx.Err() == nil {
				s.log.LogAttrs(ctx, slog.LevelWarn, "etcd is not compacted", slog.Any("err", err))
			}
			continue
		}
		notes = s.compactUntil(ctx, leader.Lost(), notes)
	}
}

func (s *Store) compactUntil(ctx context.Context, lost <-chan struct{}, notes []sample) []sample {
	tick := time.NewTicker(s.cfg.KeepHistory / samples)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			notes = s.note(ctx, notes)
			notes = s.compactOld(ctx, notes)
		case <-lost:
			return notes
		case <-ctx.Done():
			return notes
		}
	}
}

func (s *Store) note(ctx context.Context, notes []sample) []sample {
	revision, err := s.etcdRevision(ctx)
	if err != nil {
		return notes
	}
	return append(notes, sample{time.Now(), revision})
}

// compactOld compacts to the latest sample that is old enough, and returns
// those that are younger.
func (s *Store) compactOld(ctx context.Context, notes []sample) []sample {
	old := 0
	for old < len(notes) && time.Since(notes[old].at) >= s.cfg.KeepHistory {
		old++
	}
	if old == 0 {
		return notes
	}
	to := notes[old-1].revision
	err := s.read(ctx, "compact etcd", func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.Compact(ctx, to)
		return err
	})
	switch {
	case err == nil:
		s.log.LogAttrs(ctx, slog.LevelDebug, "etcd compacted", slog.Uint64("revision", s.layout.revision(to)))
	case errors.Is(err, store.ErrCompacted): // by somebody else
	case ctx.Err() == nil:
		s.log.LogAttrs(ctx, slog.LevelWarn, "etcd is not compacted", slog.Any("err", err))
		return notes
	}
	return notes[old:]
}
