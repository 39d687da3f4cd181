package decisionlog

// This file writes lines to a file that is replaced when it is full, so that a log
// has at most so many bytes, whatever is logged.

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
)

// FileOptions say where a log is, and how large it may become. All are required but
// Gzip.
type FileOptions struct {
	// Path is the newest file; older ones are Path.1, Path.2 and so on.
	Path string
	// MaxBytes is how large one file becomes, about, and Keep how many older ones
	// stay.
	MaxBytes int64
	Keep     int
	// Gzip packs what is written. Each write can be unpacked by itself, so a file
	// that a crash cut off is whole up to there.
	Gzip bool
}

// File is an Output.
type File struct {
	o    FileOptions
	file *os.File
	size int64
}

// OpenFile opens the log for appending, or makes it, for its owner alone. What is
// there and is no regular file is refused.
func OpenFile(o FileOptions) (*File, error) {
	f := &File{o: o}
	if err := f.open(); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *File) open() error {
	path := f.o.Path
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("open decision log: %s is no regular file", path)
	}
	file, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("open decision log: %w", err)
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", path)
	}
	if err != nil {
		file.Close()
		return fmt.Errorf("open decision log: %w", err)
	}
	f.file, f.size = file, info.Size()
	if err := f.mend(); err != nil {
		file.Close()
		f.file = nil
		return err
	}
	return nil
}

// mend cuts off a last line that a crash left without its end.
func (f *File) mend() error {
	if f.o.Gzip || f.size == 0 {
		return nil
	}
	const block = 64 << 10
	end := f.size
	for end > 0 {
		buf := make([]byte, min(block, end))
		if _, err := f.file.ReadAt(buf, end-int64(len(buf))); err != nil {
			return fmt.Errorf("open decision log: look for its last line: %w", err)
		}
		if i := bytes.LastIndexByte(buf, '\n'); i >= 0 {
			end += int64(i+1) - int64(len(buf))
			break
		}
		end -= int64(len(buf))
	}
	if end == f.size {
		return nil
	}
	if err := f.file.Truncate(end); err != nil {
		return fmt.Errorf("open decision log: cut off half a line: %w", err)
	}
	f.size = end
	return nil
}

// Write implements Output. Either all lines are in the file or none.
func (f *File) Write(_ context.Context, lines [][]byte) (written, refused int, err error) {
	data, err := f.pack(lines)
	if err != nil {
		return 0, 0, err
	}
	if err := f.makeRoom(int64(len(data))); err != nil {
		return 0, 0, err
	}
	n, err := f.file.Write(data)
	if err != nil {
		if n > 0 { // no half lines; what cannot be taken back is cut off at the next start
			_ = f.file.Truncate(f.size)
		}
		return 0, 0, fmt.Errorf("write decision log: %w", err)
	}
	f.size += int64(n)
	return len(lines), 0, nil
}

func (f *File) pack(lines [][]byte) ([]byte, error) {
	var out bytes.Buffer
	var to io.Writer = &out
	var zw *gzip.Writer
	if f.o.Gzip {
		zw = gzip.NewWriter(&out)
		to = zw
	}
	for _, line := range lines {
		if _, err := to.Write(append(slices.Clip(line), '\n')); err != nil {
			return nil, err
		}
	}
	if zw != nil {
		if err := zw.Close(); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), nil
}

// makeRoom begins another file where n more bytes would be too many for this one.
func (f *File) makeRoom(n int64) error {
	if f.file == nil { // an earlier call failed half-way
		if err := f.open(); err != nil {
			return err
		}
	}
	if f.size == 0 || f.size+n <= f.o.MaxBytes {
		return nil
	}
	err := f.file.Close()
	f.file = nil
	if err != nil {
		return fmt.Errorf("close decision log: %w", err)
	}
	if err := f.shift(); err != nil {
		return err
	}
	return f.open()
}

// shift gives each file the next number. The oldest goes.
func (f *File) shift() error {
	for n := f.o.Keep; n >= 1; n-- {
		if err := os.Rename(f.numbered(n-1), f.numbered(n)); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("rotate decision log: %w", err)
		}
	}
	if f.o.Keep == 0 {
		if err := os.Remove(f.o.Path); err != nil {
			return fmt.Errorf("rotate decision log: %w", err)
		}
	}
	return nil
}

func (f *File) numbered(n int) string {
	if n == 0 {
		return f.o.Path
	}
	return fmt.Sprintf("%s.%d", f.o.Path, n)
}

// Close implements Output.
func (f *File) Close() error {
	if f.file == nil {
		return nil
	}
	return f.file.Close()
}

// Stream is an Output for what is open already, such as standard output.
type Stream struct{ W io.Writer }

// Write implements Output. Part of a line that could not be written is not
// repeated.
func (s Stream) Write(_ context.Context, lines [][]byte) (written, refused int, err error) {
	for i, line := range lines {
		if n, err := s.W.Write(append(slices.Clip(line), '\n')); err != nil {
			if n > 0 {
				return i, 1, fmt.Errorf("write decision log: %w", err)
			}
			return i, 0, fmt.Errorf("write decision log: %w", err)
		}
	}
	return len(lines), 0, nil
}

// Close implements Output; what s writes to is not its own.
func (Stream) Close() error { return nil }
