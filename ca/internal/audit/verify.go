package audit

// Reading the chain: all of it for an auditor, its end when the log is opened.

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
)

// maxTail holds two lines and a group that a crash left as zeros.
const maxTail = 2*maxLine + 2*maxGroupBytes

// BadRecordError names the first record that breaks the chain.
type BadRecordError struct {
	Line   int    // from 1
	Seq    uint64 // as the record says; 0 if it says none
	Reason string
}

func (e *BadRecordError) Error() string {
	return fmt.Sprintf("audit log line %d (seq %d): %s", e.Line, e.Seq, e.Reason)
}

// Verify walks the whole chain of the log at path and returns how many records
// are good from the beginning. The error is a *BadRecordError, or says why the
// file cannot be read. A log that a CA has open may end in a line still being
// written.
func Verify(path string) (n int, err error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("verify audit log: %w", err)
	}
	defer file.Close()
	n, _, err = walk(file)
	return n, err
}

// walk follows the chain from its beginning as far as it is good.
func walk(r io.Reader) (n int, end link, err error) {
	lines := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF) && len(line) == 0:
			return n, end, nil
		case errors.Is(err, io.EOF):
			return n, end, &BadRecordError{Line: n + 1, Reason: "cut short: never acknowledged, or still being written"}
		case errors.Is(err, bufio.ErrBufferFull):
			return n, end, &BadRecordError{Line: n + 1, Reason: "longer than any record"}
		case err != nil:
			return n, end, fmt.Errorf("verify audit log: %w", err)
		}
		h, own, err := parseLine(line[:len(line)-1])
		if err == nil {
			err = h.follows(end)
		}
		if err != nil {
			return n, end, &BadRecordError{Line: n + 1, Seq: h.Seq, Reason: err.Error()}
		}
		end = own
		n++
	}
}

// resume returns the end of the chain, after cutting what was not
// acknowledged. It checks the last two lines, not all: a log may hold many
// millions.
func resume(file *os.File, log *slog.Logger) (link, error) {
	info, err := file.Stat()
	if err != nil {
		return link{}, err
	}
	size := info.Size()
	tail := make([]byte, min(size, maxTail))
	if _, err := file.ReadAt(tail, size-int64(len(tail))); err != nil {
		return link{}, fmt.Errorf("read its end: %w", err)
	}
	whole := bytes.LastIndexByte(tail, '\n') + 1
	if torn := len(tail) - whole; torn > 0 {
		if whole == 0 && int64(len(tail)) < size {
			return link{}, errors.New("not an audit log: no line in its last megabytes")
		}
		log.LogAttrs(context.Background(), slog.LevelWarn, "audit log ends in a torn line, which is cut off",
			slog.String("path", file.Name()), slog.Int("bytes", torn))
		if err := errors.Join(file.Truncate(size-int64(torn)), file.Sync()); err != nil {
			return link{}, fmt.Errorf("cut its torn end: %w", err)
		}
	}
	return lastLink(tail[:whole])
}

// lastLink checks the last line of tail, and that it follows the one before if
// that is there too.
func lastLink(tail []byte) (link, error) {
	if len(tail) == 0 {
		return link{}, nil
	}
	rest, last := lastLine(tail)
	h, own, err := parseLine(last)
	if err != nil {
		return link{}, fmt.Errorf("last record (seq %d): %w", h.Seq, err)
	}
	before := link{}
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
