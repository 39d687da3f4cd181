package badger

// Records of the revision log.

import (
	"encoding/binary"
	"errors"
	"fmt"

	bdg "github.com/dgraph-io/badger/v4"

	"merlon.dev/ca/internal/store"
)

// record is one revision: what changed, and in which batch. It names what its
// revision changed and holds the new values; the values before are those of
// the Badger snapshot below the record's batch, so a value is written twice
// and never three times.
type record struct {
	revision uint64
	first    uint64 // lowest revision of the batch; the values before are at first-1
	last     uint64 // highest revision of the batch: Badger's version of it
	change   change // to the point before
	events   []store.Event
}

// size estimates the memory that the record holds.
func (r *record) size() int {
	n := 96
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

// encode leaves out revision and change, which key and link give.
func (r *record) encode() []byte {
	b := make([]byte, 0, 16+r.size())
	b = binary.AppendUvarint(b, r.revision-r.first)
	b = binary.AppendUvarint(b, r.last-r.revision)
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
	before, behind, count := d.uvarint(), d.uvarint(), d.uvarint()
	if d.bad || before >= revision || behind >= maxBatchTxns || count > store.MaxTxnOps {
		return record{}, fmt.Errorf("revision log: record %d is damaged", revision)
	}
	r := record{revision: revision, first: revision - before, last: revision + behind}
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
	if len(d.b) > 0 || r.last < revision {
		return record{}, fmt.Errorf("revision log: record %d is damaged", revision)
	}
	return r, nil
}

// recordBatch reads only the batch of a record.
func recordBatch(revision uint64, encoded []byte) (first, last uint64, err error) {
	d := decoder{b: encoded}
	before, behind := d.uvarint(), d.uvarint()
	if d.bad || before >= revision || behind >= maxBatchTxns {
		return 0, 0, fmt.Errorf("record %d is damaged", revision)
	}
	return revision - before, revision + behind, nil
}

// splitRecord separates what is stored under a logKey into the encoded record
// and the point after it.
func splitRecord(revision uint64, b []byte) (encoded []byte, after point, err error) {
	n := len(b) - linkBytes
	if n < 0 {
		return nil, point{}, fmt.Errorf("revision log: record %d is damaged", revision)
	}
	return b[:n], decodeLink(revision, b[n:]), nil
}

// readRecord returns one record, without the values before, and the point
// after it.
func readRecord(view *bdg.Txn, revision uint64) (r record, after point, err error) {
	item, err := view.Get(logKey(revision))
	if errors.Is(err, bdg.ErrKeyNotFound) {
		return record{}, point{}, fmt.Errorf("revision log: record %d is missing", revision)
	}
	if err != nil {
		return record{}, point{}, fmt.Errorf("revision log: record %d: %w", revision, err)
	}
	err = item.Value(func(b []byte) error {
		encoded, p, err := splitRecord(revision, b)
		if err != nil {
			return err
		}
		after = p
		r, err = decodeRecord(revision, encoded)
		return err
	})
	return r, after, err
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
