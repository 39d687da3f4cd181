// Package snapshot is the file of a backup: every pair of a store at one
// revision, readable by any implementation of the store. The file says by
// itself whether it is whole: each record carries a checksum, and the end
// carries the number of records and a hash of all that stands before it.
//
// Integers are big-endian; format version 1:
//
//	"merlon store backup\n"
//	header    length (4 bytes), JSON of Header, CRC-32C of that JSON (4 bytes)
//	records   1 (1 byte), ModRevision (8), length of the key (4), length of the
//	          value (4), key, value, CRC-32C of all this (4)
//	trailer   0 (1 byte), number of records (8), SHA-256 of all bytes before it (32)
//
// Records are in order of keys. What campaigns wrote (leader/) is left out:
// nobody leads a store that is not running.
package snapshot

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"iter"
	"strings"
	"time"

	"merlon.dev/ca/internal/store"
)

const (
	magic  = "merlon store backup\n"
	format = 1

	maxHeaderBytes = 4 << 10
	// maxRevision leaves an epoch to go on in: a serial number keeps 47 bits.
	maxRevision = 1<<47 - 1<<32 - 1

	tagEnd    = 0
	tagRecord = 1
	// prefixBytes is what of a record stands before its key.
	prefixBytes = 1 + 8 + 4 + 4
)

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// Header says what a backup is of.
type Header struct {
	// Revision is that of the store when the backup was made: everything up to
	// it is in the backup, and nothing after it.
	Revision uint64 `json:"revision"`
	// CreatedAt is when it was made, by the clock of who made it.
	CreatedAt time.Time `json:"created_at"`
	// Store is the kind of the store, "badger" or "etcd"; any kind can take the
	// backup.
	Store string `json:"store"`
	// Led is what campaigns had written, which is left out: with it a backup can
	// be held against the store that it was taken from.
	Led []Led `json:"led,omitempty"`
}

// Led is a pair that a campaign wrote.
type Led struct {
	Key         string `json:"key"`
	Value       []byte `json:"value,omitempty"`
	ModRevision uint64 `json:"mod_revision"`
}

// How many are noted, and how large they are at most: the header is small.
const (
	maxLed      = 16
	maxLedBytes = 100
)

type storedHeader struct {
	Format int `json:"format"`
	Header
}

// Summary describes a whole backup.
type Summary struct {
	Header
	// Keys is the number of records.
	Keys uint64
	// Bytes is the length of the file.
	Bytes int64
	// SHA256 is the hash that the file ends with, of all bytes before.
	SHA256 [sha256.Size]byte
}

// Write writes a backup of st, of the given kind, to w. It reads the store page
// by page at one revision. store.ErrCompacted means that the store dropped that
// revision meanwhile: empty what w writes to, and begin again.
func Write(ctx context.Context, w io.Writer, st store.Store, kind string, now time.Time) (Summary, error) {
	out := newWriter(w)
	pages := NewPages(st)
	first, err := pages.next(ctx) // it says which revision this is
	if err != nil {
		return Summary{}, fmt.Errorf("back up the store: %w", err)
	}
	s := Summary{Header: Header{Revision: pages.Revision(), CreatedAt: now.UTC().Truncate(time.Millisecond), Store: kind}}
	led, _, _, err := st.List(ctx, store.LeaderPrefix, "", maxLed, s.Revision)
	if err != nil {
		return Summary{}, fmt.Errorf("back up the store: %w", err)
	}
	for _, kv := range led {
		if len(kv.Key)+len(kv.Value) <= maxLedBytes {
			s.Led = append(s.Led, Led{kv.Key, append([]byte(nil), kv.Value...), kv.ModRevision})
		}
	}
	if err := out.header(s.Header); err != nil {
		return Summary{}, fmt.Errorf("back up the store: %w", err)
	}
	for kv, err := range pages.from(ctx, first) {
		if err == nil {
			err = out.record(kv)
		}
		if err != nil {
			return Summary{}, fmt.Errorf("back up the store: %w", err)
		}
		s.Keys++
	}
	if s.SHA256, err = out.trailer(s.Keys); err != nil {
		return Summary{}, fmt.Errorf("back up the store: %w", err)
	}
	s.Bytes = out.n
	return s, nil
}

