package etcd

// How a value lies in etcd: 1 byte of format, 8 bytes with the revision of an
// imported value (0: etcd's own counts), 4 bytes of CRC-32C over all of it and
// the key, and the value. etcd checks its log but not what it reads from its
// tree.

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"merlon.dev/ca/internal/store"
)

const (
	recordFormat = 1
	headerBytes  = 1 + 8 + 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encodeRecord makes the value of an etcd key; imported is 0 but for imports.
func encodeRecord(key string, imported uint64, value []byte) string {
	b := make([]byte, headerBytes, headerBytes+len(value))
	b[0] = recordFormat
	binary.BigEndian.PutUint64(b[1:], imported)
	b = append(b, value...)
	binary.BigEndian.PutUint32(b[9:], checksum(key, b))
	return string(b)
}

// checksum covers everything of a record but itself.
func checksum(key string, record []byte) uint32 {
	sum := crc32.Update(0, castagnoli, []byte(key))
	sum = crc32.Update(sum, castagnoli, record[:9])
	return crc32.Update(sum, castagnoli, record[headerBytes:])
}

// decodeRecord returns the value and the revision that it was imported with.
func decodeRecord(key string, record []byte) (value []byte, imported uint64, err error) {
	switch {
	case len(record) < headerBytes:
		return nil, 0, fmt.Errorf("read key %q: %w: it has %d bytes", key, store.ErrDamaged, len(record))
	case record[0] != recordFormat:
		return nil, 0, fmt.Errorf("record of key %q has format %d, this version reads format %d", key, record[0], recordFormat)
	case binary.BigEndian.Uint32(record[9:]) != checksum(key, record):
		return nil, 0, fmt.Errorf("read key %q: %w: its checksum is wrong", key, store.ErrDamaged)
	}
	return record[headerBytes:], binary.BigEndian.Uint64(record[1:]), nil
}

// keyValue translates a pair of etcd's.
func (s *Store) keyValue(kv *mvccpb.KeyValue) (store.KV, error) {
	key := s.keys.strip(kv.Key)
	value, imported, err := decodeRecord(key, kv.Value)
	if err != nil {
		return store.KV{}, err
	}
	revision := imported
	if revision == 0 {
		revision = s.layout.revision(kv.ModRevision)
	}
	return store.KV{Key: key, Value: value, ModRevision: revision}, nil
}
