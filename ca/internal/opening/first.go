// Whether the store may be a new one. A CA begins one at its very first start;
// later on a store that is empty, or not there, is the wrong folder or prefix,
// or lost. What tells the two apart is what only a CA that has written its store
// leaves behind. One that was killed at its first start, between its keys and
// the first write, has left none of it, and begins again.

package opening

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"os"
	"path/filepath"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

// LostStoreError is returned by a CA whose store is empty or not there, and that
// has had one.
type LostStoreError struct {
	// Place is where the store is looked for, Proof what shows that there was one.
	Place, Proof string
}

// Error implements error.
func (e *LostStoreError) Error() string {
	return fmt.Sprintf("there is nothing in the store, %s, and this CA has had one, as %s shows", e.Place, e.Proof)
}

// proofOfStore names what shows that this CA has written its store; empty: it
// never has, as far as data_dir tells. What it looks for is in turn: the file
// that NoteEpoch makes after the first write, a record of the audit log, of
// which each comes after that write, and keys that have followed others, which
// tell even where they were brought here alone.
func proofOfStore(c config.Config) (string, error) {
	path := filepath.Join(c.DataDir, EpochFile)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("look for the last epoch: %w", err)
	}
	first, err := audit.Begin(c.AuditPath())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("look for records of this CA: %w", err)
	}
	if first > 0 {
		return c.AuditPath(), nil
	}
	return laterKeys(c), nil
}

// laterKeys is a folder of keys that have followed others; empty: there is none.
func laterKeys(c config.Config) string {
	for _, second := range []string{"intermediate-2", "jwt-2", "root-2"} {
		if path := filepath.Join(c.KeysDir(), second); fileExists(path) {
			return path
		}
	}
	return ""
}

func fileExists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// Served opens the store of a CA that is about to serve: a new one only if
// this CA never had one, or was told to begin one.
func Served(ctx context.Context, cfg config.Config) (_ store.Store, err error) {
	if cfg.NewStore {
		if cfg.AcceptOlderStore, err = beginStore(ctx, cfg); err != nil {
			return nil, fmt.Errorf("-new-store: %w", err)
		}
		return Store(ctx, cfg)
	}
	proof, err := proofOfStore(cfg)
	if err != nil {
		return nil, err
	}
	if proof == "" && cfg.JoinAddress == "" {
		return Store(ctx, cfg)
	}
	st, err := Existing(ctx, cfg)
	if err == nil {
		if err = checkWritten(ctx, st); err != nil {
			err = errors.Join(err, st.Close())
		}
	}
	switch {
	case !errors.Is(err, store.ErrNone):
		return st, err
	case proof == "":
		return nil, fmt.Errorf("join the CA: %w: it is empty", trust.ErrOtherRoot)
	default:
		return nil, &LostStoreError{cfg.StorePlace(), proof}
	}
}

// checkWritten returns store.ErrNone for a store that no CA has ever written:
// the trust bundle comes first.
func checkWritten(ctx context.Context, st store.Store) error {
	_, _, err := st.Get(ctx, trust.Key)
	if errors.Is(err, store.ErrNotFound) {
		return store.ErrNone
	}
	return err
}

// beginStore makes a new store in an epoch above all that are known of: agents
// remember the numbers of the lost one. One that is there and empty, as the
// start before left it when it was killed, is to go on in the next epoch from
// the revision that is returned.
func beginStore(ctx context.Context, cfg config.Config) (accept uint64, err error) {
	there, err := Exists(ctx, cfg)
	if err != nil {
		return 0, err
	}
	if !there {
		last, err := SeenEpoch(ctx, cfg)
		if err != nil {
			return 0, err
		}
		cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "new store, as it was told to: entries, agents and revocations of the one before are gone; start without -new-store from now on",
			slog.String("place", cfg.StorePlace()))
		return 0, Import(ctx, cfg, store.NextEpoch(last), 0, nothing)
	}
	st, err := Existing(ctx, cfg)
	if err != nil {
		return 0, err
	}
	revision, err := st.Revision(ctx)
	written := checkWritten(ctx, st)
	if err := errors.Join(err, st.Close()); err != nil {
		return 0, err
	}
	switch {
	case errors.Is(written, store.ErrNone):
		return revision, nil
	case written != nil:
		return 0, written
	}
	return 0, fmt.Errorf("there is a store already, %s, at revision %d; nothing was changed: start without -new-store", cfg.StorePlace(), revision)
}

var nothing iter.Seq2[store.KV, error] = func(func(store.KV, error) bool) {}
