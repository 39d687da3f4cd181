// Going on with a store that is known to be older than what others have seen
// of it: -accept-older-store. It is only on the command line, so that it does
// not outlive the one start that it is for.

package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
)

// settleEpoch refuses a store of an earlier epoch than this data_dir remembers,
// says whether one has been accepted, where it was to be, and remembers its
// epoch. One of a later epoch is on record, whoever began that.
func (p *parts) settleEpoch(ctx context.Context, cfg Config) error {
	revision, err := p.store.Revision(ctx)
	if err != nil {
		return fmt.Errorf("read the store's revision: %w", err)
	}
	last, err := lastEpoch(cfg)
	if err != nil {
		return err
	}
	if err := store.CheckEpoch(revision, last); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(cfg.DataDir, epochFile), err)
	}
	if last != 0 && cfg.AcceptOlderStore == 0 && store.Epoch(revision) > store.Epoch(last) {
		// Accepted, begun anew or restored, on another machine or by a start that
		// was killed before it wrote that down.
		if err := p.audit.Append(ctx, audit.Record{
			Time: time.Now(), Type: audit.Admin, Actor: "ca", Detail: fmt.Sprintf("go on with a store of a later epoch, at revision %d", revision),
		}); err != nil {
			return err
		}
	}
	if accepted := cfg.AcceptOlderStore; accepted != 0 {
		if store.Epoch(revision) <= store.Epoch(accepted) {
			return fmt.Errorf("-accept-older-store=%d: the store is whole, at revision %d; nothing was changed. If it is older than it should be: -accept-older-store=%d", accepted, revision, revision)
		}
		if store.Epoch(revision) <= store.Epoch(last) { // that was an earlier start
			p.log.LogAttrs(ctx, slog.LevelWarn, "-accept-older-store names a revision of an epoch that has ended, nothing was done: start without it",
				slog.Uint64("accepted_revision", accepted), slog.Uint64("revision", revision))
			return nil
		}
		p.log.LogAttrs(ctx, slog.LevelWarn, "older store accepted, what was written since is lost: start without -accept-older-store from now on",
			slog.Uint64("accepted_revision", accepted), slog.Uint64("revision", revision))
		if err := p.audit.Append(ctx, audit.Record{
			Time: time.Now(), Type: audit.Admin, Actor: "ca",
			Detail: fmt.Sprintf("accept the store of revision %d without what was written since, to go on above revision %d", accepted, store.EpochStart(revision)),
		}); err != nil {
			return err
		}
		if err := p.skipRealms(ctx, cfg); err != nil {
			return err
		}
	}
	return rememberEpoch(cfg, revision)
}

// skipRealms is what a store without some of its past needs, lest nested CAs get
// realms that others had.
func (p *parts) skipRealms(ctx context.Context, cfg Config) error {
	if cfg.nested() {
		return nil
	}
	return replica.SkipRealms(ctx, p.store, realmsGiven(cfg))
}

// epochFile remembers, outside of the store, the highest epoch that this
// data_dir has seen: to restore one backup twice takes two epochs.
const epochFile = "epoch"

// lastEpoch is a revision of that epoch; 0 where there is none.
func lastEpoch(cfg Config) (uint64, error) {
	path := filepath.Join(cfg.DataDir, epochFile)
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

// seenEpoch is lastEpoch, or what etcd remembers beside the prefix if that is
// higher: a data_dir belongs to one machine, and a restore may run on another.
func seenEpoch(ctx context.Context, cfg Config) (uint64, error) {
	last, err := lastEpoch(cfg)
	if err != nil || cfg.Store != storeEtcd {
		return last, err
	}
	seen, err := etcd.LastEpoch(ctx, cfg.etcd())
	return max(last, seen), err
}

// rememberEpoch notes that the store is at revision, where its epoch is a new
// one.
func rememberEpoch(cfg Config, revision uint64) error {
	last, err := lastEpoch(cfg)
	if err != nil || store.Epoch(revision) <= store.Epoch(last) {
		return err
	}
	return writeEpoch(cfg, revision)
}
