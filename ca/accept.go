// Going on with a store that is known to be older than what others have seen
// of it: -accept-older-store. It is only on the command line, so that it does
// not outlive the one start that it is for.

package ca

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/opening"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
)

// settleEpoch refuses a store of an earlier epoch than this data_dir remembers,
// says whether one has been accepted, where it was to be, and remembers its
// epoch. One of a later epoch is on record, whoever began that.
func (p *parts) settleEpoch(ctx context.Context, cfg Config) error {
	revision, err := p.store.Revision(ctx)
	if err != nil {
		return fmt.Errorf("read the store's revision: %w", err)
	}
	last, err := opening.LastEpoch(cfg)
	if err != nil {
		return err
	}
	if err := store.CheckEpoch(revision, last); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(cfg.DataDir, opening.EpochFile), err)
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
	return opening.RememberEpoch(cfg, revision)
}

// skipRealms is what a store without some of its past needs, lest nested CAs get
// realms that others had.
func (p *parts) skipRealms(ctx context.Context, cfg Config) error {
	if cfg.Nested() {
		return nil
	}
	return replica.SkipRealms(ctx, p.store, api.RealmsGiven(cfg.AuditPath()))
}

// noteStore leaves the proof that there is something in the store, and writes
// down that it was begun by force.
func (p *parts) noteStore(ctx context.Context, cfg Config) error {
	if !opening.Noted(cfg) {
		revision, err := p.store.Revision(ctx)
		if err != nil {
			return fmt.Errorf("read the store's revision: %w", err)
		}
		if err := opening.NoteEpoch(cfg, revision); err != nil {
			return err
		}
	}
	if !cfg.NewStore {
		return nil
	}
	if err := p.skipRealms(ctx, cfg); err != nil {
		return err
	}
	return p.audit.Append(ctx, audit.Record{
		Time: time.Now(), Type: audit.Admin, Actor: "ca", Detail: "begin a new store, as -new-store says, without what was in the one before",
	})
}

// openingOf says how a store was found that was just opened. One in etcd others
// may have open, too.
func openingOf(ctx context.Context, cfg Config, st store.Store) (api.Opening, error) {
	if cfg.Store == config.Etcd {
		return api.Opening{}, nil
	}
	revision, err := st.Revision(ctx)
	if err != nil {
		return api.Opening{}, fmt.Errorf("read the store's revision: %w", err)
	}
	return api.Opening{ID: rand.Text(), Revision: revision}, nil
}
