// Epochs: a store that lost its past goes on above all that anybody has seen, and
// data_dir remembers the highest that it was in.

package opening

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/sdk/durable"
)

// EpochFile remembers, outside of the store, the highest epoch that this
// data_dir has seen: to restore one backup twice takes two epochs.
const EpochFile = "epoch"

// LastEpoch is a revision of that epoch; 0 where there is none.
func LastEpoch(cfg config.Config) (uint64, error) {
	path := filepath.Join(cfg.DataDir, EpochFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read the last epoch: %w", err)
	}
	revision, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read the last epoch: %s: %w", path, err)
	}
	return revision, nil
}

// SeenEpoch is LastEpoch, or what etcd remembers beside the prefix if that is
// higher: a data_dir belongs to one machine, and a restore may run on another.
func SeenEpoch(ctx context.Context, cfg config.Config) (uint64, error) {
	last, err := LastEpoch(cfg)
	if err != nil || cfg.Store != config.Etcd {
		return last, err
	}
	seen, err := etcd.LastEpoch(ctx, cfg.EtcdStore())
	return max(last, seen), err
}

// RememberEpoch notes that the store is at revision, where its epoch is a new
// one.
func RememberEpoch(cfg config.Config, revision uint64) error {
	last, err := LastEpoch(cfg)
	if err != nil || store.Epoch(revision) <= store.Epoch(last) {
		return err
	}
	return NoteEpoch(cfg, revision)
}

// NoteEpoch writes the file that LastEpoch reads.
func NoteEpoch(cfg config.Config, revision uint64) error {
	if err := durable.WriteFile(cfg.DataDir, EpochFile, fmt.Appendf(nil, "%d\n", revision)); err != nil {
		return fmt.Errorf("remember the epoch: %w", err)
	}
	return nil
}

// Noted says whether data_dir remembers an epoch: there has been a store.
func Noted(cfg config.Config) bool { return fileExists(filepath.Join(cfg.DataDir, EpochFile)) }
