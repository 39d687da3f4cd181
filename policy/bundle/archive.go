package bundle

// This file reads and writes the tarball. Reading decides everything about
// sizes, names and kinds of entries before any other parser sees a byte
// (T29): plain files of the ustar format only, so that neither links and
// devices nor sparse files and extended headers need to be understood.

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	manifestName   = ".manifest"
	signaturesName = ".signatures.json"
	dataName       = "data.json"
)

type files map[string][]byte

// pack writes files in the order of their names, so that equal policies are
// equal bytes.
func pack(f files) ([]byte, error) {
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	w := tar.NewWriter(zip)
	for _, name := range slices.Sorted(maps.Keys(f)) {
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(f[name])), ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("pack %s: %v", name, err)
		}
		if _, err := w.Write(f[name]); err != nil {
			return nil, fmt.Errorf("pack %s: %v", name, err)
		}
	}
	if err := errors.Join(w.Close(), zip.Close()); err != nil {
		return nil, fmt.Errorf("pack policy bundle: %v", err)
	}
	if out.Len() > MaxBytes {
		return nil, fmt.Errorf("pack policy bundle: %d bytes compressed, at most %d are allowed", out.Len(), MaxBytes)
	}
	return out.Bytes(), nil
}

func unpack(raw []byte) (files, error) {
	ball, err := decompress(raw)
	if err != nil {
		return nil, fmt.Errorf("read policy bundle: %w", err)
	}
	f := files{}
	for at := 0; ; {
		if len(ball)-at < 512 {
			return nil, errors.New("read policy bundle: truncated tarball")
		}
		header := ball[at : at+512]
		if allZero(header) {
			if len(ball)-at < 1024 || !allZero(ball[at:]) {
				return nil, errors.New("read policy bundle: malformed end of tarball")
			}
			return f, nil
		}
		name, size, err := readHeader(header)
		if err != nil {
			return nil, fmt.Errorf("read policy bundle: %w", err)
		}
		padded := (size + 511) / 512 * 512
		if padded > len(ball)-at-512 {
			return nil, fmt.Errorf("read policy bundle: file %q is truncated", name)
		}
		if _, twice := f[name]; twice {
			return nil, fmt.Errorf("read policy bundle: file %q is in it twice", name)
		}
		if len(f) == maxFiles {
			return nil, fmt.Errorf("read policy bundle: more than %d files", maxFiles)
		}
		f[name] = ball[at+512 : at+512+size : at+512+size]
		at += 512 + padded
	}
}

// decompress accepts one gzip member and nothing behind it. It looks how long the
// content is before it makes room for it: a bomb costs no memory.
func decompress(raw []byte) ([]byte, error) {
	if len(raw) > MaxBytes {
		return nil, fmt.Errorf("more than %d bytes", MaxBytes)
	}
	rest := bytes.NewReader(raw)
	zip, err := gzip.NewReader(rest)
	if err != nil {
		return nil, fmt.Errorf("not gzip: %v", err)
	}
	zip.Multistream(false)
	size, err := io.Copy(io.Discard, io.LimitReader(zip, maxUncompressedBytes+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("decompress: %v", err)
	case size > maxUncompressedBytes:
		return nil, fmt.Errorf("more than %d bytes when decompressed", maxUncompressedBytes)
	case rest.Len() > 0:
		return nil, errors.New("data after the end")
	}
	rest.Reset(raw)
	if err := zip.Reset(rest); err != nil {
		return nil, fmt.Errorf("not gzip: %v", err)
	}
	ball := make([]byte, size)
	if _, err := io.ReadFull(zip, ball); err != nil {
		return nil, fmt.Errorf("decompress: %v", err)
	}
	return ball, nil
}

// readHeader reads the header block of a plain file (POSIX ustar).
func readHeader(h []byte) (name string, size int, err error) {
	name = text(h[0:100])
	if prefix := text(h[345:500]); prefix != "" {
		name = prefix + "/" + name
	}
	switch {
	case string(h[257:263]) != "ustar\x00":
		return "", 0, fmt.Errorf("entry %.100q is not in the ustar format", name)
	case !checksumFits(h):
		return "", 0, fmt.Errorf("entry %.100q has a bad checksum", name)
	case h[156] != tar.TypeReg:
		return "", 0, fmt.Errorf("entry %.100q is no plain file (type %q)", name, h[156])
	}
	n, err := strconv.ParseUint(strings.TrimRight(text(h[124:136]), " "), 8, 31)
	if err != nil {
		return "", 0, fmt.Errorf("entry %.100q has a malformed size", name)
	}
	name = strings.TrimPrefix(name, "/") // as `opa build` writes names
	if err := checkName(name); err != nil {
		return "", 0, err
	}
	return name, int(n), nil
}

// checkName admits the files that policy bundles are made of.
func checkName(name string) error {
	switch {
	case name == "" || len(name) > 255 || path.Clean(name) != name || path.IsAbs(name) || name == ".." || strings.HasPrefix(name, "../"),
		strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r > '~' || r == '\\' }):
		return fmt.Errorf("entry %.100q: a file's name is a clean relative path of printable ASCII", name)
	case name == manifestName, name == signaturesName, name == dataName:
		return nil
	case strings.HasSuffix(name, "_test.rego"):
		return fmt.Errorf("file %q: tests do not belong into a policy bundle", name)
	case path.Ext(name) == ".rego":
		return nil
	}
	return fmt.Errorf("file %.100q: a policy bundle has data.json and .rego files only", name)
}

func text(field []byte) string {
	before, _, _ := bytes.Cut(field, []byte{0})
	return string(before)
}

func checksumFits(h []byte) bool {
	want, err := strconv.ParseUint(strings.Trim(text(h[148:156]), " "), 8, 32)
	if err != nil {
		return false
	}
	sum := uint64(8 * ' ') // the checksum's own field counts as spaces
	for i, b := range h {
		if i < 148 || i >= 156 {
			sum += uint64(b)
		}
	}
	return sum == want
}

func allZero(b []byte) bool {
	return len(bytes.Trim(b, "\x00")) == 0
}
