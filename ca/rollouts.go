// Rollouts of policy: when a canary is paused, and the chore that looks.

package ca

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"merlon.dev/ca/internal/store"
)

const (
	// rolloutInterval is how often what agents said is looked at, and written down,
	// where there is something new.
	rolloutInterval = 2 * time.Second
)

// tendRollouts looks after policy candidates until ctx ends.
func (p *parts) tendRollouts(ctx context.Context) error {
	tick := time.NewTicker(rolloutInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if p.service.Standing() != nil {
			continue
		}
		bounded, cancel := context.WithTimeout(ctx, choreTimeout)
		err := p.service.TendRollouts(bounded)
		cancel()
		if err != nil && ctx.Err() == nil {
			level := slog.LevelError
			if errors.Is(err, store.ErrReadOnly) || unreachable(err) {
				level = slog.LevelDebug // /ready says so
			}
			p.log.LogAttrs(ctx, level, "policy rollouts not looked after", slog.Any("err", err))
		}
	}
}
