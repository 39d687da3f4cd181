// Reading the lines of a log from its files, also of one that is being written:
// by their number, which is found by halving, and one after the other.

package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"slices"
	"strconv"
)

// Line is a record as it is in the log.
type Line struct {
	Seq uint64
	// Text is the line without its newline, which is what the tree has as its
	// leaf Seq-1. It is good until the next one is read.
	Text []byte
}

// ErrDropped is returned for records that retention has dropped.
var ErrDropped = errors.New("the audit log does not go back so far")

// Lines reads the log at path from record first on, to its end. It does not
// check the chain; it stops with an error at what is no line of a log, and
// where one is missing. A last line without its end is left out.
func Lines(path string, first uint64) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		first := max(first, 1)
		files := finder{path: path}
		for {
			next, more, err := files.read(first, yield)
			if err != nil {
				yield(Line{}, err)
				return
			}
			if !more || next == first {
				return
			}
			first = next // in the file after that, or in this one's new name
		}
	}
}

// finder finds the file of a record. It lists the folder, which can have thousands, only
// for one that it does not know.
type finder struct {
	path  string
	later []segment // after the one that was read last
}

func (f *finder) read(first uint64, yield func(Line, error) bool) (next uint64, more bool, err error) {
	if len(f.later) > 0 && f.later[0].first == first {
		name := f.later[0].path
		f.later = f.later[1:]
		if next, more, err = readSegment(name, first, yield); !errors.Is(err, fs.ErrNotExist) {
			return next, more, err
		}
	}
	for range 2 { // a file may get its other name meanwhile
		var name string
		var last bool
		if name, f.later, last, err = segmentOf(f.path, first); err != nil {
			return first, false, err
		}
		next, more, err = readSegment(name, first, yield)
		if err != nil || !more || next > first || last {
			return next, more, err
		}
	}
	return first, false, fmt.Errorf("read %s: record %d is missing", f.path, first)
}

// Recent reads the last n records, or all if there are not so many.
func (l *Log) Recent(n uint64) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		first, err := Begin(l.path)
		if err != nil {
			yield(Line{}, err)
			return
		}
		if size := uint64(l.tree.Size()); size > n {
			first = max(first, size-n+1)
		}
		for line, err := range Lines(l.path, first) {
			if !yield(line, err) {
				return
			}
		}
	}
}

// Begin is the first record that the log at path still has, 0 if it has none.
func Begin(path string) (uint64, error) {
	segments, err := rotated(path)
	if err != nil {
		return 0, err
	}
	if len(segments) > 0 {
		return segments[0].first, nil
	}
	file, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	h, err := firstOf(file)
	if err != nil || h == nil {
		return 0, err
	}
	return h.Seq, nil
}

// segmentOf is the file that holds record seq, if it is there, and those after it that
// are written no more. In the last one with records none may be found: it is the next.
func segmentOf(path string, seq uint64) (name string, later []segment, last bool, err error) {
	segments, err := rotated(path)
	if err != nil {
		return "", nil, false, err
	}
	file, err := os.Open(path)
	if err != nil {
		return "", nil, false, err
	}
	defer file.Close()
	h, err := firstOf(file)
	if err != nil {
		return "", nil, false, fmt.Errorf("read %s: %w", path, err)
	}
	if h != nil && h.Seq <= seq || h == nil && len(segments) == 0 {
		return path, nil, true, nil
	}
	for i, s := range slices.Backward(segments) {
		if s.first <= seq {
			return s.path, segments[i+1:], h == nil && i == len(segments)-1, nil
		}
	}
	return "", nil, false, fmt.Errorf("%w: record %d", ErrDropped, seq)
}

// readSegment yields the lines from first on in the file that holds it, and
// says which comes next, and whether anybody wants it.
func readSegment(name string, first uint64, yield func(Line, error) bool) (next uint64, more bool, err error) {
	file, err := os.Open(name)
	if err != nil {
		return first, false, err
	}
	defer file.Close()
	off, err := seek(file, first)
	if err != nil {
		return first, false, fmt.Errorf("read %s: %w", name, err)
	}
	lines := bufio.NewReaderSize(io.NewSectionReader(file, off, 1<<62), maxLine)
	for next = first; ; {
		text, err := lines.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return next, true, nil
		}
		if err != nil {
			return next, false, fmt.Errorf("read %s: a line is longer than any record: %w", name, err)
		}
		line := Line{Text: text[:len(text)-1]}
		var ok bool
		if line.Seq, ok = seqOf(line.Text); ok && line.Seq < first {
			continue
		}
		if !ok || line.Seq != next {
			return next, false, fmt.Errorf("read %s: record %d is missing, or damaged", name, next)
		}
		if !yield(line, nil) {
			return next, false, nil
		}
		next++
	}
}

// seekStep is how much is read for one look.
const seekStep = 64 << 10

// seek finds an offset in file at which a line begins, not after that of record
// seq and not far before it.
func seek(file *os.File, seq uint64) (int64, error) {
	info, err := file.Stat()
	if err != nil {
		return 0, err
	}
	return seekIn(file, info.Size(), seq)
}

func seekIn(file io.ReaderAt, size int64, seq uint64) (int64, error) {
	low, high, buf := int64(0), size, make([]byte, seekStep)
	for high-low > seekStep {
		middle := low + (high-low)/2
		n, err := file.ReadAt(buf, middle)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		begin := bytes.IndexByte(buf[:n], '\n') + 1
		found, ok := seqOf(buf[begin:n])
		switch {
		case begin == 0 || !ok: // a long line: to be read through
			return low, nil
		case found <= seq:
			low = middle + int64(begin)
		default:
			high = middle
		}
	}
	return low, nil
}

var seqMember = []byte(`{"seq":`)

// seqOf reads the number at the beginning of a line.
func seqOf(line []byte) (uint64, bool) {
	rest, ok := bytes.CutPrefix(line, seqMember)
	end := bytes.IndexByte(rest[:min(len(rest), 21)], ',')
	if !ok || end < 0 {
		return 0, false
	}
	seq, err := strconv.ParseUint(string(rest[:end]), 10, 64)
	return seq, err == nil && seq > 0
}
