package badger

// The layout on disk, format version 2. Integers are big-endian, in records
// unsigned varints.
//
//	k/KEY        checksum (4 bytes), revision (8), value
//	r/REVISION   one record of the revision log (REVISION: 8 bytes), and its
//	             link: hash (32), number of keys (8), their sum (8)
//	m/format     version of this layout
//	m/compacted  the point up to which records are gone (point.go)
//	HEAD         a file beside Badger's: the point that is acknowledged (head.go)
//
// Badger checks its blocks when it opens a table and its log when it replays
// one, but what it cannot read there it drops. So everything of ours says by
// itself whether it is whole: a value carries the CRC-32C of key, revision and
// value; a record the hash of all before it; and each point how many keys
// there were and what their checksums add up to.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"

	bdg "github.com/dgraph-io/badger/v4"

	"merlon.dev/ca/internal/store"
)

// format is the version of the layout.
const format = "2"

var (
	dataPrefix   = []byte("k/")
	logPrefix    = []byte("r/")
	formatKey    = []byte("m/format")
	compactedKey = []byte("m/compacted")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func dataKey(key string) []byte { return append(slices.Clone(dataPrefix), key...) }

func logKey(revision uint64) []byte {
	return binary.BigEndian.AppendUint64(slices.Clone(logPrefix), revision)
}

// revisionOfLogKey is the inverse of logKey.
func revisionOfLogKey(key []byte) (uint64, error) {
	if len(key) != len(logPrefix)+8 {
		return 0, fmt.Errorf("revision log: key %x is not a revision", key)
	}
	return binary.BigEndian.Uint64(key[len(logPrefix):]), nil
}

// valueHeaderBytes stand before each value.
const valueHeaderBytes = 4 + 8

// checksum covers the stored key, the revision and the value.
func checksum(storedKey, revisionAndValue []byte) uint32 {
	return crc32.Update(crc32.Checksum(storedKey, castagnoli), castagnoli, revisionAndValue)
}

// state is a key as some revision left it; revision 0: it does not exist.
type state struct {
	value    []byte
	revision uint64
	sum      uint64 // what it adds to the sum of a point
	stored   []byte // the value as it is to be stored; nil if it was read
}

// newState encodes a value that is about to be written.
func newState(key string, value []byte, revision uint64) state {
	b := make([]byte, 4, valueHeaderBytes+len(value))
	b = binary.BigEndian.AppendUint64(b, revision)
	b = append(b, value...)
	crc := checksum(dataKey(key), b[4:])
	binary.BigEndian.PutUint32(b, crc)
	return state{value: b[valueHeaderBytes:], revision: revision, sum: fingerprint(crc, revision), stored: b}
}

// fingerprint spreads checksum and revision of a value over 64 bits, so that
// sums of different sets of values differ.
func fingerprint(crc uint32, revision uint64) uint64 {
	x := revision*0x9e3779b97f4a7c15 ^ uint64(crc)<<32 ^ uint64(crc)
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// readState copies the key out of the snapshot.
func readState(view *bdg.Txn, key string) (state, error) {
	item, err := view.Get(dataKey(key))
	if errors.Is(err, bdg.ErrKeyNotFound) {
		return state{}, nil
	}
	if err != nil {
		return state{}, fmt.Errorf("read key %q: %w", key, err)
	}
	return itemState(item)
}

// itemState copies a value and checks it.
func itemState(item *bdg.Item) (st state, err error) {
	err = item.Value(func(b []byte) error {
		st, err = decodeValue(item.Key(), b)
		// Never nil: an empty value is a value.
		st.value = append([]byte{}, st.value...)
		return err
	})
	return st, err
}

// decodeValue reads what newState encoded; the value is part of b.
func decodeValue(storedKey, b []byte) (state, error) {
	if len(b) < valueHeaderBytes || !slices.Equal(storedKey[:min(len(dataPrefix), len(storedKey))], dataPrefix) {
		return state{}, fmt.Errorf("read key %q: %w: %d bytes are no value", trimDataPrefix(storedKey), store.ErrDamaged, len(b))
	}
	crc := binary.BigEndian.Uint32(b)
	if checksum(storedKey, b[4:]) != crc {
		return state{}, fmt.Errorf("read key %q: %w: its checksum does not match", trimDataPrefix(storedKey), store.ErrDamaged)
	}
	revision := binary.BigEndian.Uint64(b[4:])
	if revision == 0 {
		return state{}, fmt.Errorf("read key %q: %w: revision 0", trimDataPrefix(storedKey), store.ErrDamaged)
	}
	return state{value: b[valueHeaderBytes:], revision: revision, sum: fingerprint(crc, revision)}, nil
}

func trimDataPrefix(storedKey []byte) []byte {
	return storedKey[min(len(dataPrefix), len(storedKey)):]
}

// under iterates over what begins with prefix. Values lie beside the keys, so
// they are not fetched ahead.
func under(view *bdg.Txn, prefix []byte) *bdg.Iterator {
	opts := bdg.DefaultIteratorOptions
	opts.PrefetchValues = false
	opts.Prefix = prefix
	return view.NewIterator(opts)
}

// readMeta returns the value of a key of our own.
func readMeta(view *bdg.Txn, key []byte) ([]byte, error) {
	item, err := view.Get(key)
	if err != nil {
		return nil, err
	}
	return item.ValueCopy(nil)
}
