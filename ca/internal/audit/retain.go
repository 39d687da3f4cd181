// Retention: whole files go, the oldest first, once a checkpoint counts what is
// in them and a record says that they go. The tree keeps what proofs about the
// rest need.

package audit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"merlon.dev/ca/internal/merkle"
	"merlon.dev/sdk/durable"
)

// retain drops what is too old or too much.
func (l *Log) retain(ctx context.Context, now time.Time) error {
	segments, err := rotated(l.path)
	if err != nil || len(segments) == 0 || l.low.Load() {
		return err // while the disk is low no checkpoint is saved
	}
	n, why, err := l.excess(segments, now)
	if err != nil || n == 0 {
		return err
	}
	first, err := l.firstAfter(segments, n)
	if err != nil {
		return err
	}
	if err := l.Append(ctx, Record{Type: Admin, Actor: "ca", Detail: "drop old audit records: " + why, DroppedThrough: first - 1}); err != nil {
		return err
	}
	said := l.tree.Size() // with that record
	if err := l.save(); err != nil {
		return err
	}
	if l.savedSize() < said {
		return nil // the disk is low: later
	}
	for _, s := range segments[:n] {
		if err := os.Remove(s.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("drop old audit records: %w", err)
		}
	}
	if err := durable.SyncDir(filepath.Dir(l.path)); err != nil {
		return err
	}
	return l.tree.Prune(int64(first) - 1)
}

// checkDropped refuses a log that does not begin with its first record where no
// record that the checkpoint counts says that those before were dropped. That
// one is in the newest files, since what it drops is in the oldest.
func checkDropped(path string, tree *merkle.Tree, counted int64) error {
	if counted == 0 {
		return nil // the walk over it has begun with record 1
	}
	begin, err := Begin(path)
	if err != nil || begin <= 1 {
		return err
	}
	segments, err := rotated(path)
	if err != nil {
		return err
	}
	for _, s := range slices.Backward(append(segments, segment{path: path})) {
		if said, err := saysDropped(s.path, begin-1, tree, counted); said || err != nil {
			return err
		}
	}
	return fmt.Errorf("it begins with record %d, and no record that its checkpoint counts says that those before were dropped: records are missing", begin)
}

// saysDropped looks in one file for a record that says so of those through seq.
func saysDropped(path string, seq uint64, tree *merkle.Tree, counted int64) (bool, error) {
	file, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer file.Close()
	for lines := bufio.NewReaderSize(file, maxLine); ; {
		line, err := lines.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("read %s: %w", path, err)
		}
		if line = line[:len(line)-1]; !bytes.Contains(line, droppedMember) {
			continue
		}
		h, _, err := parseLine(line)
		if err != nil || h.DroppedThrough < seq || h.Seq > uint64(counted) {
			continue
		}
		if leaf, err := tree.Leaf(int64(h.Seq) - 1); err != nil || leaf == tlog.RecordHash(line) {
			return err == nil, err
		}
	}
}

var droppedMember = []byte(`"dropped_through":`)

// excess is how many files are to go, and why.
func (l *Log) excess(segments []segment, now time.Time) (n int, why string, err error) {
	sizes, total := make([]int64, len(segments)), int64(0)
	for i, s := range append(segments, segment{path: l.path}) {
		info, err := os.Stat(s.path)
		if err != nil {
			return 0, "", err
		}
		if total += info.Size(); i < len(sizes) {
			sizes[i] = info.Size()
		}
		// A file's last record is as old as its last change.
		if i < len(sizes) && i == n && l.opts.MaxAge > 0 && now.Sub(info.ModTime()) > l.opts.MaxAge {
			n, why = i+1, fmt.Sprintf("they are older than %s", l.opts.MaxAge)
		}
	}
	for i := range n {
		total -= sizes[i]
	}
	for ; l.opts.MaxBytes > 0 && n < len(sizes) && total > l.opts.MaxBytes; n++ {
		total -= sizes[n]
		why = fmt.Sprintf("there are more than %d MiB", l.opts.MaxBytes>>20)
	}
	return n, why, nil
}

// firstAfter is the first record behind the oldest n files.
func (l *Log) firstAfter(segments []segment, n int) (uint64, error) {
	if n < len(segments) {
		return segments[n].first, nil
	}
	file, err := os.Open(segments[n-1].path)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	tail, _, err := readTail(file)
	if err != nil {
		return 0, err
	}
	_, last := lastLine(tail)
	h, _, err := parseLine(last)
	return h.Seq + 1, err
}
