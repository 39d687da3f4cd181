// Going on with a log that is there: its end is checked, and what was not
// acknowledged is cut off. Not all of it is read: a log may hold many millions
// of records.

package audit

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"merlon.dev/sdk/checkpoint"
)

// maxTail holds two lines and a group that a crash left as zeros.
const maxTail = 2*maxLine + 2*maxGroupBytes

// resume returns the end of the chain, and the first record of the file that is
// written, nil if it has none. A log that ends before its checkpoint is left as
// it is.
func resume(path string, file *os.File, last checkpoint.Checkpoint, log *slog.Logger) (end link, first *header, err error) {
	prior, err := endOfRotated(path)
	if err != nil {
		return link{}, nil, err
	}
	tail, size, err := readTail(file)
	if err != nil {
		return link{}, nil, err
	}
	whole := bytes.LastIndexByte(beforeHole(tail, size), '\n') + 1
	if whole == 0 && int64(len(tail)) < size {
		return link{}, nil, errors.New("not an audit log: no line in its last megabytes")
	}
	end = prior
	if whole > 0 {
		if first, err = firstOf(file); err != nil {
			return link{}, nil, err
		}
		before, err := first.before(prior, last)
		if err != nil {
			return link{}, nil, fmt.Errorf("first record (seq %d): %w", first.Seq, err)
		}
		if end, err = lastLink(tail[:whole], before); err != nil {
			return link{}, nil, err
		}
	}
	if end.seq < uint64(last.Size) {
		return link{}, nil, fmt.Errorf("it ends with record %d, and its checkpoint counts %d: records that were acknowledged are missing", end.seq, last.Size)
	}
	if torn := len(tail) - whole; torn > 0 {
		log.LogAttrs(context.Background(), slog.LevelWarn, "audit log ends in a torn line, which is cut off",
			slog.String("path", path), slog.Int("bytes", torn))
		if err := errors.Join(file.Truncate(size-int64(torn)), file.Sync()); err != nil {
			return link{}, nil, fmt.Errorf("cut its torn end: %w", err)
		}
	}
	return end, first, nil
}

// pageBytes divides the size of every page.
const pageBytes = 4096

// beforeHole is the end of a log of that size without what a loss of power left behind
// a page that it took. Such a page reads as zeroes up to its end, and no record has a
// zero byte; what comes after it is of the same group, which was not acknowledged. Zeroes
// elsewhere are damage, and stay for the checks to find.
func beforeHole(tail []byte, size int64) []byte {
	hole := bytes.IndexByte(tail, 0)
	if hole < 0 || len(tail)-hole > maxGroupBytes+maxLine {
		return tail
	}
	after := len(bytes.TrimLeft(tail[hole:], "\x00"))
	if after > 0 && (size-int64(after))%pageBytes != 0 {
		return tail
	}
	return tail[:hole]
}

func readTail(file *os.File) (tail []byte, size int64, err error) {
	info, err := file.Stat()
	if err != nil {
		return nil, 0, err
	}
	size = info.Size()
	tail = make([]byte, min(size, maxTail))
	if _, err := file.ReadAt(tail, size-int64(len(tail))); err != nil {
		return nil, 0, fmt.Errorf("read its end: %w", err)
	}
	return tail, size, nil
}

// endOfRotated is the end of the newest file that is written no more, zero if
// there is none.
func endOfRotated(path string) (link, error) {
	segments, err := rotated(path)
	if err != nil || len(segments) == 0 {
		return link{}, err
	}
	last := segments[len(segments)-1]
	file, err := os.Open(last.path)
	if err != nil {
		return link{}, err
	}
	defer file.Close()
	tail, _, err := readTail(file)
	if err == nil && (len(tail) == 0 || tail[len(tail)-1] != '\n') {
		err = errors.New("it does not end with a record")
	}
	var end link
	if err == nil {
		first, firstErr := firstOf(file)
		if err = firstErr; err == nil {
			end, err = lastLink(tail, first.own())
		}
	}
	if err != nil {
		return link{}, fmt.Errorf("%s: %w", last.path, err)
	}
	return end, nil
}

// own is the place before h as h itself has it.
func (h *header) own() link {
	before := link{seq: h.Seq - 1}
	if prev, err := hex.DecodeString(h.Prev); err == nil && len(prev) == len(before.hash) {
		before.hash = [len(before.hash)]byte(prev)
	}
	return before
}

// before is the link that h, the first record of a file, comes after: the end
// of the file before, or what h says where that was dropped and the tree counts
// h.
func (h *header) before(prior link, last checkpoint.Checkpoint) (link, error) {
	if prior.seq == 0 && h.Seq > 1 && h.Seq <= uint64(last.Size) {
		return h.own(), nil
	}
	return prior, h.follows(prior)
}

// lastLink checks the last line of tail, and that it follows the one before if
// that is there too; before is the link that the first line of the file follows.
func lastLink(tail []byte, before link) (link, error) {
	if len(tail) == 0 {
		return link{}, nil
	}
	rest, last := lastLine(tail)
	h, own, err := parseLine(last)
	if err != nil {
		return link{}, fmt.Errorf("last record (seq %d): %w", h.Seq, err)
	}
	if len(rest) > 0 && h.Seq > 1 {
		_, line := lastLine(rest)
		if _, before, err = parseLine(line); err != nil {
			return link{}, fmt.Errorf("record before the last (seq %d): %w", before.seq, err)
		}
	}
	if err := h.follows(before); err != nil {
		return link{}, fmt.Errorf("last record (seq %d): %w", h.Seq, err)
	}
	return own, nil
}

// lastLine splits off the last line, which ends in a newline.
func lastLine(b []byte) (rest, line []byte) {
	b = b[:len(b)-1]
	i := bytes.LastIndexByte(b, '\n') + 1
	return b[:i], b[i:]
}
