package badger

// Points of the history. A point says all that is true after a revision: the
// hash over every record up to there, how many keys there are, and what their
// checksums add up to. Each record is stored with the point after it; where
// records have been dropped, the point remains.

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	bdg "github.com/dgraph-io/badger/v4"
)

// point is a place in the history.
type point struct {
	revision uint64
	hash     [sha256.Size]byte
	keys     uint64 // how many there are
	sum      uint64 // of their fingerprints, modulo 2^64
}

// origin is the point from which a history starts at revision, with nothing
// before it: 0 for a new store, the revision of an import otherwise.
func origin(revision, keys, sum uint64) point {
	p := point{revision: revision, keys: keys, sum: sum}
	p.hash = sha256.Sum256(p.append([]byte("merlon store: history starts here")))
	return p
}

// next is the point after a record.
func (p point) next(revision uint64, encoded []byte, change change) point {
	n := point{revision: revision, keys: p.keys + change.keys, sum: p.sum + change.sum}
	n.hash = n.link(p, encoded)
	return n
}

// follows tells whether p is the point after a record that was written at prev.
func (p point) follows(prev point, encoded []byte) bool { return p.hash == p.link(prev, encoded) }

// link is the hash of the history up to p: of the one before, of what p says,
// and of the record in between.
func (p point) link(prev point, encoded []byte) (sum [sha256.Size]byte) {
	h := sha256.New()
	h.Write(prev.hash[:])
	var b [24]byte
	binary.BigEndian.PutUint64(b[0:], p.revision)
	binary.BigEndian.PutUint64(b[8:], p.keys)
	binary.BigEndian.PutUint64(b[16:], p.sum)
	h.Write(b[:])
	h.Write(encoded)
	h.Sum(sum[:0])
	return sum
}

// change is what a record does to the number of keys and to their sum, modulo
// 2^64.
type change struct{ keys, sum uint64 }

// replace counts one key that was before and is now after.
func (c *change) replace(before, after state) {
	if before.revision != 0 {
		c.keys--
		c.sum -= before.sum
	}
	if after.revision != 0 {
		c.keys++
		c.sum += after.sum
	}
}

const (
	linkBytes  = sha256.Size + 8 + 8
	pointBytes = 8 + linkBytes
)

func (p point) append(b []byte) []byte {
	return p.appendLink(binary.BigEndian.AppendUint64(b, p.revision))
}

// appendLink leaves out the revision, which the key of a record gives.
func (p point) appendLink(b []byte) []byte {
	b = append(b, p.hash[:]...)
	b = binary.BigEndian.AppendUint64(b, p.keys)
	return binary.BigEndian.AppendUint64(b, p.sum)
}

// decodePoint takes a point off the front of b, which must be long enough.
func decodePoint(b []byte) point {
	return decodeLink(binary.BigEndian.Uint64(b), b[8:])
}

func decodeLink(revision uint64, b []byte) point {
	p := point{revision: revision}
	copy(p.hash[:], b)
	p.keys = binary.BigEndian.Uint64(b[sha256.Size:])
	p.sum = binary.BigEndian.Uint64(b[sha256.Size+8:])
	return p
}

// encodeCompacted is the value of compactedKey.
func encodeCompacted(p point) []byte {
	b := p.append(make([]byte, 0, pointBytes+4))
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func readCompacted(view *bdg.Txn) (point, error) {
	b, err := readMeta(view, compactedKey)
	switch {
	case errors.Is(err, bdg.ErrKeyNotFound):
		return point{}, errors.New("the compaction point is missing")
	case err != nil:
		return point{}, fmt.Errorf("read compaction point: %w", err)
	case len(b) != pointBytes+4:
		return point{}, fmt.Errorf("compaction point of %d bytes", len(b))
	case crc32.Checksum(b[:pointBytes], castagnoli) != binary.BigEndian.Uint32(b[pointBytes:]):
		return point{}, errors.New("the checksum of the compaction point does not match")
	}
	return decodePoint(b), nil
}
