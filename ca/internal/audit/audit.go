// Package audit keeps the CA's record of what it issued, refused and was told
// to do: one JSON object a line, each with the hash of the line before it, in
// a file that is only appended to. A record is acknowledged after fsync;
// concurrent ones share it.
//
// The chain shows what was changed or taken out of the middle. That whole
// lines were cut off at the end it cannot show: for that its head must be kept
// elsewhere.
package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

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
	// SPIFFEID is whom it is about.
	SPIFFEID string `json:"spiffe_id,omitempty"`
	EntryID  string `json:"entry_id,omitempty"`
	// Serial is that of the SVID, in lower-case hex.
	Serial string `json:"serial,omitempty"`
	// AuthorityID is the hex SKI or key ID of what signed it.
	AuthorityID string    `json:"authority_id,omitempty"`
	NotAfter    time.Time `json:"not_after,omitzero"`
	Detail      string    `json:"detail,omitempty"`
	// Reason is why it was refused.
	Reason string `json:"reason,omitempty"`
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
	file *os.File
	log  *slog.Logger
	// sync is file.Sync; a field only so that a test can let it fail.
	sync    func() error
	reserve uint64

	// fault is why the last group was not written, nil if it was.
	fault atomic.Pointer[error]

	waiting chan *pending
	written sync.WaitGroup // the writer

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
	// Logger takes what happens to the log itself. Nil discards it.
	Logger *slog.Logger
}

// Open opens the log at path, creating it (0600) on first use, and goes on
// with its chain. It cuts off a last line without its end, which was never
// acknowledged, and says so to the logger. It refuses a log whose
// last records do not verify, and one that is open already. Close it.
func Open(path string, opts Options) (*Log, error) {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	file, err := openFile(path)
	if err != nil {
		return nil, fmt.Errorf("open audit log: %w", err)
	}
	end, err := resume(file, log)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open audit log %s: %w", path, err), file.Close())
	}
	info, err := file.Stat()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open audit log %s: %w", path, err), file.Close())
	}
	ahead := newStretch(file, info.Size(), opts.ReserveBytes, log)
	l := &Log{file: file, log: log, sync: file.Sync, reserve: ahead.reserve, waiting: make(chan *pending, maxGroup)}
	l.written.Go(func() { l.write(end, ahead) })
	return l, nil
}

// openFile opens and locks the file, and makes a new one last.
func openFile(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockFile(file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

func lockFile(file *os.File) error {
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return fmt.Errorf("%s is in use by another process", file.Name())
		}
		return fmt.Errorf("lock %s: %w", file.Name(), err)
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
	p := &pending{bodies: make([][]byte, 0, len(records)), done: make(chan error, 1)}
	now := time.Now()
	for _, r := range records {
		body, err := r.encode(now)
		if err != nil {
			return fmt.Errorf("append audit record: %w", err)
		}
		p.bodies, p.size = append(p.bodies, body), p.size+len(body)
		p.refusal = p.refusal || r.Type == Refuse
	}
	if err := l.enqueue(ctx, p); err != nil {
		return err
	}
	select {
	case err := <-p.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *Log) enqueue(ctx context.Context, p *pending) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case l.waiting <- p:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close waits for what is being appended and closes the file. Later calls
// return nil.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	close(l.waiting)
	l.mu.Unlock()
	l.written.Wait()
	if err := l.file.Close(); err != nil {
		return fmt.Errorf("close audit log: %w", err)
	}
	return nil
}

// Fault says why the log takes no records, nil if it does or may again.
func (l *Log) Fault() error {
	fault := l.fault.Load()
	if fault == nil || errors.Is(*fault, ErrFull) && short(filepath.Dir(l.file.Name()), l.reserve) == nil {
		return nil
	}
	return *fault
}

// write is the only writer; it ends when waiting is closed and drained.
func (l *Log) write(end link, ahead *stretch) {
	var failed error
	var buf bytes.Buffer
	for {
		group := l.gather()
		if len(group) == 0 {
			return
		}
		if failed == nil {
			group, failed = l.flush(&buf, group, &end, ahead)
			if failed != nil {
				l.fault.Store(&failed)
				l.log.LogAttrs(context.Background(), slog.LevelError, "audit log stopped until restart",
					slog.Any("err", failed))
			}
		}
		for _, p := range group {
			p.done <- failed
		}
	}
}

// gather waits for one record and takes what else is there.
func (l *Log) gather() []*pending {
	first, open := <-l.waiting
	if !open {
		return nil
	}
	runtime.Gosched() // lets those just answered come along
	group, size := []*pending{first}, first.size
	for len(group) < maxGroup && size < maxGroupBytes {
		select {
		case p, open := <-l.waiting:
			if !open {
				return group
			}
			group, size = append(group, p), size+p.size
		default:
			return group
		}
	}
	return group
}

// flush writes those of the group that there is room for, and returns them; the
// others have been answered. An error is the end of the log.
func (l *Log) flush(buf *bytes.Buffer, group []*pending, end *link, ahead *stretch) ([]*pending, error) {
	low := ahead.room()
	fitting, next := l.compose(buf, group, *end, ahead, low)
	if len(fitting) == 0 {
		return nil, nil
	}
	n, err := l.file.Write(buf.Bytes())
	if isFull(err) {
		if err := ahead.cutBack(n); err != nil {
			return fitting, fmt.Errorf("cut off half a write to the audit log: %w", err)
		}
		l.refuse(fitting, err)
		return nil, nil
	}
	if err != nil {
		return fitting, fmt.Errorf("write audit log: %w", err)
	}
	if err := l.sync(); err != nil {
		return fitting, fmt.Errorf("sync audit log: %w", err)
	}
	*end, ahead.end = next, ahead.end+int64(n)
	l.fault.Store(nil)
	return fitting, nil
}

// compose puts the lines of those that there is room for into buf, and answers
// the others.
func (l *Log) compose(buf *bytes.Buffer, group []*pending, end link, ahead *stretch, low error) (fitting []*pending, _ link) {
	buf.Reset()
	for _, p := range group {
		if low != nil && p.refusal {
			p.done <- fmt.Errorf("%w: what is set aside is not for refusals: %v", ErrFull, low)
			continue
		}
		before, length := end, buf.Len()
		for _, body := range p.bodies {
			end = end.append(buf, body)
		}
		if low != nil && ahead.end+int64(buf.Len()) > ahead.until {
			end = before
			buf.Truncate(length)
			l.refuse([]*pending{p}, low)
			continue
		}
		fitting = append(fitting, p)
	}
	return fitting, end
}

// refuse answers those for which there is no room.
func (l *Log) refuse(group []*pending, reason error) {
	err := fmt.Errorf("%w: %v", ErrFull, reason)
	l.fault.Store(&err)
	for _, p := range group {
		p.done <- err
	}
}
