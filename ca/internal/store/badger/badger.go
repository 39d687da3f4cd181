// Package badger keeps the store in an embedded Badger v4 database: one
// process, one directory, no server.
//
// Badger runs in managed mode: a batch of transactions is committed at the
// last revision it contains, so a read at a revision that List returned is a
// plain Badger snapshot, what is not yet synced is never visible (reads run at
// the published revision), and one number says what is still kept: the
// compaction point is both the start of the revision log and Badger's discard
// timestamp. A Badger version alone could not be the ModRevision, since a
// batch holds many revisions and Badger writes one transaction atomically only
// at one timestamp; therefore each value is prefixed with its revision.
//
// SyncWrites is on and no value ever reaches the value log. badger.Subscribe
// is not used: one callback that hangs would stop all commits.
package badger

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	bdg "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"merlon.dev/ca/internal/store"
)

// Defaults of Options.
const (
	DefaultKeepRevisions   = 100_000
	DefaultRecentRevisions = 4_096
)

// format is the version of the layout on disk (layout.go).
const format = "1"

// Options of Open; the zero value is the default.
type Options struct {
	// KeepRevisions is how many revisions stay on disk for watchers that
	// resume and listings that go on. Zero means DefaultKeepRevisions.
	KeepRevisions uint64
	// RecentRevisions is how many of them are also kept in memory (within
	// 8 MiB), so that a watcher that keeps up never reads the disk. Zero means
	// DefaultRecentRevisions.
	RecentRevisions int
	// Logger takes what Badger reports, at debug and warn. Nil discards it.
	Logger *slog.Logger
}

// Store implements store.Store.
type Store struct {
	db   *bdg.DB
	log  *slog.Logger
	opts Options
	// commitAt makes a batch durable; a field only so that a test can let a
	// sync fail.
	commitAt func(txn *bdg.Txn, revision uint64) error

	history history

	requests chan *request
	stop     chan struct{}  // closed by Close: watchers and campaigns end
	running  sync.WaitGroup // the committer and every watcher

	// gate is held shared by every use of the database outside the committer,
	// and alone by Close while it shuts the door: Badger unmaps its files when
	// it closes, and a late read would fault.
	gate   sync.RWMutex
	closed bool // guarded by gate

	campaigns campaigns
}

var _ store.Store = (*Store)(nil)

// Open opens the store in dir, creating it on first use (mode 0700, which an
// existing one is given too). It refuses a
// directory that another process has open, a format it does not know, and a
// store whose revision log does not fit its data. Close it.
func Open(dir string, opts Options) (*Store, error) {
	if opts.KeepRevisions == 0 {
		opts.KeepRevisions = DefaultKeepRevisions
	}
	if opts.RecentRevisions <= 0 {
		opts.RecentRevisions = DefaultRecentRevisions
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if err := makePrivate(dir); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	db, err := bdg.OpenManaged(badgerOptions(dir, opts.Logger))
	if lockedByOther(err) {
		return nil, fmt.Errorf("open store %s: data_dir in use by another merlon-ca%s", dir, lockHolder(dir))
	}
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	s := &Store{
		db:       db,
		log:      opts.Logger,
		opts:     opts,
		commitAt: func(txn *bdg.Txn, revision uint64) error { return txn.CommitAt(revision, nil) },
		requests: make(chan *request, 2*maxBatchTxns),
		stop:     make(chan struct{}),
	}
	if err := s.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, err), db.Close())
	}
	s.running.Go(s.commitLoop)
	return s, nil
}

// badgerOptions keeps a small CA small: without compression and encryption
// blocks are read from the mapped table and need no cache.
func badgerOptions(dir string, log *slog.Logger) bdg.Options {
	return bdg.DefaultOptions(dir).
		WithSyncWrites(true).
		WithLogger(logger{log}).
		WithMetricsEnabled(false). // Badger's are global expvars
		WithDetectConflicts(false).
		WithMemTableSize(16 << 20). // a batch may be 15 % of it: see limits.go
		WithNumMemtables(2).
		WithNumCompactors(2).
		WithNumGoroutines(1).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithIndexCacheSize(0).
		WithValueThreshold(1 << 20).
		WithValueLogFileSize(1 << 20). // empty, but mapped and synced with every batch
		// Tables are verified whole when they are opened. Not per block: an
		// iterator that meets a bad block ends as if it were the last one.
		WithChecksumVerificationMode(options.OnTableRead)
}

// makePrivate closes the directory to others: Badger's files follow the umask.
func makePrivate(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.Chmod(dir, 0o700) //nolint:gosec // a directory needs its x
}

// lockedByOther recognizes the error of Badger's directory lock, which does not
// wrap its cause.
func lockedByOther(err error) bool {
	return err != nil && strings.Contains(err.Error(), "Cannot acquire directory lock") &&
		strings.Contains(err.Error(), syscall.EWOULDBLOCK.Error())
}

// lockHolder names the process in Badger's pid file; empty if there is none.
func lockHolder(dir string) string {
	pid, err := os.ReadFile(filepath.Join(dir, "LOCK"))
	if err != nil || len(pid) > 16 {
		return ""
	}
	return " (pid " + strings.TrimSpace(string(pid)) + ")"
}

// load reads where the store stands, or lays a new one out.
func (s *Store) load() error {
	highest := s.db.MaxVersion()
	if highest == 0 {
		return s.create()
	}
	view := s.db.NewTransactionAt(math.MaxUint64, false)
	defer view.Discard()
	found, err := readMeta(view, formatKey)
	switch {
	case errors.Is(err, bdg.ErrKeyNotFound):
		return errors.New("a Badger database, but not a Merlon store")
	case err != nil:
		return fmt.Errorf("read format version: %w", err)
	case string(found) != format:
		return fmt.Errorf("format version %q, but this merlon-ca knows only %q: a newer one wrote it", found, format)
	}
	compacted, err := readCompacted(view)
	if err != nil {
		return err
	}
	last, err := checkLog(view, compacted)
	if err != nil {
		return err
	}
	if last != highest {
		return fmt.Errorf("damaged: data of revision %d, but the revision log ends at %d", highest, last)
	}
	s.db.SetDiscardTs(compacted)
	s.history.init(last, compacted, s.opts.RecentRevisions)
	return nil
}

// create writes the first revision, which changes no key.
func (s *Store) create() error {
	txn := s.db.NewTransactionAt(0, true)
	defer txn.Discard()
	first := record{revision: 1, first: 1}
	if err := errors.Join(
		txn.Set(formatKey, []byte(format)),
		txn.Set(logKey(1), first.encode()),
	); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if err := txn.CommitAt(1, nil); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	s.history.init(1, 0, s.opts.RecentRevisions)
	return nil
}

// Close waits for running commits, ends watches and campaigns, and releases
// the directory. Later calls return nil.
func (s *Store) Close() error {
	s.gate.Lock()
	if s.closed {
		s.gate.Unlock()
		return nil
	}
	s.closed = true
	s.gate.Unlock()

	close(s.stop)
	close(s.requests) // nothing is sent once closed is set
	s.running.Wait()
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("close store: %w", err)
	}
	return nil
}

// enter lets a reader in; it must call leave unless this returns an error.
func (s *Store) enter() error {
	s.gate.RLock()
	if s.closed {
		s.gate.RUnlock()
		return store.ErrClosed
	}
	return nil
}

func (s *Store) leave() { s.gate.RUnlock() }
