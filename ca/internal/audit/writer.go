// The one writer of a log: it takes what waits as a group, writes and syncs it
// once, adds its lines to the tree, and only then lets anybody go on.

package audit

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// writer is where the log ends. It belongs to one goroutine.
type writer struct {
	file  *os.File
	first uint64    // the file's first record, or the one that will be
	since time.Time // when that was written, or before
	end   link
	ahead *stretch
	buf   bytes.Buffer
	// retry is the size at which a rotation that did not work is tried again.
	retry int64
}

// write is the only writer; it ends when waiting is closed and drained.
func (l *Log) write(w *writer) {
	defer func() { l.closeErr = w.file.Close() }()
	var failed error
	for {
		group := l.gather()
		if len(group) == 0 {
			return
		}
		if failed == nil {
			group, failed = l.flush(w, group)
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
func (l *Log) flush(w *writer, group []*pending) ([]*pending, error) {
	low := w.ahead.room()
	l.low.Store(low != nil)
	if low == nil {
		l.rotateIfDue(w)
	}
	fitting, next := l.compose(w, group, low)
	if len(fitting) == 0 {
		return nil, nil
	}
	n, err := w.file.Write(w.buf.Bytes())
	if isFull(err) {
		if err := w.ahead.cutBack(n); err != nil {
			return fitting, fmt.Errorf("cut off half a write to the audit log: %w", err)
		}
		l.refuse(fitting, err)
		return nil, nil
	}
	if err != nil {
		return fitting, fmt.Errorf("write audit log: %w", err)
	}
	if err := l.sync(w.file); err != nil {
		return fitting, fmt.Errorf("sync audit log: %w", err)
	}
	w.end, w.ahead.end = next, w.ahead.end+int64(n)
	l.grow(w.buf.Bytes())
	l.fault.Store(nil)
	return fitting, nil
}

// grow adds lines that are on disk to the tree.
func (l *Log) grow(lines []byte) {
	for line := range bytes.Lines(lines) {
		l.tree.Add(tlog.RecordHash(line[:len(line)-1]))
	}
	l.grown()
}

// compose puts the lines of those that there is room for into the buffer, and
// answers the others.
func (l *Log) compose(w *writer, group []*pending, low error) (fitting []*pending, end link) {
	w.buf.Reset()
	end = w.end
	for _, p := range group {
		if low != nil && p.refusal {
			p.done <- fmt.Errorf("%w: what is set aside is not for refusals: %v", ErrFull, low)
			continue
		}
		before, length := end, w.buf.Len()
		for _, body := range p.bodies {
			end = end.append(&w.buf, body)
		}
		if low != nil && w.ahead.end+int64(w.buf.Len()) > w.ahead.until {
			end = before
			w.buf.Truncate(length)
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
