package badger

// The layout on disk, format version 1. Integers are big-endian where they
// order keys, unsigned varints elsewhere.
//
//	k/KEY        revision (8 bytes), value
//	r/REVISION   one record of the revision log (REVISION: 8 bytes)
//	m/format     version of this layout
//	m/compacted  highest revision whose record is gone (8 bytes)
//
// A record names what its revision changed. It holds the new values; the
// values before are those of the Badger snapshot below the record's batch, so
// a value is written twice and never three times.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	bdg "github.com/dgraph-io/badger/v4"

	"merlon.dev/ca/internal/store"
)

var (
	dataPrefix   = []byte("k/")
	logPrefix    = []byte("r/")
	formatKey    = []byte("m/format")
	compactedKey = []byte("m/compacted")
)

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

func encodeValue(v state) []byte {
	b := make([]byte, 0, 8+len(v.value))
	return append(binary.BigEndian.AppendUint64(b, v.revision), v.value...)
}

// state is a key as some revision left it; revision 0: it does not exist.
type state struct {
	value    []byte
	revision uint64
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

func itemState(item *bdg.Item) (st state, err error) {
	err = item.Value(func(b []byte) error {
		if len(b) < 8 {
			return fmt.Errorf("read key %q: value without a revision", item.Key())
		}
		// Never nil: an empty value is a value.
		st = state{revision: binary.BigEndian.Uint64(b), value: append([]byte{}, b[8:]...)}
		return nil
	})
	return st, err
}

// readMeta returns the value of a key of our own.
func readMeta(view *bdg.Txn, key []byte) ([]byte, error) {
	item, err := view.Get(key)
	if err != nil {
		return nil, err
	}
	return item.ValueCopy(nil)
}

func readCompacted(view *bdg.Txn) (uint64, error) {
	b, err := readMeta(view, compactedKey)
	switch {
	case errors.Is(err, bdg.ErrKeyNotFound):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("read compaction point: %w", err)
	case len(b) != 8:
		return 0, fmt.Errorf("damaged: compaction point of %d bytes", len(b))
	}
	return binary.BigEndian.Uint64(b), nil
}

// record is one revision: what changed, and in which batch.
type record struct {
	revision uint64
	first    uint64 // lowest revision of the batch; the values before are at first-1
	events   []store.Event
}

// size estimates the memory that the record holds.
func (r *record) size() int {
	n := 64
	for _, e := range r.events {
		n += 96 + len(e.KV.Key) + len(e.KV.Value) + len(e.Prev)
	}
	return n
}

// Flags of an event in a record.
const (
	flagDelete  = 1 << iota
	flagExisted // Prev is to be found below the batch, or earlier in it
	knownFlags  = flagDelete | flagExisted
)

func (r *record) encode() []byte {
	b := make([]byte, 0, 16+r.size())
	b = binary.AppendUvarint(b, r.revision-r.first)
	b = binary.AppendUvarint(b, uint64(len(r.events)))
	for _, e := range r.events {
		var flags byte
		if e.Delete {
			flags |= flagDelete
		}
		if e.Prev != nil {
			flags |= flagExisted
		}
		b = append(b, flags)
		b = appendBytes(b, e.KV.Key)
		if !e.Delete {
			b = appendBytes(b, e.KV.Value)
		}
	}
	return b
}

func appendBytes[T ~string | ~[]byte](b []byte, v T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(v))), v...)
}

// decodeRecord is the inverse of encode, but for Prev: it is an empty slice
// where there was a value, which readLog then fills in.
func decodeRecord(revision uint64, b []byte) (record, error) {
	d := decoder{b: b}
	distance, count := d.uvarint(), d.uvarint()
	if d.bad || distance >= revision || count > store.MaxTxnOps {
		return record{}, fmt.Errorf("revision log: record %d is damaged", revision)
	}
	r := record{revision: revision, first: revision - distance}
	for range count {
		flags := d.byte()
		e := store.Event{Delete: flags&flagDelete != 0}
		e.KV = store.KV{Key: string(d.bytes()), ModRevision: revision}
		if !e.Delete {
			e.KV.Value = append([]byte{}, d.bytes()...)
		}
		if flags&flagExisted != 0 {
			e.Prev = []byte{}
		}
		if d.bad || flags&^byte(knownFlags) != 0 {
			return record{}, fmt.Errorf("revision log: record %d is damaged", revision)
		}
		r.events = append(r.events, e)
	}
	if len(d.b) > 0 {
		return record{}, fmt.Errorf("revision log: record %d is damaged", revision)
	}
	return r, nil
}

// decoder takes values off the front of b; bad sticks.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.b, d.bad = nil, true
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) byte() byte {
	if len(d.b) == 0 {
		d.bad = true
		return 0
	}
	v := d.b[0]
	d.b = d.b[1:]
	return v
}

func (d *decoder) bytes() []byte {
	n := d.uvarint()
	if n > uint64(len(d.b)) {
		d.b, d.bad = nil, true
		return nil
	}
	v := d.b[:n]
	d.b = d.b[n:]
	return v
}
