package etcd

// A store that was put back to an earlier state goes on in the next epoch: from
// one of etcd's revisions on, another base is added.

import (
	"context"
	"fmt"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	"merlon.dev/ca/internal/store"
)

// Exists says whether there is a store that can be opened, or one of a kind
// that cannot; what an import left is none.
func Exists(ctx context.Context, cfg Config) (there bool, err error) {
	s, err := connect(ctx, cfg)
	if err != nil {
		return false, err
	}
	defer s.disconnect()
	m, err := s.readMarks(ctx)
	return m.laid != nil && !m.importing, err
}

// LastEpoch is a revision of the highest epoch that a store under the prefix
// ever had, also one that has been removed; 0: the first.
func LastEpoch(ctx context.Context, cfg Config) (uint64, error) {
	s, err := connect(ctx, cfg)
	if err != nil {
		return 0, err
	}
	defer s.disconnect()
	m, err := s.readMarks(ctx)
	return m.seen, err
}

// NextEpoch makes the store, which nobody may use and which must be at
// revision, go on in the next epoch, above that of seen too; every ModRevision
// stays. A store that is in a later epoch than revision already is left alone.
func NextEpoch(ctx context.Context, cfg Config, revision, seen uint64) error {
	s, err := connect(ctx, cfg)
	if err != nil {
		return err
	}
	defer s.disconnect()
	if err := s.nextEpoch(ctx, revision, seen); err != nil {
		return fmt.Errorf("accept revision %d of the store in etcd: %w", revision, err)
	}
	return nil
}

func (s *Store) nextEpoch(ctx context.Context, revision, seen uint64) error {
	m, err := s.readMarks(ctx)
	if err != nil {
		return err
	}
	if m.laid == nil {
		return fmt.Errorf("there is no store under %s", s.keys.prefix)
	}
	l, err := s.decodeLayout(m.laid)
	if err != nil {
		return err
	}
	at := l.revision(m.now)
	switch {
	case store.Epoch(at) > store.Epoch(revision):
		return nil
	case at != revision:
		return fmt.Errorf("it is at revision %d; nothing was changed", at)
	}
	first := store.NextEpoch(max(at, seen, m.seen))
	next := l.layoutRecord
	next.Past = append(slices.Clone(l.Past), pastBase{Base: l.Base, Until: m.now})
	next.Base = first - uint64(m.now)
	ops, err := s.putLayout(next, first, m.seen)
	if err != nil {
		return err
	}
	return s.writeEpoch(ctx, m.laid.ModRevision, m.now, ops)
}

// writeEpoch replaces the layout, if nobody has written since etcd's revision
// now, and nobody leads.
func (s *Store) writeEpoch(ctx context.Context, before, now int64, ops []clientv3.Op) error {
	key, lead := s.keys.layout(), s.keys.data(store.LeaderPrefix)
	res, err := s.commit(ctx, []clientv3.Cmp{
		compare(key, before),
		clientv3.Compare(clientv3.ModRevision(s.keys.prefix), "<", now+1).WithPrefix(),
		clientv3.Compare(clientv3.CreateRevision(lead), "=", 0).WithPrefix(),
	}, ops, nil)
	if err != nil {
		return err
	}
	if !res.Succeeded {
		return fmt.Errorf("a CA replica uses it: stop merlon-ca on every machine, and wait for half a minute where it was killed")
	}
	return nil
}
