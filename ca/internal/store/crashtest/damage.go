package crashtest

// Damage to the files of a store: where records begin and end in them, and what
// is done there.

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dgraph-io/badger/v4/fb"
	"golang.org/x/sys/unix"
)

// The kinds of damage.
const (
	truncated = "truncated" // the file ends at the offset
	flipped   = "bit flip"  // one bit at the offset
	zeroed    = "zeroed"    // 512 bytes from the offset, as after a torn write
	missing   = "missing"   // no file
)

// damage is one thing done to one file.
type damage struct {
	file   string
	kind   string
	offset int64
	bit    uint
	// boundary: offset is where a record or block begins or ends.
	boundary bool
}

func (d damage) String() string {
	return fmt.Sprintf("%s %s at %d (bit %d, boundary %v)", d.file, d.kind, d.offset, d.bit, d.boundary)
}

// class is the kind of file, as the table of outcomes names it.
func (d damage) class() string {
	if ext := filepath.Ext(d.file); ext != "" {
		return "*" + ext
	}
	return d.file
}

// apply does it to the store in dir.
func (d damage) apply(dir string) error {
	path := filepath.Join(dir, d.file)
	switch d.kind {
	case missing:
		return os.Remove(path)
	case truncated:
		return os.Truncate(path, d.offset)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if d.kind == zeroed {
		_, err = f.WriteAt(make([]byte, 512), d.offset)
		return err
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], d.offset); err != nil {
		return err
	}
	b[0] ^= 1 << d.bit
	_, err = f.WriteAt(b[:], d.offset)
	return err
}

// damages lists what can be done to a file: at each boundary (of many, at
// perFile of them) and at as many random offsets of what is written.
func damages(dir, file string, perFile int, rng *rand.Rand) ([]damage, error) {
	path := filepath.Join(dir, file)
	data, size, err := written(path)
	if err != nil || size == 0 {
		return nil, err
	}
	edges := boundaries(file, data)
	rng.Shuffle(len(edges), func(i, j int) { edges[i], edges[j] = edges[j], edges[i] })
	edges = edges[:min(len(edges), perFile)]
	all := []damage{{file: file, kind: missing}}
	at := func(kind string, offset int64, boundary bool) {
		if kind == truncated || offset < int64(len(data)) {
			all = append(all, damage{file, kind, offset, uint(rng.IntN(8)), boundary})
		}
	}
	for _, edge := range edges {
		at(truncated, edge, true)
		at(flipped, edge, true)
		at(zeroed, edge, true)
	}
	const most = 256 // random offsets tell little more than boundaries
	for range min(perFile, len(data), most) {
		at(truncated, rng.Int64N(size), false)
		at(truncated, rng.Int64N(int64(len(data))), false)
		at(flipped, rng.Int64N(int64(len(data))), false)
		at(zeroed, rng.Int64N(int64(len(data))), false)
	}
	return all, nil
}

// written returns the file up to its last byte that is not zero (Badger
// allocates its logs ahead), and its whole size.
func written(path string) ([]byte, int64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, 0, err
	}
	size := int64(len(data))
	for len(data) > 0 && data[len(data)-1] == 0 {
		data = data[:len(data)-1]
	}
	return data, size, nil
}

// boundaries returns where the records of a file begin and end; for files of a
// format that is not known here, each 64 bytes.
func boundaries(file string, data []byte) []int64 {
	switch {
	case strings.HasSuffix(file, ".mem"), strings.HasSuffix(file, ".vlog"):
		return logBoundaries(data)
	case strings.HasSuffix(file, ".sst"):
		return tableBoundaries(data)
	case file == "MANIFEST":
		return manifestBoundaries(data)
	}
	var edges []int64
	for at := 0; at <= len(data); at += 64 {
		edges = append(edges, int64(at))
	}
	return edges
}

// logBoundaries walks Badger's write-ahead and value logs: a header of 20
// bytes, then records of meta (2 bytes), lengths of key and value and expiry
// (varints), key, value, CRC-32.
func logBoundaries(data []byte) []int64 {
	edges := []int64{0}
	for at := 20; at+2 < len(data); {
		edges = append(edges, int64(at))
		next := at + 2
		var length [3]uint64
		for i := range length {
			v, n := binary.Uvarint(data[next:])
			if n <= 0 {
				return edges
			}
			length[i], next = v, next+n
		}
		next += int(length[0]+length[1]) + 4
		if length[0] == 0 || next > len(data)+4 {
			break
		}
		at = next
		edges = append(edges, int64(min(at, len(data))))
	}
	slices.Sort(edges)
	return slices.Compact(edges)
}

// tableBoundaries reads where the blocks of a table are, and its footer: index,
// its length, checksum, its length.
func tableBoundaries(data []byte) []int64 {
	edges := []int64{0, int64(len(data))}
	last4 := func(end int) int { return int(binary.BigEndian.Uint32(data[end-4 : end])) }
	if len(data) < 8 {
		return edges
	}
	sum := len(data) - 4 - last4(len(data))
	if sum < 4 || sum > len(data) {
		return edges
	}
	index := sum - 4 - last4(sum)
	if index < 0 || index > sum {
		return edges
	}
	edges = append(edges, int64(index), int64(sum-4), int64(sum), int64(len(data)-4))
	blocks := fb.GetRootAsTableIndex(data[index:sum-4], 0)
	var block fb.BlockOffset
	for i := range blocks.OffsetsLength() {
		if blocks.Offsets(&block, i) {
			edges = append(edges, int64(block.Offset()))
		}
	}
	slices.Sort(edges)
	return slices.Compact(edges)
}

// manifestBoundaries walks records of length, CRC-32 and content behind a
// header of 8 bytes.
func manifestBoundaries(data []byte) []int64 {
	edges := []int64{0}
	for at := 8; at <= len(data); {
		edges = append(edges, int64(at))
		if at+8 > len(data) {
			break
		}
		at += 8 + int(binary.BigEndian.Uint32(data[at:]))
	}
	return edges
}

// copyStore copies a folder, leaving holes where there is no data.
func copyStore(from, to string) error {
	files, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	for _, f := range files {
		if !f.Type().IsRegular() {
			continue
		}
		if err := copySparse(filepath.Join(from, f.Name()), filepath.Join(to, f.Name())); err != nil {
			return fmt.Errorf("copy %s: %w", f.Name(), err)
		}
	}
	return nil
}

func copySparse(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	size := info.Size()
	for at := int64(0); at < size; {
		start, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break // only a hole is left
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(in.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(out, start), io.NewSectionReader(in, start, end-start)); err != nil {
			return err
		}
		at = end
	}
	return out.Truncate(size)
}
