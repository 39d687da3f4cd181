// Package opening opens the store and the audit log of a CA, and says whether they
// may be new ones, are older than what others have seen, or belong to somebody else:
// what merlon-ca asks before it serves, and merlon store before it works on them.
package opening

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"

	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/store/etcd"
)

// Store opens the store, and begins one where there is none.
func Store(ctx context.Context, cfg config.Config) (store.Store, error) {
	return open(ctx, cfg, false)
}

// Existing opens a store that is there; store.ErrNone: there is none.
func Existing(ctx context.Context, cfg config.Config) (store.Store, error) {
	return open(ctx, cfg, true)
}

// open avoids an interface that holds a nil *badger.Store.
func open(ctx context.Context, cfg config.Config, existing bool) (store.Store, error) {
	seen, err := LastEpoch(cfg)
	if err != nil {
		return nil, err
	}
	if cfg.Store == config.Etcd {
		if cfg.AcceptOlderStore != 0 {
			if err := etcd.NextEpoch(ctx, cfg.EtcdStore(), cfg.AcceptOlderStore, seen); err != nil {
				return nil, err
			}
		}
		in := cfg.EtcdStore()
		in.Existing = existing
		return etcd.Open(ctx, in)
	}
	st, err := badger.Open(cfg.StoreDir(), badger.Options{
		Logger: cfg.Logger, AcceptOlder: cfg.AcceptOlderStore, Seen: seen, Existing: existing, ReserveBytes: cfg.DiskReserve(),
	})
	if err != nil {
		return nil, err
	}
	return st, nil
}

// Exists says whether there is a store to open; what a restore has left
// unfinished is none.
func Exists(ctx context.Context, cfg config.Config) (bool, error) {
	if cfg.Store == config.Etcd {
		return etcd.Exists(ctx, cfg.EtcdStore())
	}
	there, err := badger.Exists(cfg.StoreDir())
	if errors.Is(err, store.ErrUnfinished) {
		return false, nil
	}
	return there, err
}

// Import fills the empty store of cfg with about size bytes, 0 if that is
// not known.
func Import(ctx context.Context, cfg config.Config, at, size uint64, pairs iter.Seq2[store.KV, error]) error {
	last, err := SeenEpoch(ctx, cfg)
	if err != nil {
		return err
	}
	if err := store.CheckEpoch(at, last); err != nil {
		return err
	}
	if cfg.Store == config.Etcd {
		return etcd.Import(ctx, cfg.EtcdStore(), at, pairs)
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("make data_dir: %w", err)
	}
	return badger.Import(cfg.StoreDir(), badger.Options{Logger: cfg.Logger, ReserveBytes: cfg.DiskReserve(), ImportBytes: size}, at, pairs)
}
