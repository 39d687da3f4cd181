// Rollouts of policy: when a canary is paused, and the chore that looks.

package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"merlon.dev/ca/internal/rollout"
	"merlon.dev/ca/internal/store"
)

const (
	// DefaultCanaryDeniedPerMille is the default of Config.CanaryDeniedPerMille.
	DefaultCanaryDeniedPerMille = 10
	// DefaultCanaryMinCalls is the default of Config.CanaryMinCalls.
	DefaultCanaryMinCalls = 100
	// rolloutInterval is how often what agents said is looked at, and written down,
	// where there is something new.
	rolloutInterval = 2 * time.Second
)

func (c *Config) canaryDefaults() {
	if c.CanaryDeniedPerMille == 0 {
		c.CanaryDeniedPerMille = DefaultCanaryDeniedPerMille
	}
	if c.CanaryMinCalls == 0 {
		c.CanaryMinCalls = DefaultCanaryMinCalls
	}
}

func (c Config) checkCanary() error {
	if n := c.CanaryDeniedPerMille; n < 1 || n > 1000 {
		return fmt.Errorf("canary_denied_per_mille: %d is not between 1 and 1000", n)
	}
	if n := c.CanaryMinCalls; n < 1 {
		return fmt.Errorf("canary_min_calls: %d is not at least 1", n)
	}
	return nil
}

func (c Config) canaryLimits() rollout.Limits {
	return rollout.Limits{MaxRise: float64(c.CanaryDeniedPerMille) / 1000, MinCalls: uint64(c.CanaryMinCalls)}
}

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
