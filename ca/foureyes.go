// Four-eyes among replicas: the store says which of them ask for a second
// administrator, so that none can be asked who does not (ca/internal/approval).

package ca

import (
	"context"
	"errors"
	"log/slog"

	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/store"
)

// askForSecond puts down whether this replica is configured to. A store that takes no
// writes now does not keep it from starting: what it is configured to do itself, it
// does all the same.
func (p *parts) askForSecond(ctx context.Context, required bool) error {
	err := approval.Require(ctx, p.store, p.keys.Name(), required)
	if errors.Is(err, store.ErrReadOnly) {
		p.log.LogAttrs(ctx, slog.LevelWarn, "other replicas do not know yet whether this one asks for a second administrator (four_eyes): restart it when the store takes writes again", slog.Any("err", err))
		return nil
	}
	if err != nil || required {
		return err
	}
	other, err := approval.Required(ctx, p.store)
	if other != "" {
		p.log.LogAttrs(ctx, slog.LevelWarn, "four_eyes is off here and on elsewhere: acts on the CA's keys wait for a second administrator here, too", slog.String("replica", other))
	}
	return err
}
