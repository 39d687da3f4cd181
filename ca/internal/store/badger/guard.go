package badger

// The disk guard. Badger writes its log and its tables through mapped files,
// and a page that finds no block on the disk is a SIGBUS, which ends the
// process. Three things keep that away:
//
//   - room (here) refuses a batch while less than a reserve is free. Others can
//     eat the reserve between the look and the write, so it is not the last
//     word.
//   - The log that Badger turns to next is there before it is needed, with all
//     of its blocks (wal.go). A batch fills at most one.
//   - A table gets its blocks before Badger maps it, and what writes it waits
//     for them, and for its name to be durable, as long as it takes
//     (mapped_linux.go).
//
// What is written in the background needs at most 16 MiB for each of three
// memtables, and for a compaction what goes into it: some hundred MiB while a
// large store is being loaded, usually less than the default reserve.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"merlon.dev/ca/internal/store"
)

// DefaultReserveBytes is how much of the disk stays free.
const DefaultReserveBytes = 256 << 20

const (
	// reserveInodes stay free, or an eighth of what there is on a disk with
	// few: a compaction that cannot make a file loses what should be in it.
	reserveInodes = 8192
	// space is looked for so often by what waits for it.
	waitInterval = 50 * time.Millisecond
	// closePatience is how long Close waits for what waits for space.
	closePatience = 3 * time.Second
)

// diskSpace is what a file system says of itself.
type diskSpace struct {
	free     uint64 // bytes that we may use
	inodes   uint64 // that are free
	inodeMax uint64 // 0: this file system does not count them
	readOnly bool
}

// guard watches over the disk of one store.
type guard struct {
	dir     string // without links
	reserve uint64
	log     *slog.Logger

	next *nextWAL // of the committer
	low  bool     // of the committer: the last answer of room

	// waiting counts the writers of tables that wait for space.
	waiting atomic.Int32
}

// newGuard looks after dir, which exists.
func newGuard(dir string, reserve uint64, log *slog.Logger) (*guard, error) {
	absolute, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if absolute, err = filepath.EvalSymlinks(absolute); err != nil {
		return nil, err
	}
	if reserve == 0 {
		reserve = DefaultReserveBytes
	}
	return &guard{dir: absolute, reserve: reserve, log: log}, nil
}

// room says why a batch must not be written now, as a store.ErrReadOnly. Only
// the committer calls it.
func (s *Store) room() error {
	err := s.guard.check()
	if err == nil {
		err = s.guard.stock()
	}
	s.guard.note(err)
	if err != nil {
		return fmt.Errorf("%w: %w", store.ErrReadOnly, err)
	}
	return nil
}

// note logs when the disk gets low, and when it has space again.
func (g *guard) note(err error) {
	if low := err != nil; low != g.low {
		g.low = low
		if low {
			g.log.LogAttrs(context.Background(), slog.LevelError, "store is read-only", slog.Any("err", err))
		} else {
			g.log.LogAttrs(context.Background(), slog.LevelInfo, "store takes writes again", slog.String("path", g.dir))
		}
	}
}

// shortError says what the disk has too little of.
type shortError struct{ text string }

func (e *shortError) Error() string { return e.text }

func shortf(format string, args ...any) error { return &shortError{fmt.Sprintf(format, args...)} }

// check compares what is free with what must be.
func (g *guard) check() error {
	disk, err := spaceOf(g.dir)
	if err != nil {
		return fmt.Errorf("ask how much of the disk of %s is free: %v", g.dir, err)
	}
	need := g.reserve
	if g.low { // a little more, or it would change its mind with every batch
		need += need / 16
	}
	switch {
	case disk.readOnly:
		return shortf("the disk of %s is mounted read-only: mount it read-write and start again", g.dir)
	case disk.free < need:
		return shortf("the disk of %s has %s free, below its reserve of %s (disk_reserve_mib): free some space there, then writes go on by themselves",
			g.dir, mebibytes(disk.free), mebibytes(need))
	case disk.inodes < disk.inodesNeeded():
		return shortf("the disk of %s has %d inodes free, below its reserve of %d: remove some files there, then writes go on by themselves",
			g.dir, disk.inodes, disk.inodesNeeded())
	case g.waiting.Load() > 0:
		return shortf("the disk of %s has no space for what the store writes in the background: free some space there, then writes go on by themselves", g.dir)
	}
	return nil
}

