// Package audit keeps the CA's record of what it issued, refused and was told
// to do: one JSON object a line, each with the hash of the line before it, in
// files that are only appended to. A record is acknowledged after fsync;
// concurrent ones share it.
//
// Each line is also a leaf of a Merkle tree (ca/internal/merkle) whose root
// hash this replica signs, as a checkpoint. The chain shows what was changed or
// taken out of the middle; the tree shows what was cut off at the end, to
// everyone who remembers a checkpoint, and proves of one record that the log
// holds it. The tree follows the lines, so that one sync makes both last.
package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"merlon.dev/ca/internal/merkle"
	"merlon.dev/sdk/durable"
)

// Type says what kind of act a record is about.
type Type string

// The types of records.
const (
	Issue  Type = "issue"  // an SVID was signed
	Refuse Type = "refuse" // a request was refused
	Admin  Type = "admin"  // an operator changed something
	Attest Type = "attest" // a node proved itself
	Renew  Type = "renew"  // an agent renewed its SVID, or an authority its own
)

// Record is one act. Type is required; what does not apply stays zero. Strings
// may hold anything, also what an attacker sent.
type Record struct {
	// Time is when it happened; zero means when it was appended.
	Time time.Time `json:"time"`
	Type Type      `json:"type"`
	// Actor is who did it: the SPIFFE ID of a peer, or "uid:0" on the local
	// socket.
	Actor string `json:"actor,omitempty"`
	// Role is that of an administrator: "operator", "registrar of /ns/shop".
	Role string `json:"role,omitempty"`
	// ProposedBy is the administrator who proposed it, where the actor granted it.
	ProposedBy string `json:"proposed_by,omitempty"`
	// SPIFFEID is whom it is about.
	SPIFFEID string `json:"spiffe_id,omitempty"`
	EntryID  string `json:"entry_id,omitempty"`
	// Serial is that of the SVID, in lower-case hex.
	Serial string `json:"serial,omitempty"`
	// AuthorityID is the hex SKI or key ID of what signed it.
	AuthorityID string `json:"authority_id,omitempty"`
	// SignedHash is SignedHash of the SVID: it says which one was issued.
	SignedHash string `json:"signed_sha256,omitempty"`
	// KeyID is the hex subject key ID of the SVID: one that two SPIFFE IDs have
	// says that they share a key.
	KeyID    string    `json:"key_id,omitempty"`
	NotAfter time.Time `json:"not_after,omitzero"`
	Detail   string    `json:"detail,omitempty"`
	// Reason is why it was refused.
	Reason string `json:"reason,omitempty"`
	// Act joins the records of one administrative act: that it begins, which is on
	// disk before anything is done, and what became of it.
	Act string `json:"act,omitempty"`
	// Pending: the act does not end with this record. Its last one does not say so.
	Pending bool `json:"pending,omitempty"`
	// DroppedThrough is the last record that retention drops by this one.
	DroppedThrough uint64 `json:"dropped_through,omitempty"`
	// CheckpointSize is that of a checkpoint which lay beside the log before.
	CheckpointSize uint64 `json:"checkpoint_size,omitempty"`
}

// ErrClosed is returned by Append once the log has been closed.
var ErrClosed = errors.New("audit log closed")

// A group that shares one fsync takes no more Appends from so many, or so many
// bytes, on.
const (
	maxGroup      = 1_024
	maxGroupBytes = 1 << 20
)

// Log appends records. It is safe for concurrent use.
type Log struct {
	path string
	log  *slog.Logger
	opts Options
	tree *merkle.Tree
	// sync is (*os.File).Sync; a field only so that a test can let it fail.
	sync func(*os.File) error

	// fault is why the last group was not written, nil if it was.
	fault atomic.Pointer[error]
	// low: the disk is below its reserve, so that only records are written.
	low atomic.Bool

	waiting chan *pending
	writer  *writer
	beyond  int64          // records that it had beyond its checkpoint when it was opened
	written sync.WaitGroup // it
	publisher

	mu     sync.RWMutex // held shared to send on waiting, alone to close it
	closed bool         // guarded by mu
}

// pending is one Append on its way to the disk.
type pending struct {
	bodies  [][]byte // each record's own JSON
	refusal bool     // one of them is
	size    int      // of all
	done    chan error
}

// Options of Open; the zero value is the default.
type Options struct {
	// ReserveBytes is how much of the disk stays free for others; a sixteenth
	// of it is set aside for the log. Zero means DefaultReserveBytes.
	ReserveBytes uint64
	// Async lets Issue return before its records are on disk.
	Async bool
	// MaxBytes and MaxAge bound what is kept; the oldest records go first. Zero
	// means that all are kept.
	MaxBytes int64
	MaxAge   time.Duration
	// Logger takes what happens to the log itself. Nil discards it.
	Logger *slog.Logger
}

