// Moving a store from one kind to the other. Nothing is lost on the way: keys,
// values and revisions stay, so that no agent notices.

package offline

import (
	"context"
	"errors"
	"fmt"

	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/opening"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/snapshot"
)

// Migrated says what was moved, or would be.
type Migrated struct {
	From, To string
	Keys     uint64
	Revision uint64
	// Done is false where only the plan was asked for.
	Done bool
}

// Migrate copies the store of from, which nobody may use, into the empty
// one of to, and compares the two. from is left as it is. With plan it only
// looks whether it could.
func Migrate(ctx context.Context, from, to config.Config, plan bool) (m Migrated, err error) {
	defer func() { err = opening.Hinted(err) }()
	m = Migrated{From: from.StorePlace(), To: to.StorePlace()}
	if m.From == m.To {
		return m, &MismatchError{"both configurations name " + m.From, "name the one that is in use with --from, and the one that is to be with --to"}
	}
	if err := checkEmpty(ctx, to); err != nil {
		return m, err
	}
	source, err := openIdle(ctx, from)
	if err != nil {
		return m, err
	}
	err = m.run(ctx, source, to, plan)
	return m, errors.Join(err, source.Close())
}

func (m *Migrated) run(ctx context.Context, source store.Store, to config.Config, plan bool) error {
	pages := snapshot.NewPages(source)
	for _, err := range sameTrustDomain(to, pages.All(ctx)) {
		if err != nil {
			return fmt.Errorf("read %s: %w", m.From, err)
		}
		m.Keys++
	}
	m.Revision = pages.Revision()
	if plan {
		return nil
	}
	if err := opening.Import(ctx, to, m.Revision, 0, snapshot.NewPages(source).All(ctx)); err != nil {
		return fmt.Errorf("copy %s: %w", m.From, err)
	}
	target, err := opening.Existing(ctx, to)
	if err != nil {
		return fmt.Errorf("look at the copy: %w", err)
	}
	if err := errors.Join(m.compare(ctx, source, target), target.Close()); err != nil {
		return opening.WithHint(fmt.Errorf("the copy is not the store: %w", err), "remove the copy, "+m.To+", and migrate again")
	}
	m.Done = true
	return nil
}

// compare reads both stores.
func (m *Migrated) compare(ctx context.Context, source, target store.Store) error {
	from, copied := snapshot.NewPages(source), snapshot.NewPages(target)
	keys, err := snapshot.Compare(from.All(ctx), copied.All(ctx))
	if err != nil {
		return err
	}
	if keys != m.Keys || from.Revision() != m.Revision {
		return fmt.Errorf("%s was written meanwhile: it went from revision %d to %d", m.From, m.Revision, from.Revision())
	}
	if copied.Revision() < m.Revision {
		return fmt.Errorf("the copy is at revision %d, and should be at %d", copied.Revision(), m.Revision)
	}
	return nil
}
