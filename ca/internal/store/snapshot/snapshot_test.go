// Backups of a real store, and what is left of one that somebody touched.

package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

var at = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

func open(t testing.TB, opts badger.Options) store.Store {
	t.Helper()
	st, err := badger.Open(t.TempDir(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return st
}

func put(t testing.TB, st store.Store, key, value string) uint64 {
	t.Helper()
	res, err := st.Txn(t.Context(), nil, []store.Op{store.Put(key, []byte(value))}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return res.Revision
}

func backup(t testing.TB, st store.Store) ([]byte, Summary) {
	t.Helper()
	var buf bytes.Buffer
	s, err := Write(t.Context(), &buf, st, "badger", at)
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), s
}

func listing(t testing.TB, pairs iter.Seq2[store.KV, error]) (kvs []store.KV) {
	t.Helper()
	for kv, err := range pairs {
		if err != nil {
			t.Fatal(err)
		}
		kvs = append(kvs, kv)
	}
	return kvs
}

func TestBackupIsTheStoreAtOneRevision(t *testing.T) {
	st := open(t, badger.Options{})
	want := make(map[string]uint64)
	for i := range 600 { // several pages
		key := fmt.Sprintf("entry/%04d", i)
		want[key] = put(t, st, key, strings.Repeat("v", i))
	}
	want["empty"] = put(t, st, "empty", "")
	want["large"] = put(t, st, "large", strings.Repeat("x", store.MaxValueBytes))
	lead, err := st.Campaign(t.Context(), "chores", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer lead.Resign(context.WithoutCancel(t.Context()))
	revision, err := st.Revision(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	raw, s := backup(t, st)
	led := []Led{{Key: lead.Fence().Key, ModRevision: lead.Fence().ModRevision}}
	wantSummary := Summary{Header{revision, at, "badger", led}, uint64(len(want)), int64(len(raw)), s.SHA256}
	if !cmp.Equal(s, wantSummary) {
		t.Errorf("Write = %+v; want %+v", s, wantSummary)
	}
	if got, err := Verify(bytes.NewReader(raw)); err != nil || !cmp.Equal(got, s) {
		t.Errorf("Verify = %+v, %v; want %+v", got, err, s)
	}
	r, err := NewReader(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := r.Summary(); ok {
		t.Error("a backup is good before it was read")
	}
	var keys []string
	for _, kv := range listing(t, r.All()) {
		keys = append(keys, kv.Key)
		if kv.ModRevision != want[kv.Key] {
			t.Errorf("%s is of revision %d; want %d", kv.Key, kv.ModRevision, want[kv.Key])
		}
	}
	if !slices.Equal(keys, slices.Sorted(maps.Keys(want))) {
		t.Errorf("%d keys; want %d, in order, without leader/", len(keys), len(want))
	}
	again, err := NewReader(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := Compare(NewPages(st).All(t.Context()), again.All()); err != nil || n != s.Keys {
		t.Errorf("Compare = %d, %v; want %d equal keys", n, err, s.Keys)
	}
}

// Writers go on while the store is read; when it drops the revision that is
// read, the caller learns that it must begin again.
func TestBackupOfABusyStore(t *testing.T) {
	st := open(t, badger.Options{KeepRevisions: 20})
	for i := range 300 {
		put(t, st, fmt.Sprintf("k/%04d", i), "before")
	}
	busy := writing{Store: st, then: func() {
		for i := range 100 {
			put(t, st, fmt.Sprintf("k/%04d", i), "after")
		}
	}}
	if _, err := Write(t.Context(), &bytes.Buffer{}, &busy, "badger", at); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("a revision that is gone: %v; want ErrCompacted", err)
	}
	busy.then = func() { put(t, st, "k/0299", "after") }
	var buf bytes.Buffer
	if _, err := Write(t.Context(), &buf, &busy, "badger", at); err != nil {
		t.Fatal(err)
	}
	r, err := NewReader(&buf)
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range listing(t, r.All()) {
		if kv.Key == "k/0299" && string(kv.Value) != "before" {
			t.Errorf("the backup has a write of revision %d, and is of %d", kv.ModRevision, r.Header().Revision)
		}
	}
}

// writing writes once after each first page.
type writing struct {
	store.Store
	then func()
}

func (w *writing) List(ctx context.Context, prefix, after string, limit int, revision uint64) ([]store.KV, uint64, bool, error) {
	kvs, at, more, err := w.Store.List(ctx, prefix, after, limit, revision)
	if revision == 0 {
		w.then()
	}
	return kvs, at, more, err
}

// SECURITY.md T43: no byte of a backup can be changed, removed or added.
func TestTouchedBackupIsRefused(t *testing.T) {
	st := open(t, badger.Options{})
	for i := range 4 {
		put(t, st, fmt.Sprintf("key/%d", i), "value")
	}
	raw, _ := backup(t, st)
	var damaged *DamagedError
	for i := range raw {
		if _, err := Verify(bytes.NewReader(raw[:i])); !errors.As(err, &damaged) {
			t.Errorf("cut to %d of %d bytes: %v", i, len(raw), err)
		}
		for _, flip := range []byte{1, 0x80} {
			touched := bytes.Clone(raw)
			touched[i] ^= flip
			if _, err := Verify(bytes.NewReader(touched)); !errors.As(err, &damaged) {
				t.Errorf("byte %d of %d flipped by %#x: %v", i, len(raw), flip, err)
			}
		}
	}
	if _, err := Verify(bytes.NewReader(append(bytes.Clone(raw), 0))); !errors.As(err, &damaged) {
		t.Errorf("one byte more: %v", err)
	}
	if !strings.Contains(damaged.Error(), `after 4 good records, the last of key "key/3"`) {
		t.Errorf("the error does not say what is good: %v", damaged)
	}
}

// Whoever computes all checksums anew still cannot put in what no store
// writes.
func TestForgedBackupIsRefused(t *testing.T) {
	for name, forged := range map[string]struct {
		header  Header
		records []store.KV
		want    string
	}{
		"no revision":           {Header{}, nil, "revision 0"},
		"revision of no serial": {Header{Revision: 1 << 47}, nil, "no store is ever at revision"},
		"order":                 {Header{Revision: 9}, []store.KV{{Key: "b", ModRevision: 1}, {Key: "a", ModRevision: 1}}, "out of order"},
		"twice":                 {Header{Revision: 9}, []store.KV{{Key: "b", ModRevision: 1}, {Key: "b", ModRevision: 1}}, "out of order"},
		"future":                {Header{Revision: 9}, []store.KV{{Key: "b", ModRevision: 10}}, "of revision 10"},
		"never":                 {Header{Revision: 9}, []store.KV{{Key: "b"}}, "of revision 0"},
		"leader":                {Header{Revision: 9}, []store.KV{{Key: "leader/x", ModRevision: 1}}, "not part of a backup"},
		"no key":                {Header{Revision: 9}, []store.KV{{ModRevision: 1}}, "key of 0"},
		"long key":              {Header{Revision: 9}, []store.KV{{Key: strings.Repeat("k", store.MaxKeyBytes+1), ModRevision: 1}}, "key of 4097"},
		"long value":            {Header{Revision: 9}, []store.KV{{Key: "k", Value: make([]byte, store.MaxValueBytes+1), ModRevision: 1}}, "value of 524289"},
	} {
		raw := forge(t, forged.header, forged.records)
		if _, err := Verify(bytes.NewReader(raw)); err == nil || !strings.Contains(err.Error(), forged.want) {
			t.Errorf("%s: %v; want %q", name, err, forged.want)
		}
	}
	newer := bytes.Replace(forge(t, Header{Revision: 9}, nil), []byte(`"format":1`), []byte(`"format":2`), 1)
	reseal(newer)
	if _, err := Verify(bytes.NewReader(newer)); err == nil || !strings.Contains(err.Error(), "a newer one wrote it") {
		t.Errorf("another format: %v", err)
	}
}

// forge writes a backup of anything, with good checksums.
func forge(t testing.TB, h Header, records []store.KV) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := newWriter(&buf)
	if err := w.header(h); err != nil {
		t.Fatal(err)
	}
	for _, kv := range records {
		if err := w.record(kv); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.trailer(uint64(len(records))); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// reseal computes the checksum of the header anew.
func reseal(raw []byte) {
	start := len(magic) + 4
	end := start + int(raw[len(magic)+3]) + int(raw[len(magic)+2])<<8
	crc := crc32.Checksum(raw[start:end], crcTable)
	for i := range 4 {
		raw[end+i] = byte(crc >> (24 - 8*i))
	}
}

func TestCompareNamesTheDifference(t *testing.T) {
	seq := func(kvs ...store.KV) iter.Seq2[store.KV, error] {
		return func(yield func(store.KV, error) bool) {
			for _, kv := range kvs {
				if !yield(kv, nil) {
					return
				}
			}
		}
	}
	a, b := store.KV{Key: "a", Value: []byte("1"), ModRevision: 3}, store.KV{Key: "b", ModRevision: 4}
	other, later := a, a
	other.Value, later.ModRevision = []byte("2"), 9
	for name, test := range map[string]struct {
		from, to iter.Seq2[store.KV, error]
		want     string
	}{
		"less":          {seq(a, b), seq(a), `"b" is missing`},
		"hole":          {seq(a, b), seq(b), `"a" is missing`},
		"more":          {seq(a), seq(a, b), `"b" is in the copy alone`},
		"more at first": {seq(b), seq(a, b), `"a" is in the copy alone`},
		"value":         {seq(a), seq(other), "another value"},
		"revision":      {seq(a), seq(later), "of revision 3, and 9"},
	} {
		if _, err := Compare(test.from, test.to); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v; want %q", name, err, test.want)
		}
	}
	if n, err := Compare(seq(a, b), seq(a, b)); err != nil || n != 2 {
		t.Errorf("equal: %d, %v", n, err)
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte(magic))
	f.Add(forge(f, Header{Revision: 9, CreatedAt: at, Store: "etcd"}, []store.KV{{Key: "a", Value: []byte("v"), ModRevision: 3}}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := Verify(bytes.NewReader(raw))
		if err != nil {
			return
		}
		// What is taken is taken as it stands.
		r, err := NewReader(bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		if kvs := listing(t, r.All()); uint64(len(kvs)) != s.Keys || int64(len(raw)) != s.Bytes {
			t.Errorf("%d records of %d, %d bytes of %d", len(kvs), s.Keys, len(raw), s.Bytes)
		}
	})
}
