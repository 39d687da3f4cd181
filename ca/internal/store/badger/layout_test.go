// Records on disk: they come back as written, and damage is an error.

package badger

import (
	"bytes"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/store"
)

var events = rapid.Custom(func(t *rapid.T) store.Event {
	e := store.Event{Delete: rapid.Bool().Draw(t, "delete")}
	e.KV.Key = rapid.String().Draw(t, "key")
	if !e.Delete {
		e.KV.Value = append([]byte{}, rapid.SliceOf(rapid.Byte()).Draw(t, "value")...)
	}
	if rapid.Bool().Draw(t, "existed") {
		e.Prev = []byte{}
	}
	return e
})

func TestRecordComesBackAsEncoded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := record{revision: rapid.Uint64Min(1).Draw(t, "revision")}
		want.first = rapid.Uint64Range(1, want.revision).Draw(t, "first")
		want.last = want.revision + min(rapid.Uint64Max(maxBatchTxns-1).Draw(t, "behind"), math.MaxUint64-want.revision)
		for _, e := range rapid.SliceOfN(events, 0, 5).Draw(t, "events") {
			e.KV.ModRevision = want.revision
			want.events = append(want.events, e)
		}
		b := want.encode()
		got, err := decodeRecord(want.revision, b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(record{}, change{})); diff != "" {
			t.Fatal(diff)
		}
		short := b[:rapid.IntRange(0, len(b)-1).Draw(t, "cut")]
		if _, err := decodeRecord(want.revision, short); err == nil {
			t.Fatalf("%d of %d bytes were taken for a record", len(short), len(b))
		}
	})
}

func FuzzDecodeRecord(f *testing.F) {
	r := record{revision: 9, first: 7, last: 11, events: []store.Event{
		{KV: store.KV{Key: "a", Value: []byte("v")}},
		{KV: store.KV{Key: "b"}, Delete: true, Prev: []byte{}},
	}}
	f.Add(uint64(9), r.encode())
	f.Add(uint64(1), []byte{0, 0, 0})
	f.Add(uint64(1), bytes.Repeat([]byte{0xff}, 20))
	f.Fuzz(func(t *testing.T, revision uint64, b []byte) {
		r, err := decodeRecord(revision, b)
		if err == nil && (r.first == 0 || r.first > revision || r.last < revision || r.revision != revision) {
			t.Fatalf("decodeRecord(%d, %x) = %+v", revision, b, r)
		}
	})
}
