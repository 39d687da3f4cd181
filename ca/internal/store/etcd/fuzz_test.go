package etcd

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// A record is of its key, and nothing in it can be changed.
func FuzzDecodeRecord(f *testing.F) {
	record := func(key, value string) []byte {
		b := append(make([]byte, headerBytes), value...)
		b[0] = recordFormat
		binary.BigEndian.PutUint64(b[1:], 9)
		binary.BigEndian.PutUint32(b[9:], checksum(key, b))
		return b
	}
	f.Add("k", record("k", "value"), 0)
	f.Add("k", record("k", ""), 3)
	f.Add("other", record("k", "value"), 0)
	f.Add("k", []byte{recordFormat}, 0)
	f.Fuzz(func(t *testing.T, key string, b []byte, at int) {
		value, _, err := decodeRecord(key, b)
		if err != nil {
			return
		}
		if !bytes.Equal(value, b[headerBytes:]) {
			t.Fatalf("%q holds %q", b, value)
		}
		changed := bytes.Clone(b)
		changed[uint(at)%uint(len(b))] ^= 1
		if _, _, err := decodeRecord(key, changed); err == nil {
			t.Fatalf("%q is taken, and so is %q", b, changed)
		}
		if _, _, err := decodeRecord(key+"x", b); err == nil {
			t.Fatalf("the record of %q is taken for another key's", key)
		}
	})
}
