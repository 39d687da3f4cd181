// Which store the CA keeps its records in. Here alone does the CA know that
// there are two.

package ca

import (
	"context"
	"crypto/rand"
	"fmt"
	"path/filepath"

	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/store/etcd"
)

// The kinds of stores.
const (
	storeBadger = "badger"
	storeEtcd   = "etcd"
)

// openStore opens the store, and begins one where there is none.
func openStore(ctx context.Context, cfg Config) (store.Store, error) {
	return openStoreOf(ctx, cfg, false)
}

// openExisting opens a store that is there; store.ErrNone: there is none.
func openExisting(ctx context.Context, cfg Config) (store.Store, error) {
	return openStoreOf(ctx, cfg, true)
}

// openStoreOf avoids an interface that holds a nil *badger.Store.
func openStoreOf(ctx context.Context, cfg Config, existing bool) (store.Store, error) {
	seen, err := lastEpoch(cfg)
	if err != nil {
		return nil, err
	}
	if cfg.Store == storeEtcd {
		if cfg.AcceptOlderStore != 0 {
			if err := etcd.NextEpoch(ctx, cfg.etcd(), cfg.AcceptOlderStore, seen); err != nil {
				return nil, err
			}
		}
		in := cfg.etcd()
		in.Existing = existing
		return etcd.Open(ctx, in)
	}
	st, err := badger.Open(cfg.storeDir(), badger.Options{
		Logger: cfg.Logger, AcceptOlder: cfg.AcceptOlderStore, Seen: seen, Existing: existing, ReserveBytes: cfg.diskReserve(),
	})
	if err != nil {
		return nil, err
	}
	return st, nil
}

// openingOf says how a store was found that was just opened. One in etcd others
// may have open, too.
func openingOf(ctx context.Context, cfg Config, st store.Store) (api.Opening, error) {
	if cfg.Store == storeEtcd {
		return api.Opening{}, nil
	}
	revision, err := st.Revision(ctx)
	if err != nil {
		return api.Opening{}, fmt.Errorf("read the store's revision: %w", err)
	}
	return api.Opening{ID: rand.Text(), Revision: revision}, nil
}

// diskReserve is disk_reserve_mib in bytes.
func (c Config) diskReserve() uint64 { return uint64(max(c.DiskReserveMiB, 0)) << 20 }

func (c Config) storeDir() string { return filepath.Join(c.DataDir, "store") }

func (c Config) etcd() etcd.Config {
	return etcd.Config{
		Endpoints: c.EtcdEndpoints, CAFile: c.EtcdCAFile, CertFile: c.EtcdCertFile, KeyFile: c.EtcdKeyFile,
		Prefix: c.EtcdPrefix, Logger: c.Logger,
	}
}
