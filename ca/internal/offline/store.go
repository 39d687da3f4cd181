// Package offline is what can be done with a CA that does not run: back its store up,
// look whether that is whole, restore it, move it to the other kind of store, seal the
// keys anew; and verify the audit log, also of one that runs.
package offline

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/opening"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/store/snapshot"
)

// StoreReport says what is in a store or a backup, and whether it is whole.
type StoreReport struct {
	// Kind is "backup", "badger" or "etcd"; Place is the file, the folder or
	// the prefix.
	Kind, Place string
	// Problem says what is damaged; empty: it is whole.
	Problem string
	// Revision is the last one that is there; that of a damaged store is the
	// last good one, 0 for none.
	Revision uint64
	// MissingFirst and MissingLast are the revisions that a damaged store should
	// have; 0 where that is not known, the first alone where each may be missing.
	MissingFirst, MissingLast uint64
	Keys                      uint64
	// CreatedAt, SHA256 and Bytes are those of a backup.
	CreatedAt time.Time
	SHA256    string
	Bytes     int64
}

// Backup writes a backup of the store of cfg, which no CA may have open,
// to w.
func Backup(ctx context.Context, cfg config.Config, w io.Writer) (_ StoreReport, err error) {
	defer func() { err = opening.Hinted(err) }()
	st, err := openIdle(ctx, cfg)
	if err != nil {
		return StoreReport{}, err
	}
	s, err := snapshot.Write(ctx, w, st, cfg.Store, time.Now())
	return reportOf(s, ""), errors.Join(err, st.Close())
}

// VerifyBackup reads a whole backup file. A file that is no backup, or not
// whole, has a Problem; the error is for one that cannot be read.
func VerifyBackup(path string) (StoreReport, error) {
	f, err := os.Open(path)
	if err != nil {
		return StoreReport{}, err
	}
	defer f.Close()
	s, err := snapshot.Verify(f)
	report := reportOf(s, path)
	if damaged, ok := errors.AsType[*snapshot.DamagedError](err); ok {
		report.Problem = damaged.Error()
		report.SHA256, report.Bytes, report.Revision = "", 0, 0
		return report, nil
	}
	return report, err
}

func reportOf(s snapshot.Summary, path string) StoreReport {
	return StoreReport{
		Kind: "backup", Place: path, Revision: s.Revision, Keys: s.Keys,
		CreatedAt: s.CreatedAt, SHA256: hex.EncodeToString(s.SHA256[:]), Bytes: s.Bytes,
	}
}

// VerifyStore looks whether the store of cfg is whole. A Badger store must not
// be open; of etcd every record is read, while others may go on.
func VerifyStore(ctx context.Context, cfg config.Config) (_ StoreReport, err error) {
	defer func() { err = opening.Hinted(err) }()
	if cfg.Store != config.Etcd {
		return VerifyStoreDir(cfg.StoreDir())
	}
	st, err := opening.Existing(ctx, cfg)
	if errors.Is(err, store.ErrNone) {
		return StoreReport{}, noStore(cfg)
	}
	if err != nil {
		return StoreReport{}, err
	}
	report := StoreReport{Kind: config.Etcd, Place: cfg.StorePlace()}
	pages := snapshot.NewPages(st)
	for _, err := range pages.All(ctx) {
		if err != nil {
			report.Problem = err.Error()
			break
		}
		report.Keys++
	}
	report.Revision = pages.Revision()
	return report, st.Close()
}

// VerifyStoreDir looks whether the Badger store in dir is whole.
func VerifyStoreDir(dir string) (_ StoreReport, err error) {
	defer func() { err = opening.Hinted(err) }()
	r, err := badger.Verify(dir)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, store.ErrNone):
		return StoreReport{}, opening.WithHint(err, "a Badger store is the folder store in the CA's data_dir: merlon store verify --config FILE finds it")
	case errors.Is(err, store.ErrInUse):
		return StoreReport{}, opening.WithHint(err, "stop the CA; of one that runs, take a backup, which is a store read whole: merlon store backup FILE")
	case errors.Is(err, syscall.EROFS):
		return StoreReport{}, opening.WithHint(err, "its logs are checked in a copy beside it: mount the disk read-write, or copy the folder to one that is and verify the copy")
	case err != nil:
		return StoreReport{}, err
	}
	report := StoreReport{Kind: config.Badger, Place: dir, Revision: r.Revision, Keys: r.Keys}
	if r.Damage != nil {
		report.Problem, report.Revision = r.Damage.Error(), r.Damage.LastGood
		report.MissingFirst, report.MissingLast = r.Damage.First, r.Damage.Last
	}
	return report, nil
}

// openIdle opens a store that is there already and that nobody else uses.
func openIdle(ctx context.Context, cfg config.Config) (store.Store, error) {
	if err := checkStopped(cfg); err != nil {
		return nil, err
	}
	if cfg.Store != config.Etcd {
		return openIdleBadger(ctx, cfg)
	}
	st, err := opening.Existing(ctx, cfg)
	if errors.Is(err, store.ErrNone) {
		return nil, noStore(cfg)
	}
	if err != nil {
		return nil, err
	}
	if err := checkUnled(ctx, st, cfg); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	return st, nil
}

func openIdleBadger(ctx context.Context, cfg config.Config) (store.Store, error) {
	if there, err := badger.Exists(cfg.StoreDir()); err != nil {
		return nil, err
	} else if !there {
		return nil, noStore(cfg)
	}
	if err := opening.CheckOwner(cfg.StoreDir()); err != nil {
		return nil, err
	}
	st, err := opening.Existing(ctx, cfg)
	if errors.Is(err, store.ErrInUse) {
		return nil, opening.WithHint(err, "stop the CA; a backup of one that runs is taken through its admin socket: merlon store backup FILE")
	}
	return st, err
}

func noStore(cfg config.Config) error {
	return opening.WithHint(fmt.Errorf("there is no store in %s", cfg.StorePlace()), "name the CA's configuration with --config, or its data_dir with --data-dir")
}

// checkStopped refuses while a CA answers on the admin socket of cfg.
func checkStopped(cfg config.Config) error {
	conn, err := net.DialTimeout("unix", cfg.AdminSocket, time.Second)
	if err != nil {
		return nil
	}
	defer conn.Close()
	return opening.WithHint(fmt.Errorf("a CA runs on %s", cfg.AdminSocket), "stop it first: it must not write while its store is copied or replaced")
}

// Campaigns of live replicas end with their leases; a store that is not used
// stays at its revision.
const idleTime = 2 * time.Second

// checkUnled refuses a store in etcd that replicas use.
func checkUnled(ctx context.Context, st store.Store, cfg config.Config) error {
	kvs, before, _, err := st.List(ctx, store.LeaderPrefix, "", 1, 0)
	if err != nil {
		return err
	}
	inUse := "stop merlon-ca on every machine, and wait for half a minute where it was killed"
	if len(kvs) > 0 {
		return opening.WithHint(fmt.Errorf("a CA replica uses %s: it leads %s", cfg.StorePlace(), strings.TrimPrefix(kvs[0].Key, store.LeaderPrefix)), inUse)
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(idleTime):
	}
	after, err := st.Revision(ctx)
	if err != nil {
		return err
	}
	if after != before {
		return opening.WithHint(fmt.Errorf("%s is being written: it went from revision %d to %d", cfg.StorePlace(), before, after), inUse)
	}
	return nil
}
