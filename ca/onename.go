// One CA runs under one replica's name. A keys folder that was copied makes two
// of them, which would write one record in turns; while both reach the store,
// one of them notices, and ends.

package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"merlon.dev/ca/internal/store"
)

// namePatience is how many TTLs a name may be somebody else's: one passes after a
// CA that was killed, and is started again.
const namePatience = 3

// errOtherHolder is returned where another CA runs under this one's name.
var errOtherHolder = errors.New("another CA runs as this replica, with a copy of its keys")

// holdName holds the name of this replica until ctx ends, or another CA has it.
func (p *parts) holdName(ctx context.Context, ttl time.Duration) error {
	name := "replica-" + p.keys.Name()
	for ctx.Err() == nil {
		bounded, cancel := context.WithTimeout(ctx, namePatience*ttl)
		l, err := p.store.Campaign(bounded, name, ttl)
		cancel()
		switch {
		case err == nil:
			select {
			case <-l.Lost():
			case <-ctx.Done(): // the store gives it up when it closes
			}
			continue
		case ctx.Err() != nil, errors.Is(err, store.ErrClosed):
			return nil
		}
		// The store may just have been away. Where it was not, the key is not ours.
		if _, _, gone := p.store.Get(ctx, store.LeaderPrefix+name); gone == nil && errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("%w: %s", errOtherHolder, p.keys.Name())
		}
		p.log.LogAttrs(ctx, slog.LevelWarn, "name not held", slog.Any("err", err))
		select {
		case <-ctx.Done():
		case <-time.After(leaderRetry):
		}
	}
	return nil
}
