// Retention: whole files go, the oldest first, once a checkpoint counts what is
// in them and a record says that they go. The tree keeps what proofs about the
// rest need.

package audit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"merlon.dev/sdk/durable"
)

// retain drops what is too old or too much.
func (l *Log) retain(ctx context.Context, now time.Time) error {
	segments, err := rotated(l.path)
	if err != nil || len(segments) == 0 {
		return err
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
	if err := l.save(); err != nil {
		return err
	}
	if l.tree.Size()-l.tree.Unsaved() < int64(first)-1 {
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
