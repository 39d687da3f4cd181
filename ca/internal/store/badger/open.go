package badger

// Opening a store.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	bdg "github.com/dgraph-io/badger/v4"

	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/durable"
)

// Open opens the store in dir, creating it on first use (mode 0700, which an
// existing one is given too). It refuses a directory that another process has
// open and a format that it does not know; a store that has lost something
// that was acknowledged is refused with a *DamagedError and left as it was
// found (see Options.AcceptOlder); one that an import was to make and did not is
// store.ErrUnfinished. Close it.
func Open(dir string, opts Options) (*Store, error) {
	if opts.Existing { // before a folder is made
		if there, err := Exists(dir); err != nil || !there {
			return nil, fmt.Errorf("open store %s: %w", dir, cmp.Or(err, store.ErrNone))
		}
	}
	if err := makePrivate(dir); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	lock.sign()
	opts = opts.withDefaults()
	guard, err := newGuard(dir, opts.ReserveBytes, opts.Logger)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open store: %w", err), lock.release())
	}
	guard.watch()
	s, err := openLocked(dir, lock, guard, opts)
	if err != nil {
		guard.unwatch()
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, err), lock.release())
	}
	return s, nil
}

// makePrivate closes the directory to others, since Badger's files follow the umask,
// and makes its name durable.
func makePrivate(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // a directory needs its x
		return err
	}
	return durable.SyncDir(filepath.Dir(dir))
}

func openLocked(dir string, lock *dirLock, guard *guard, opts Options) (*Store, error) {
	if err := finishInstall(dir); err != nil {
		return nil, err
	}
	if _, err := Exists(dir); err != nil {
		return nil, err
	}
	found, err := examine(dir, opts)
	if damaged, ok := errors.AsType[*DamagedError](err); ok && opts.AcceptOlder != 0 {
		if opts.AcceptOlder != damaged.LastGood {
			damaged.Refused = opts.AcceptOlder
			return nil, damaged
		}
		if err := acceptOlder(dir, opts, damaged); err != nil {
			return nil, fmt.Errorf("accept revision %d: %w", opts.AcceptOlder, err)
		}
		found, err = examine(dir, opts)
	}
	if err == nil && opts.AcceptOlder != 0 && opts.AcceptOlder == found.tip.revision {
		if err := goOn(dir, opts); err != nil {
			return nil, fmt.Errorf("accept revision %d: %w", opts.AcceptOlder, err)
		}
		found, err = examine(dir, opts)
	}
	if err != nil {
		return nil, err
	}
	return openWhole(dir, lock, guard, opts, found)
}

// examine inspects the store in dir without changing it. A folder without one
// is begun.
func examine(dir string, opts Options) (*inspection, error) {
	head, headErr := readHead(dir)
	if headErr != nil && !errors.Is(headErr, errNoHead) {
		return nil, headErr
	}
	begun, err := hasBadger(dir)
	if err != nil {
		return nil, err
	}
	if !begun {
		return examineEmpty(dir, opts, head, headErr)
	}
	return examineCopy(dir, badgerOptions(dir, opts.Logger), head, headErr, nil)
}

// examineCopy inspects a copy, and lets more look at it too.
func examineCopy(dir string, opts bdg.Options, head headSlot, headErr error, more func(*bdg.DB, *inspection) error) (f *inspection, err error) {
	err = withScratch(dir, opts, func(db *bdg.DB) error {
		if f, err = inspect(db, head, headErr); err != nil || more == nil {
			return err
		}
		return more(db, f)
	})
	if unreadable, ok := errors.AsType[*openError](err); ok {
		f = &inspection{head: head, headErr: headErr, reason: unreadable.Error(), noData: true}
		return f, f.damage(dir)
	}
	if err != nil {
		return nil, err
	}
	return f, f.damage(dir)
}

// examineEmpty judges a folder in which Badger has nothing yet. The head of a
// new store comes first: a database without one is a store that lost it.
func examineEmpty(dir string, opts Options, last headSlot, headErr error) (*inspection, error) {
	f := &inspection{head: last, headErr: headErr}
	if headErr == nil || opts.Existing {
		f.empty()
		return f, f.damage(dir)
	}
	if _, err := os.Stat(filepath.Join(dir, headName)); err == nil {
		// Torn when it was made: nothing was ever in it, as far as the caller knows.
		if err := os.Remove(filepath.Join(dir, headName)); err != nil {
			return nil, err
		}
	}
	h, err := openHead(dir, headSlot{})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(h.write(point{}, false), h.close(), durable.SyncDir(dir)); err != nil {
		return nil, err
	}
	f.head, f.headErr = headSlot{serial: h.serial}, nil
	return f, nil
}

