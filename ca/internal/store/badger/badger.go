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
//
// Badger repairs what it opens and drops what it cannot read. What was
// acknowledged is therefore also said elsewhere: in a hash chain over the
// revision log, in sums over the data, and in a head beside Badger's files
// (layout.go). Open compares them all, and refuses a store that has lost
// something.
package badger

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	bdg "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"merlon.dev/ca/internal/store"
)

// Defaults of Options.
const (
	DefaultKeepRevisions   = 100_000
	DefaultRecentRevisions = 4_096
)

// Options of Open; the zero value is the default.
type Options struct {
	// KeepRevisions is how many revisions stay on disk for watchers that
	// resume and listings that go on. Zero means DefaultKeepRevisions.
	KeepRevisions uint64
	// RecentRevisions is how many of them are also kept in memory (within
	// 8 MiB), so that a watcher that keeps up never reads the disk. Zero means
	// DefaultRecentRevisions.
	RecentRevisions int
	// AcceptOlder is the last good revision of a store that is known to be
	// damaged (DamagedError), or the revision of one that is whole and known to
	// be older than what others have seen of it: Open goes on from there, in
	// the next epoch, and gives up what is missing. Any other revision does
	// nothing to a store that is whole.
	AcceptOlder uint64
	// Seen is the highest revision that is known from elsewhere: what AcceptOlder
	// opens goes on in an epoch above that of Seen, too.
	Seen uint64
	// Existing makes Open refuse, with store.ErrNone, to begin a new store.
	Existing bool
	// ReserveBytes is how much of the disk stays free: below it Txn answers
	// ErrReadOnly. Zero means DefaultReserveBytes.
	ReserveBytes uint64
	// ImportBytes is about how much Import will write; zero: that is not known. It
	// does not begin what does not fit above the reserve.
	ImportBytes uint64
	// Logger takes what Badger reports, at debug and warn. Nil discards it.
	Logger *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.KeepRevisions == 0 {
		o.KeepRevisions = DefaultKeepRevisions
	}
	if o.RecentRevisions <= 0 {
		o.RecentRevisions = DefaultRecentRevisions
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// Store implements store.Store.
type Store struct {
	dir   string
	lock  *dirLock
	db    *bdg.DB
	guard *guard
	head  *head
	log   *slog.Logger
	opts  Options
	// commitAt makes a batch durable; a field only so that a test can let a
	// sync fail.
	commitAt func(txn *bdg.Txn, revision uint64) error

	// The committer's: how far Badger is, published or not.
	tip, compacted point

	history history
	failed  atomic.Pointer[error] // why nothing is written any more

	committed chan committed // from the committer to the publisher
	requests  chan *request
	stop      chan struct{}  // closed by Close: watchers and campaigns end
	running   sync.WaitGroup // committer, publisher and every watcher

	// gate is held shared by every use of the database outside the committer,
	// and alone by Close while it shuts the door: Badger unmaps its files when
	// it closes, and a late read would fault.
	gate   sync.RWMutex
	closed bool // guarded by gate

	campaigns campaigns
}

var _ store.Store = (*Store)(nil)

// badgerOptions keeps a small CA small: without compression and encryption
// blocks are read from the mapped table and need no cache.
func badgerOptions(dir string, log *slog.Logger) bdg.Options {
	return bdg.DefaultOptions(dir).
		WithSyncWrites(true).
		WithLogger(logger{log}).
		WithMetricsEnabled(false). // Badger's are global expvars
		WithDetectConflicts(false).
		WithMemTableSize(memTableBytes). // a batch may be 15 % of it: see limits.go
		WithNumMemtables(2).
		WithNumCompactors(2).
		WithNumGoroutines(1).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithIndexCacheSize(0).
		WithValueThreshold(1 << 20).
		WithValueLogFileSize(1 << 20). // empty, but mapped and synced with every batch
		// Tables are verified whole before they are opened (tables.go). Not by
		// Badger: an iterator that meets a bad block ends as if it were the last.
		WithChecksumVerificationMode(options.NoVerification)
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
	if err := s.shut(); err != nil {
		return fmt.Errorf("close store: %w", err)
	}
	return nil
}

// shut releases everything. The head says that it was done in order only if
// nothing has failed before. Where Badger cannot be closed it keeps the lock.
func (s *Store) shut() error {
	err := s.closeDB()
	if errors.Is(err, errLeftOpen) {
		return err
	}
	if err == nil && s.failed.Load() == nil {
		err = s.head.write(s.tip, true)
	}
	return errors.Join(err, s.head.close(), s.lock.release())
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