// stagingRoom looks after the disk while a store is being staged. Badger ends
// the process over a table that it cannot make there, so it is stopped before.
type stagingRoom struct{ guard *guard }

// minStagingBytes are more than Badger has under way at any time while it is
// loaded: 16 tables and what they are made of.
const minStagingBytes = 96 << 20

func newRoom(dir string, opts Options) (*stagingRoom, error) {
	g, err := newGuard(dir, opts.ReserveBytes, opts.Logger)
	if err != nil {
		return nil, err
	}
	g.reserve = max(g.reserve, minStagingBytes)
	return &stagingRoom{g}, nil
}

// check says whether the reserve stays free when more bytes are written.
func (r *stagingRoom) check(more uint64) error {
	disk, err := spaceOf(r.guard.dir)
	if err != nil {
		return fmt.Errorf("ask how much of the disk of %s is free: %v", r.guard.dir, err)
	}
	need := r.guard.reserve + more
	switch {
	case disk.readOnly:
		return shortf("the disk of %s is mounted read-only", r.guard.dir)
	case disk.free < need:
		return shortf("the disk of %s has %s free, and %s are needed, of which %s stay free: make room there, or lower disk_reserve_mib",
			r.guard.dir, mebibytes(disk.free), mebibytes(need), mebibytes(r.guard.reserve))
	case disk.inodes < disk.inodesNeeded():
		return shortf("the disk of %s has %d inodes free, and %d are needed: remove some files there", r.guard.dir, disk.inodes, disk.inodesNeeded())
	}
	return nil
}

// inodesNeeded is how many must stay free; 0 where they are not counted.
func (d diskSpace) inodesNeeded() uint64 { return min(reserveInodes, d.inodeMax/8) }

func mebibytes(n uint64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// await returns once try succeeds; what calls it is a goroutine of Badger's
// that would otherwise fault, or lose what it has.
func (g *guard) await(what string, try func() error) {
	err := try()
	if err == nil {
		return
	}
	g.waiting.Add(1)
	defer g.waiting.Add(-1)
	g.log.LogAttrs(context.Background(), slog.LevelWarn, "store waits for space on its disk",
		slog.String("for", what), slog.Any("err", err))
	for try() != nil {
		time.Sleep(waitInterval)
	}
}

// gate holds up a compaction that has collected the content of a table and is
// about to make it: what Badger says then is the one moment to do so. Badger
// takes the error of a table that it cannot make for success, and deletes what
// should have gone into it.
type gate struct {
	logger
	guard *guard
}

// beforeTable begins what Badger says at that moment.
const beforeTable = "[%d] LOG Compact. Added "

// Debugf implements badger.Logger.
func (g gate) Debugf(format string, args ...any) {
	if strings.HasPrefix(format, beforeTable) {
		g.guard.awaitInodes()
	}
	g.logger.Debugf(format, args...)
}

// awaitInodes returns once a few files can be made.
func (g *guard) awaitInodes() {
	g.await("a table", func() error {
		disk, err := spaceOf(g.dir)
		if err != nil || disk.inodes < disk.inodesNeeded() {
			return shortf("%d inodes are free", disk.inodes)
		}
		return filesCanBeOpened(g.dir)
	})
}

// filesCanBeOpened looks whether this process may open a few more files.
func filesCanBeOpened(dir string) (err error) {
	var spare [8]*os.File
	for i := range spare {
		if spare[i], err = os.Open(dir); err != nil {
			break
		}
	}
	for _, f := range spare {
		if f != nil {
			f.Close()
		}
	}
	return err
}

// errLeftOpen is returned by closeDB where Badger could not be closed.
var errLeftOpen = errors.New("what is in its log stays there until the next start; nothing is lost")

// closeDB closes Badger, which first writes a table of what is only in its
// log. Where the disk has no room for that it is left as it is: the log is
// whole, and the next start goes on from it.
func (s *Store) closeDB() error {
	closed := make(chan error, 1)
	go func() { closed <- s.db.Close() }()
	patience := time.NewTicker(closePatience)
	defer patience.Stop()
	for {
		select {
		case err := <-closed:
			s.guard.unwatch()
			return errors.Join(err, s.guard.remove())
		case <-patience.C:
			if s.guard.waiting.Load() > 0 {
				return fmt.Errorf("the disk of %s is full: %w", s.guard.dir, errLeftOpen)
			}
		}
	}
}