// writer hashes what it writes.
type writer struct {
	w   *bufio.Writer
	sum hash.Hash
	n   int64
	buf []byte // reused
}

func newWriter(w io.Writer) *writer {
	return &writer{w: bufio.NewWriterSize(w, 64<<10), sum: sha256.New()}
}

func (w *writer) write(b []byte) error {
	w.sum.Write(b) // never fails, see hash.Hash
	w.n += int64(len(b))
	_, err := w.w.Write(b)
	return err
}

func (w *writer) header(h Header) error {
	b, err := json.Marshal(storedHeader{format, h})
	if err != nil {
		return err
	}
	out := append([]byte(magic), 0, 0, 0, 0)
	binary.BigEndian.PutUint32(out[len(magic):], uint32(len(b)))
	out = append(out, b...)
	return w.write(binary.BigEndian.AppendUint32(out, crc32.Checksum(b, crcTable)))
}

func (w *writer) record(kv store.KV) error {
	w.buf = append(w.buf[:0], tagRecord)
	w.buf = binary.BigEndian.AppendUint64(w.buf, kv.ModRevision)
	w.buf = binary.BigEndian.AppendUint32(w.buf, uint32(len(kv.Key)))
	w.buf = binary.BigEndian.AppendUint32(w.buf, uint32(len(kv.Value)))
	w.buf = append(w.buf, kv.Key...)
	w.buf = append(w.buf, kv.Value...)
	return w.write(binary.BigEndian.AppendUint32(w.buf, crc32.Checksum(w.buf, crcTable)))
}

func (w *writer) trailer(keys uint64) (sum [sha256.Size]byte, err error) {
	if err := w.write(binary.BigEndian.AppendUint64([]byte{tagEnd}, keys)); err != nil {
		return sum, err
	}
	w.sum.Sum(sum[:0])
	if err := w.write(sum[:]); err != nil {
		return sum, err
	}
	return sum, w.w.Flush()
}

// Pages reads all of a store at one revision, a page at a time.
type Pages struct {
	st       store.Store
	limit    int
	after    string
	revision uint64
	more     bool
}

// A page has at most so many pairs, and fewer where they are large.
const (
	maxPage      = 256
	maxPageBytes = 4 << 20
)

// NewPages begins at the first key. Use it once.
func NewPages(st store.Store) *Pages { return &Pages{st: st, limit: maxPage / 4, more: true} }

// Revision is the one that is read; 0 before the first page.
func (p *Pages) Revision() uint64 { return p.revision }

// All yields every pair in order of keys but those of leader/. An error is the
// last that it yields.
func (p *Pages) All(ctx context.Context) iter.Seq2[store.KV, error] { return p.from(ctx, nil) }

// from yields page and what comes after it.
func (p *Pages) from(ctx context.Context, page []store.KV) iter.Seq2[store.KV, error] {
	return func(yield func(store.KV, error) bool) {
		for {
			for _, kv := range page {
				if !strings.HasPrefix(kv.Key, store.LeaderPrefix) && !yield(kv, nil) {
					return
				}
			}
			if !p.more {
				return
			}
			var err error
			if page, err = p.next(ctx); err != nil {
				yield(store.KV{}, err)
				return
			}
		}
	}
}

func (p *Pages) next(ctx context.Context) ([]store.KV, error) {
	kvs, revision, more, err := p.st.List(ctx, "", p.after, p.limit, p.revision)
	if err != nil {
		return nil, err
	}
	if len(kvs) == 0 && more {
		return nil, errors.New("the store lists nothing and says that there is more")
	}
	p.revision, p.more = revision, more
	size := 0
	for _, kv := range kvs {
		size += len(kv.Key) + len(kv.Value)
		p.after = kv.Key
	}
	if size > maxPageBytes {
		p.limit = max(8, p.limit/4)
	} else {
		p.limit = min(maxPage, p.limit*2)
	}
	return kvs, nil
}
