// The files of a log. What is written now is at the log's path; when that has
// grown, or is old, it gets the number of its first record into its name
// (audit-00000000000000000001.jsonl) and the next one goes on with the chain.

package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"merlon.dev/sdk/durable"
)

const (
	// maxSegment is how large a file grows; a log that keeps less has smaller
	// ones, of which maxParts fit.
	maxSegment = 64 << 20
	maxParts   = 8

	firstDigits = 20
	nextSuffix  = ".next"
)

// segment is one file of a log.
type segment struct {
	path  string
	first uint64 // its first record; 0 where it has none yet
}

// split takes the extension off, for the names of what lies beside the log.
func split(path string) (stem, ext string) {
	ext = filepath.Ext(path)
	return strings.TrimSuffix(path, ext), ext
}

func rotatedPath(path string, first uint64) string {
	stem, ext := split(path)
	return fmt.Sprintf("%s-%0*d%s", stem, firstDigits, first, ext)
}

// rotated lists the files that are written no more, oldest first.
func rotated(path string) ([]segment, error) {
	stem, ext := split(path)
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("list the files of the audit log: %w", err)
	}
	var segments []segment
	for _, e := range entries {
		digits, ok := strings.CutPrefix(e.Name(), filepath.Base(stem)+"-")
		digits, whole := strings.CutSuffix(digits, ext)
		first, err := strconv.ParseUint(digits, 10, 64)
		if ok && whole && err == nil && len(digits) == firstDigits {
			segments = append(segments, segment{filepath.Join(filepath.Dir(path), e.Name()), first})
		}
	}
	slices.SortFunc(segments, func(a, b segment) int { return strings.Compare(a.path, b.path) })
	return segments, nil
}

// settleRotation undoes a rotation that a crash cut off between its two steps:
// the file has both names then.
func settleRotation(path string, file *os.File) error {
	segments, err := rotated(path)
	if err != nil || len(segments) == 0 {
		return err
	}
	last := segments[len(segments)-1].path
	here, err := file.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Stat(last); err != nil || !os.SameFile(here, there) {
		return err
	}
	if err := os.Remove(last); err != nil {
		return fmt.Errorf("undo half a rotation: %w", err)
	}
	return durable.SyncDir(filepath.Dir(path))
}

// segmentBytes is the size at which a file is rotated, 0 for never.
func (o Options) segmentBytes() int64 {
	if o.MaxBytes == 0 {
		return maxSegment
	}
	return min(maxSegment, o.MaxBytes/maxParts)
}

// rotateIfDue begins a new file. When that does not work the old one goes on:
// a log that is too long is better than none.
func (l *Log) rotateIfDue(w *writer) {
	old := l.opts.MaxAge > 0 && time.Since(w.since) > l.opts.MaxAge/maxParts
	if w.end.seq+1 == w.first || w.ahead.end < w.retry || w.ahead.end < l.opts.segmentBytes() && !old {
		return
	}
	if err := l.rotate(w); err != nil {
		w.retry = w.ahead.end + l.opts.segmentBytes()/maxParts
		l.log.LogAttrs(context.Background(), slog.LevelWarn, "audit log not rotated, it grows on", slog.Any("err", err))
	}
}

// rotate gives the file its second name, and then the first to the new one, in
// one step: at no time is there no file at the log's path.
func (l *Log) rotate(w *writer) (err error) {
	next, err := os.OpenFile(l.path+nextSuffix, os.O_CREATE|os.O_TRUNC|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	name := rotatedPath(l.path, w.first)
	linked := false
	defer func() {
		if err != nil {
			err = errors.Join(err, next.Close(), os.Remove(next.Name()))
		}
		if err != nil && linked {
			err = errors.Join(err, os.Remove(name))
		}
	}()
	if err := syscall.Flock(int(next.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("lock %s: %w", next.Name(), err)
	}
	if err := os.Link(l.path, name); err != nil {
		return err
	}
	linked = true
	if err := os.Rename(next.Name(), l.path); err != nil {
		return err
	}
	linked = false // from here on it stands
	l.turn(w, next)
	return nil
}

// turn lets the writer go on in next, which is in place.
func (l *Log) turn(w *writer, next *os.File) {
	if err := errors.Join(durable.SyncDir(filepath.Dir(l.path)), w.file.Truncate(w.ahead.end), w.file.Close()); err != nil {
		l.log.LogAttrs(context.Background(), slog.LevelWarn, "file of the audit log not left in order", slog.Any("err", err))
	}
	reserve := w.ahead.reserve
	w.file, w.first, w.since, w.retry = next, w.end.seq+1, time.Now(), 0
	w.ahead = newStretch(next, 0, reserve, l.log)
}

// firstOf reads the first record of a file; nil: there is none yet.
func firstOf(file io.ReaderAt) (*header, error) {
	line, err := lineAt(file, 0)
	if err != nil || line == nil {
		return nil, err
	}
	var h header
	if err := json.Unmarshal(line, &h); err != nil || h.Seq == 0 {
		return nil, errors.New("its first line is not a record")
	}
	return &h, nil
}

// lineAt reads the line that begins at off, without its newline; nil: there is
// no whole one.
func lineAt(file io.ReaderAt, off int64) ([]byte, error) {
	for size := 4 << 10; ; size *= 4 {
		buf := make([]byte, size)
		n, err := file.ReadAt(buf, off)
		if i := bytes.IndexByte(buf[:n], '\n'); i >= 0 {
			return buf[:i], nil
		}
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if size > 2*maxLine {
			return nil, errors.New("not an audit log: a line is longer than any record")
		}
	}
}
