package audit

// A full disk. The log keeps a stretch of blocks ahead of its end. While the
// disk has more than its reserve free the stretch grows with the log; below
// that the log goes on in what is left of it, for issuance and not for
// refusals, of which anyone can cause as many as they like. When it is used up
// Append answers ErrFull: nothing was written, and with space it goes on.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
)

// ErrFull is returned by Append while there is no room for the records: the
// disk is below its reserve, and the stretch is used up or not for these.
// Nothing was written. The error says what to do.
var ErrFull = errors.New("audit log is full")

// DefaultReserveBytes is how much of the disk stays free.
const DefaultReserveBytes = 256 << 20

// stretchOf is how much is set aside beside a reserve: 16 MiB with the default,
// some 25 000 issuances.
func stretchOf(reserve uint64) int64 { return int64(max(reserve/16, 64<<10)) }

// stretch is the writer's view of the room ahead. It belongs to one goroutine.
type stretch struct {
	file    *os.File
	log     *slog.Logger
	dir     string
	reserve uint64
	end     int64 // of the log
	until   int64 // the end of the blocks that are set aside
	blind   bool  // this file system sets nothing aside
	low     bool  // the last answer of room
}

// newStretch sets room aside after end, also below the reserve: what was set
// aside before a restart is still there, and asking for it again finds how much
// that is.
func newStretch(file *os.File, end int64, reserve uint64, log *slog.Logger) *stretch {
	s := &stretch{file: file, log: log, dir: filepath.Dir(file.Name()), reserve: reserve, end: end, until: end}
	length := stretchOf(reserve)
	err := s.extend(length)
	for ; isFull(err) && length > 4096; err = s.extend(length) {
		length -= length / 4
	}
	if err != nil && !s.blind {
		log.LogAttrs(context.Background(), slog.LevelWarn, "no space is set aside for the audit log", slog.Any("err", err))
	}
	return s
}

func (s *stretch) extend(length int64) error {
	err := allocateAhead(s.file, s.end, length)
	switch {
	case err == nil:
		s.until = s.end + length
	case !isFull(err):
		s.blind = true // pipes, old network file systems
	}
	return err
}

// room says why there is no more than what is set aside; nil: there is. It
// keeps the stretch up.
func (s *stretch) room() error {
	err := short(s.dir, s.reserve)
	if err == nil && !s.blind && s.until-s.end < stretchOf(s.reserve)/2 {
		if err = s.extend(stretchOf(s.reserve)); err != nil && s.blind {
			err = nil
		} else if err != nil {
			err = fmt.Errorf("the disk of %s has no space to set aside: %v", s.dir, err)
		}
	}
	if low := err != nil; low != s.low {
		s.low = low
		if low {
			s.log.LogAttrs(context.Background(), slog.LevelError, "audit log goes on in what is set aside for it",
				slog.Int64("bytes", s.until-s.end), slog.Any("err", err))
		} else {
			s.log.LogAttrs(context.Background(), slog.LevelInfo, "audit log has space again", slog.String("path", s.file.Name()))
		}
	}
	return err
}

// short says what the disk of dir has too little of.
func short(dir string, reserve uint64) error {
	free, err := freeOn(dir)
	if err != nil {
		return fmt.Errorf("ask how much of the disk of %s is free: %v", dir, err)
	}
	if free < reserve {
		return fmt.Errorf("the disk of %s has %.1f MiB free, below its reserve of %.1f MiB: free some space there, then it goes on by itself",
			dir, float64(free)/(1<<20), float64(reserve)/(1<<20))
	}
	return nil
}

// cutBack undoes a write that was cut off after n bytes.
func (s *stretch) cutBack(n int) error {
	if n == 0 {
		return nil
	}
	s.until = s.end
	return s.file.Truncate(s.end)
}

// isFull tells whether a write failed because there was no room for it.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG)
}
