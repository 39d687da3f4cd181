// Whether the others hear of this replica. While it is cut off from the store it
// renews its agents, and the others do not know that those still count: no key is
// activated or revoked without it then (rotation.View.Silent). It is heard of
// again when the store has the end of everything that it renewed.

package ca

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/store"
)

const (
	// A replica that is gone holds rotation back after its sign of life has run out.
	// Until then the records of its agents must be good: they renew at half of their
	// SVIDs' lives, and as much is left of what is recorded.
	maxHeardTTL = store.CampaignTTL
	minHeardTTL = 2 * time.Second
	// heardAttempt bounds the way from the last look at what is not noted to the
	// sign of life.
	heardAttempt = 3 * time.Second
	heardRetry   = time.Second
)

func heardTTL(agentSVIDTTL time.Duration) time.Duration {
	return min(max(agentSVIDTTL/4, minHeardTTL), maxHeardTTL)
}

// beHeard keeps a sign of life of this replica in the store until ctx ends,
// whenever all of its renewals are there.
func (p *parts) beHeard(ctx context.Context, ttl time.Duration) error {
	for ctx.Err() == nil {
		err := p.signOfLife(ctx, ttl)
		if ctx.Err() != nil || errors.Is(err, store.ErrClosed) {
			return nil
		}
		if err == nil {
			continue
		}
		p.log.LogAttrs(ctx, slog.LevelDebug, "not heard of by the other replicas yet", slog.Any("err", err))
		select {
		case <-ctx.Done():
		case <-time.After(heardRetry):
		}
	}
	return nil
}

// signOfLife is there until it is lost, or a renewal cannot be noted.
func (p *parts) signOfLife(ctx context.Context, ttl time.Duration) error {
	attempt, cancel := context.WithTimeout(ctx, heardAttempt)
	defer cancel()
	if err := p.service.NoteRenewals(attempt); err != nil {
		return err
	}
	l, err := p.store.Campaign(attempt, registry.AliveName(p.keys.Name()), ttl)
	if err != nil {
		return err
	}
	for {
		select {
		case <-l.Lost():
			return nil
		case <-ctx.Done(): // the store gives it up when it closes
			return nil
		case <-p.service.Unnoted():
		}
		noting, cancel := context.WithTimeout(ctx, heardAttempt)
		err := p.service.NoteRenewals(noting)
		cancel()
		if err != nil {
			resigning, cancel := context.WithTimeout(ctx, resignTimeout)
			defer cancel()
			return errors.Join(err, l.Resign(resigning))
		}
	}
}
