// What replicas signed that a restore left out.

package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
)

// resealFormer signs again what replicas signed that a restore left out, and
// forgets them. A bundle for which that does not work is no reason not to serve;
// the next start tries it once more.
func (p *parts) resealFormer(ctx context.Context, now time.Time) {
	former, err := replica.Former(ctx, p.store)
	errs := []error{err}
	for _, rec := range former {
		errs = append(errs, p.resealOne(ctx, rec, now))
	}
	if err := errors.Join(errs...); err != nil {
		p.log.LogAttrs(ctx, slog.LevelError, "policy bundles of replicas that a restore left out not signed again: merlon policy push each that is named", slog.Any("err", err))
	}
}

func (p *parts) resealOne(ctx context.Context, rec *replica.Record, now time.Time) error {
	// A key that the root does not vouch for has signed nothing that counts.
	if key, err := rec.PolicyKey(p.keys.Anchors(), now); err == nil {
		renewed, err := p.reseal(ctx, key)
		if err := p.recordRenewed(ctx, now, renewed, err); err != nil {
			return fmt.Errorf("sign the policy bundles of former replica %s again: %w", rec.Name, err)
		}
	}
	cmp, forget := rec.Forget()
	_, err := p.store.Txn(ctx, []store.Cmp{cmp}, []store.Op{forget}, nil)
	return err
}
