// Package store is the CA's memory: a small revisioned key-value interface
// that knows nothing of what is kept in it. Every write raises one revision
// that orders all changes; a watcher can resume from any revision that is not
// yet compacted. Two implementations pass one conformance suite (storetest).
package store

import (
	"context"
	"errors"
	"time"
)

// Errors that callers test for.
var (
	// ErrNotFound is returned by Get when no such key exists.
	ErrNotFound = errors.New("key not found")
	// ErrCompacted is returned by Watch when the changes right after the asked
	// revision are no longer kept, and by List and Watch for a revision that
	// this store's history does not have: list again, then watch from the
	// list's revision.
	ErrCompacted = errors.New("revision compacted")
	// ErrTooLarge is returned by Txn for keys, values and transactions above
	// the limits below; nothing was written.
	ErrTooLarge = errors.New("too large for the store")
	// ErrReadOnly is returned by Txn when the store cannot promise that a write
	// is durable: its disk or its quota is used up, or a sync has failed. The
	// error says which. Nothing was written, unless it is ErrUncertain too. Reads
	// go on.
	ErrReadOnly = errors.New("store is read-only")
	// ErrUncertain is returned by Txn when its own sync has failed: what it wrote
	// may or may not be there when the store is opened again.
	ErrUncertain = errors.New("whether this change was made is not known: look after a restart, before you repeat it")
	// ErrUnavailable is returned when the store cannot be reached, e.g. an etcd
	// without a quorum. What a Txn did that fails so is unknown.
	ErrUnavailable = errors.New("store unavailable")
	// ErrDamaged is returned by reads of a record that is not what was written,
	// as its checksum shows. A watch that comes upon one ends. Others can be read.
	ErrDamaged = errors.New("record damaged")
	// ErrReplaced is returned by Txn when another store is now in the place of
	// the one that was opened, or it was put into another epoch: nothing that was
	// read holds, and it has to be opened anew. Nothing was written.
	ErrReplaced = errors.New("the store was replaced by another one, or put back, since it was opened")
	// ErrInUse is returned where another process has the store open.
	ErrInUse = errors.New("data_dir in use by another merlon-ca")
	// ErrNone is returned by those who open a store that must be there already
	// where there is none.
	ErrNone = errors.New("there is no store")
	// ErrUnfinished is returned where a restore or a migration into the store was
	// broken off: what is there is no store yet. The same command goes on.
	ErrUnfinished = errors.New("a restore or a migration into it was broken off")
	// ErrClosed is returned once the store has been closed.
	ErrClosed = errors.New("store closed")
)

// KV is a key with its value. Value is owned by the receiver.
type KV struct {
	Key   string
	Value []byte
	// ModRevision is the revision of the transaction that wrote this value.
	ModRevision uint64
}

// Cmp is a condition of a transaction: the key's ModRevision is exactly
// ModRevision; 0 means that the key does not exist.
type Cmp struct {
	Key         string
	ModRevision uint64
}

// Op is one write of a transaction: a put, or a delete.
type Op struct {
	Key    string
	Value  []byte
	Delete bool
}

// Put returns an Op that sets key to value.
func Put(key string, value []byte) Op { return Op{Key: key, Value: value} }

// Delete returns an Op that removes key; removing an absent key is no error.
func Delete(key string) Op { return Op{Key: key, Delete: true} }

// TxnResult says which branch of a transaction ran, and at which revision.
type TxnResult struct {
	// Succeeded is true when all comparisons held and then was written.
	Succeeded bool
	// Revision is that of the transaction's writes; of the store, where it
	// wrote nothing, which need not be one that a watch sends.
	Revision uint64
}

// Event is one changed key.
type Event struct {
	// KV is the new state; for a delete only Key and ModRevision (the revision
	// of the delete) are set.
	KV     KV
	Delete bool
	// Prev is the value before, nil where the key did not exist.
	Prev []byte
}

// Batch holds the events of one revision that lie under the watched prefix.
// Batches arrive in order of revision, each revision at most once.
type Batch struct {
	Revision uint64
	Events   []Event
}

// LeaderPrefix begins the keys that campaigns write: leader/NAME.
const LeaderPrefix = "leader/"

// CampaignTTL is the time to live that a CA's campaigns ask for. On etcd those
// that ask for the same share a lease, and a replica is to have one.
const CampaignTTL = 15 * time.Second

// Leadership is a held campaign.
type Leadership interface {
	// Lost is closed when the leadership has been lost, at the latest when
	// another may lead. A process that was paused learns of it late: what a
	// leader writes carries Fence.
	Lost() <-chan struct{}
	// Fence is a comparison that holds as long as nobody else has led since.
	Fence() Cmp
	// Resign gives it up.
	Resign(ctx context.Context) error
}

// Store is safe for concurrent use. A write that returned without an error is
// durable. The revision of a new store is at least 1; it rises with every
// write, not always by one.
type Store interface {
	// Get returns the latest committed value (linearizable) and the store's
	// revision.
	Get(ctx context.Context, key string) (kv KV, revision uint64, err error)
	// List returns up to limit (at least 1) pairs under prefix with keys above
	// after, in order of keys. The pages of one listing share one revision:
	// pass 0 for the first page and the returned revision for the next ones;
	// ErrCompacted means begin again. Revisions that did not come from List
	// may also be answered with ErrCompacted.
	List(ctx context.Context, prefix, after string, limit int, atRevision uint64) (kvs []KV, revision uint64, more bool, err error)
	// Txn writes then if all cmps hold, otherwise otherwise, atomically, and
	// returns once that is durable. A branch must not name a key twice. It
	// takes the next revision if it changes anything: deletes of absent keys
	// alone do not. When ctx ends first, the outcome is unknown: it may still
	// be written. Slices may be reused once Txn has returned.
	Txn(ctx context.Context, cmps []Cmp, then, otherwise []Op) (TxnResult, error)
	// Watch sends every batch above afterRevision, in order, until ctx ends or
	// the store closes; then the channel is closed. A slow reader delays only
	// itself; one that falls behind the compaction point, or comes upon a damaged
	// record, finds the channel closed while ctx lives, and lists again. Watching from 0 gives all of a
	// history that has never been compacted.
	Watch(ctx context.Context, prefix string, afterRevision uint64) (<-chan Batch, error)
	// Campaign blocks until this process leads name (or ctx ends). A leader
	// that is gone is replaced after ttl.
	Campaign(ctx context.Context, name string, ttl time.Duration) (Leadership, error)
	// Revision returns the latest committed revision.
	Revision(ctx context.Context) (uint64, error)
	// Close waits for running commits and releases everything.
	Close() error
}