// Open opens the log at path, creating it (0600) on first use, and goes on
// with its chain and its tree. It cuts off a last line without its end, which
// was never acknowledged, and says so to the logger. It refuses a log whose
// last records do not verify, one that has less than its last checkpoint or
// something else, and one that is open already. Close it.
func Open(path string, opts Options) (*Log, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.ReserveBytes == 0 {
		opts.ReserveBytes = DefaultReserveBytes
	}
	file, err := openFile(path)
	if err != nil {
		return nil, fmt.Errorf("open audit log: %w", err)
	}
	l, err := open(path, file, opts)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open audit log %s: %w", path, err), file.Close())
	}
	l.written.Go(func() { l.write(l.writer) })
	if l.tree.Unsaved() > 0 {
		l.grown()
	}
	return l, nil
}

func open(path string, file *os.File, opts Options) (*Log, error) {
	if err := settleRotation(path, file); err != nil {
		return nil, err
	}
	tree, last, err := openTree(path)
	if err != nil {
		return nil, err
	}
	end, first, err := resume(path, file, last, opts.Logger)
	if err != nil {
		return nil, err
	}
	if err := replay(path, tree, end); err != nil {
		return nil, err
	}
	if err := checkDropped(path, tree, last.Size); err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	l := &Log{
		path: path, log: opts.Logger, opts: opts, tree: tree, beyond: tree.Unsaved(), sync: (*os.File).Sync,
		writer:  &writer{file: file, first: end.seq + 1, since: time.Now(), end: end},
		waiting: make(chan *pending, maxGroup), publisher: newPublisher(),
	}
	if first != nil {
		l.writer.first, l.writer.since = first.Seq, first.Time
	}
	l.writer.ahead = newStretch(file, info.Size(), opts.ReserveBytes, opts.Logger)
	return l, nil
}

// openFile opens and locks the file, and makes a new one last.
func openFile(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockFile(file, path); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// lockFile locks the file that is at path: one that was rotated away between
// opening and locking is somebody's who has the log open.
func lockFile(file *os.File, path string) error {
	busy := fmt.Errorf("%s is in use by another process", path)
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return busy
		}
		return fmt.Errorf("lock %s: %w", path, err)
	}
	locked, err := file.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Stat(path); err != nil || !os.SameFile(there, locked) {
		return busy
	}
	return file.Chmod(0o600) // it may have been made by hand
}

// Append writes the records, next to each other and in this order, and returns
// once they are on disk. On a full disk it answers ErrFull, and nothing was
// written; while the disk is low, that is also the answer to records of which
// one is a refusal. After any other failed write or sync it fails for good:
// what a failed sync lost is not known. When ctx ends first, they may still be
// written.
func (l *Log) Append(ctx context.Context, records ...Record) error {
	p, err := l.enqueue(ctx, records)
	if err != nil {
		return err
	}
	select {
	case err := <-p.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Issue is Append for SVIDs that leave once it returns. Where the log is async
// it does not wait for the disk: what a crash, or a disk that fails, can take
// away is the batch under way. A log that has a fault takes nothing.
func (l *Log) Issue(ctx context.Context, records ...Record) error {
	if !l.opts.Async || slices.ContainsFunc(records, func(r Record) bool { return r.Type == Refuse }) {
		return l.Append(ctx, records...)
	}
	if err := l.Fault(); err != nil {
		return err
	}
	_, err := l.enqueue(ctx, records)
	return err
}

// enqueue hands the records to the writer.
func (l *Log) enqueue(ctx context.Context, records []Record) (*pending, error) {
	p := &pending{bodies: make([][]byte, 0, len(records)), done: make(chan error, 1)}
	now := time.Now()
	for _, r := range records {
		body, err := r.encode(now)
		if err != nil {
			return nil, fmt.Errorf("append audit record: %w", err)
		}
		p.bodies, p.size = append(p.bodies, body), p.size+len(body)
		p.refusal = p.refusal || r.Type == Refuse
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return nil, ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case l.waiting <- p:
		return p, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Close waits for what is being appended, signs the last checkpoint and closes
// the file. Later calls return nil.
func (l *Log) Close() error {
	l.stopPublishing() // it appends, too
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	close(l.waiting)
	l.mu.Unlock()
	l.written.Wait()
	err := l.save()
	if err := errors.Join(err, l.closeErr); err != nil {
		return fmt.Errorf("close audit log: %w", err)
	}
	return nil
}

// Low says whether the disk was below its reserve when the last records came, so
// that the log goes on in what is set aside for it.
func (l *Log) Low() bool { return l.low.Load() }

// Fault says why the log takes no records, nil if it does or may again.
func (l *Log) Fault() error {
	fault := l.fault.Load()
	if fault == nil || errors.Is(*fault, ErrFull) && short(filepath.Dir(l.path), l.opts.ReserveBytes) == nil {
		return nil
	}
	return *fault
}