// hasBadger tells whether anything of a database is in dir.
func hasBadger(dir string) (bool, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	for _, file := range files {
		name := file.Name()
		if name == bdg.ManifestFilename || strings.HasSuffix(name, tableExt) || strings.HasSuffix(name, memExt) {
			return true, nil
		}
	}
	return false, nil
}

// openWhole opens a store that was found whole, or one that is yet to be laid
// out, and starts it.
func openWhole(dir string, lock *dirLock, guard *guard, opts Options, found *inspection) (*Store, error) {
	if err := errors.Join(dropUseless(dir), dropStaged(dir)); err != nil {
		return nil, err
	}
	db, err := openDB(badgerOptions(dir, opts.Logger).WithLogger(gate{logger{opts.Logger}, guard}))
	if err != nil {
		return nil, err
	}
	s := newStore(dir, lock, db, opts)
	s.guard = guard
	if err := s.load(found); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	s.running.Go(s.commitLoop)
	s.running.Go(s.publishLoop)
	return s, nil
}

func newStore(dir string, lock *dirLock, db *bdg.DB, opts Options) *Store {
	return &Store{
		dir: dir, lock: lock, db: db, opts: opts,
		log:       opts.Logger,
		commitAt:  func(txn *bdg.Txn, revision uint64) error { return txn.CommitAt(revision, nil) },
		committed: make(chan committed, maxCommitted),
		requests:  make(chan *request, 2*maxBatchTxns),
		stop:      make(chan struct{}),
	}
}

// load takes up where the store stands, and acknowledges that.
func (s *Store) load(found *inspection) (err error) {
	if s.db.MaxVersion() != found.tip.revision {
		return fmt.Errorf("the store is at revision %d, and was at %d when it was inspected", s.db.MaxVersion(), found.tip.revision)
	}
	s.tip, s.compacted = found.tip, found.compacted
	if s.tip.revision == 0 {
		if err := s.create(); err != nil {
			return fmt.Errorf("create: %w", err)
		}
	}
	if s.head, err = openHead(s.dir, found.head); err != nil {
		return err
	}
	if err := s.head.write(s.tip, false); err != nil {
		return errors.Join(err, s.head.close())
	}
	s.db.SetDiscardTs(s.compacted.revision)
	s.history.init(s.tip.revision, s.compacted.revision, s.opts.RecentRevisions)
	return nil
}

// create writes the first revision, which changes no key.
func (s *Store) create() error {
	txn := s.db.NewTransactionAt(0, true)
	defer txn.Discard()
	first := record{revision: 1, first: 1, last: 1}
	encoded := first.encode()
	s.compacted = origin(0, 0, 0)
	s.tip = s.compacted.next(1, encoded, change{})
	if err := errors.Join(
		txn.Set(formatKey, []byte(format)),
		txn.Set(compactedKey, encodeCompacted(s.compacted)),
		txn.Set(logKey(1), s.tip.appendLink(encoded)),
	); err != nil {
		return err
	}
	return txn.CommitAt(1, nil)
}

// acceptOlder replaces a damaged store by what of it is whole.
func acceptOlder(dir string, opts Options, damaged *DamagedError) error {
	opts.Logger.LogAttrs(context.Background(), slog.LevelError, "damaged store goes on without what is missing, as it was told to",
		slog.Uint64("last_good_revision", damaged.LastGood), slog.Uint64("first_missing", damaged.First),
		slog.Uint64("last_missing", damaged.Last), slog.String("reason", damaged.Reason))
	return goOn(dir, opts)
}

// goOn replaces a store by what of it is whole, in an epoch above all that the
// revisions that are missing can have given out. What was there is kept aside.
func goOn(dir string, opts Options) error {
	head, headErr := readHead(dir)
	_, err := examineCopy(dir, badgerOptions(dir, opts.Logger), head, headErr, func(db *bdg.DB, f *inspection) error {
		return stage(dir, opts, store.NextEpoch(max(f.highest, opts.Seen)), snapshot(db, f.tip.revision))
	})
	if _, ok := errors.AsType[*DamagedError](err); err != nil && !ok {
		return err
	}
	return install(dir)
}
