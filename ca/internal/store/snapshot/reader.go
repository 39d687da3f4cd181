// Reading a backup. Nothing in the file is believed: lengths are bounded
// before they are used, and a file that ends early, goes on after its end or
// was altered anywhere is refused.

package snapshot

import (
	"bufio"
	"bytes"
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

	"merlon.dev/ca/internal/store"
)

// DamagedError says where a file stops to be a whole backup.
type DamagedError struct {
	// Records is how many records before it are good.
	Records uint64
	// LastKey is the key of the last of them, empty for none.
	LastKey string
	Reason  string
}

// Error implements error.
func (e *DamagedError) Error() string {
	if e.Records == 0 {
		return "not a whole backup: " + e.Reason
	}
	return fmt.Sprintf("not a whole backup: %s, after %d good records, the last of key %q", e.Reason, e.Records, e.LastKey)
}

// Reader reads a backup once, from its beginning.
type Reader struct {
	r       *bufio.Reader
	sum     hash.Hash
	n       int64
	header  Header
	records uint64
	last    string
	summary *Summary // once the whole file was read and is good
}

// NewReader reads the header of a backup. Anything but a backup of a known
// version is a *DamagedError.
func NewReader(r io.Reader) (*Reader, error) {
	b := &Reader{r: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
	start := make([]byte, len(magic)+4)
	if err := b.read(start); err != nil {
		return nil, b.damaged("it is too short", err)
	}
	if string(start[:len(magic)]) != magic {
		return nil, b.damaged("it does not begin as one", nil)
	}
	length := binary.BigEndian.Uint32(start[len(magic):])
	if length > maxHeaderBytes {
		return nil, b.damaged(fmt.Sprintf("its header has %d bytes, at most %d", length, maxHeaderBytes), nil)
	}
	text := make([]byte, length+4)
	if err := b.read(text); err != nil {
		return nil, b.damaged("it ends in its header", err)
	}
	text, crc := text[:length], binary.BigEndian.Uint32(text[length:])
	if crc32.Checksum(text, crcTable) != crc {
		return nil, b.damaged("its header was altered", nil)
	}
	var h storedHeader
	if err := json.Unmarshal(text, &h); err != nil {
		return nil, b.damaged("its header is no JSON", nil)
	}
	if h.Format != format {
		return nil, b.damaged(fmt.Sprintf("format version %d, and this program knows only %d: a newer one wrote it", h.Format, format), nil)
	}
	if h.Revision == 0 || h.Revision > maxRevision {
		return nil, b.damaged(fmt.Sprintf("no store is ever at revision %d", h.Revision), nil)
	}
	b.header = h.Header
	return b, nil
}

// Header says what the backup is of. It is not proved before All has ended.
func (r *Reader) Header() Header { return r.header }

// Summary describes the backup once All has ended without an error; ok says
// whether it has.
func (r *Reader) Summary() (s Summary, ok bool) {
	if r.summary == nil {
		return Summary{}, false
	}
	return *r.summary, true
}

// All yields every pair in order of keys. An error is the last that it yields:
// only when there was none was the backup whole. Use it once.
func (r *Reader) All() iter.Seq2[store.KV, error] {
	return func(yield func(store.KV, error) bool) {
		for {
			kv, end, err := r.next()
			if err != nil {
				yield(store.KV{}, err)
				return
			}
			if end || !yield(kv, nil) {
				return
			}
		}
	}
}

// Verify reads a whole backup.
func Verify(r io.Reader) (Summary, error) {
	b, err := NewReader(r)
	if err != nil {
		return Summary{}, err
	}
	for _, err := range b.All() {
		if err != nil {
			return Summary{Header: b.header, Keys: b.records}, err
		}
	}
	return *b.summary, nil
}

// next returns a record, or the end.
func (r *Reader) next() (kv store.KV, end bool, err error) {
	tag, err := r.r.Peek(1)
	if err != nil {
		return kv, false, r.damaged("it ends without its trailer", err)
	}
	switch tag[0] {
	case tagRecord:
		kv, err = r.record()
		return kv, false, err
	case tagEnd:
		return kv, true, r.trailer()
	}
	return kv, false, r.damaged("a record begins with an unknown byte", nil)
}

func (r *Reader) record() (store.KV, error) {
	prefix := make([]byte, prefixBytes)
	if err := r.read(prefix); err != nil {
		return store.KV{}, r.damaged("it ends in a record", err)
	}
	revision := binary.BigEndian.Uint64(prefix[1:])
	keyBytes, valueBytes := binary.BigEndian.Uint32(prefix[9:]), binary.BigEndian.Uint32(prefix[13:])
	if keyBytes == 0 || keyBytes > store.MaxKeyBytes || valueBytes > store.MaxValueBytes {
		return store.KV{}, r.damaged(fmt.Sprintf("a record has a key of %d and a value of %d bytes", keyBytes, valueBytes), nil)
	}
	rest := make([]byte, keyBytes+valueBytes+4)
	if err := r.read(rest); err != nil {
		return store.KV{}, r.damaged("it ends in a record", err)
	}
	body, crc := rest[:keyBytes+valueBytes], binary.BigEndian.Uint32(rest[keyBytes+valueBytes:])
	if crc32.Update(crc32.Checksum(prefix, crcTable), crcTable, body) != crc {
		return store.KV{}, r.damaged("a record was altered", nil)
	}
	kv := store.KV{Key: string(body[:keyBytes]), Value: body[keyBytes:len(body):len(body)], ModRevision: revision}
	switch {
	case kv.Key <= r.last:
		return store.KV{}, r.damaged(fmt.Sprintf("key %q is out of order", kv.Key), nil)
	case revision == 0 || revision > r.header.Revision:
		return store.KV{}, r.damaged(fmt.Sprintf("key %q is of revision %d, and the backup of %d", kv.Key, revision, r.header.Revision), nil)
	case strings.HasPrefix(kv.Key, store.LeaderPrefix):
		return store.KV{}, r.damaged(fmt.Sprintf("key %q is not part of a backup", kv.Key), nil)
	}
	r.records++
	r.last = kv.Key
	return kv, nil
}

func (r *Reader) trailer() error {
	count := make([]byte, 1+8)
	if err := r.read(count); err != nil {
		return r.damaged("it ends in its trailer", err)
	}
	if n := binary.BigEndian.Uint64(count[1:]); n != r.records {
		return r.damaged(fmt.Sprintf("it has %d records and should have %d", r.records, n), nil)
	}
	s := Summary{Header: r.header, Keys: r.records}
	r.sum.Sum(s.SHA256[:0])
	end := make([]byte, sha256.Size)
	if err := r.read(end); err != nil {
		return r.damaged("it ends in its trailer", err)
	}
	if !bytes.Equal(end, s.SHA256[:]) {
		return r.damaged("its hash is not that of its content", nil)
	}
	if _, err := r.r.Peek(1); !errors.Is(err, io.EOF) {
		return r.damaged("it goes on after its end", err)
	}
	s.Bytes = r.n
	r.summary = &s
	return nil
}

// read fills b.
func (r *Reader) read(b []byte) error {
	n, err := io.ReadFull(r.r, b)
	r.sum.Write(b[:n]) // never fails, see hash.Hash
	r.n += int64(n)
	return err
}

// damaged is a *DamagedError, unless the file could not be read at all.
func (r *Reader) damaged(reason string, err error) error {
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("read the backup: %w", err)
	}
	return &DamagedError{Records: r.records, LastKey: r.last, Reason: reason}
}
