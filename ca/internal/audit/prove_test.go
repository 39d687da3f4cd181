// Finding and proving single records, and what a record costs.

package audit

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/measure"
)

func TestLinesAreFoundByTheirNumber(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := Open(path, Options{MaxBytes: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer closeLog(t, l)
	const n = 3000
	for i := range n / 100 {
		var records []Record
		for j := range 100 {
			records = append(records, Record{Type: Issue, Detail: strings.Repeat("x", (i*j)%4000)})
		}
		if err := l.Append(t.Context(), records...); err != nil {
			t.Fatal(err)
		}
	}
	for first := uint64(1); first <= n; first += 97 {
		want := first
		for line, err := range Lines(path, first) {
			if err != nil || line.Seq != want {
				t.Fatalf("Lines(%d) yields record %d, %v; want %d", first, line.Seq, err, want)
			}
			if want++; want > first+5 {
				break
			}
		}
	}
	for line, err := range Lines(path, n+1) {
		t.Fatalf("record %d, %v after the last", line.Seq, err)
	}
}

// FuzzSeek: a file that is no log, or is damaged, is an error or an offset
// within it, and never more.
func FuzzSeek(f *testing.F) {
	f.Add([]byte(`{"seq":1,"prev"`+"\n"), uint64(1))
	f.Add(bytes.Repeat([]byte(`{"seq":12,"prev":"0"}`+"\n"), 5000), uint64(12))
	f.Fuzz(func(t *testing.T, content []byte, seq uint64) {
		off, err := seekIn(bytes.NewReader(content), int64(len(content)), seq)
		if err == nil && (off < 0 || off > int64(len(content)) || off > 0 && content[off-1] != '\n') {
			t.Fatalf("seek = %d of %d", off, len(content))
		}
		if h, err := firstOf(bytes.NewReader(content)); err == nil && h != nil && h.Seq == 0 {
			t.Fatal("a first record without a number")
		}
	})
}

// BenchmarkLeaf is what the tree adds to a record, in CPU and without the sync
// that it shares.
func BenchmarkLeaf(b *testing.B) {
	l, err := Open(filepath.Join(b.TempDir(), "audit.jsonl"), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer closeLog(b, l)
	l.sync = func(*os.File) error { return nil }
	const group = 100
	records := slices.Repeat([]Record{{
		Time: time.Now(), Type: Issue, Actor: "spiffe://shop.test/agent/n1", SPIFFEID: "spiffe://shop.test/web",
		EntryID: "0195b7a2-5c1e-7c55-8d0e-111111111111", Serial: strings.Repeat("a", 40), AuthorityID: strings.Repeat("b", 40),
		SignedHash: strings.Repeat("c", 64), NotAfter: time.Now().Add(time.Hour),
	}}, group)
	for name, append := range map[string]func() error{
		"record-with-leaf": func() error { return l.Append(context.Background(), records...) },
		"leaf-alone": func() error {
			for range group {
				l.grow(benchLine)
			}
			return nil
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			before := measure.CPU()
			for b.Loop() {
				if err := append(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(measure.CPU()-before)/float64(b.N*group), "cpu-ns/leaf")
		})
	}
}

// TestRecordOnItsWayIsNotProven: it is in the file, and its SVID has not left.
func TestRecordOnItsWayIsNotProven(t *testing.T) {
	l := openSigned(t, filepath.Join(t.TempDir(), "audit.jsonl"), testKey(t), Options{})
	issued := Record{Type: Issue, Serial: "a1", SignedHash: "00"}
	appendRecord(t, l, issued)
	hold, syncing := make(chan struct{}), make(chan struct{})
	l.sync = func(f *os.File) error {
		close(syncing)
		<-hold
		return f.Sync()
	}
	done := make(chan error, 1)
	go func() { done <- l.Append(context.Background(), Record{Type: Issue, Serial: "a2", SignedHash: "00"}) }()
	<-syncing
	proofs, under, _, err := l.Prove(t.Context(), "a1", "a2")
	if err != nil || len(proofs) != 1 || proofs[0].Serial != "a1" || under.Size != 1 {
		t.Errorf("Prove = %v under %d, %v; want a1 alone", proofs, under.Size, err)
	}
	close(hold)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if proofs, _, _, err := l.Prove(t.Context(), "a1", "a2"); err != nil || len(proofs) != 2 {
		t.Errorf("Prove after the sync = %v, %v", proofs, err)
	}
}

// BenchmarkProve looks for one SVID among 50 000 records.
func BenchmarkProve(b *testing.B) {
	path := filepath.Join(b.TempDir(), "audit.jsonl")
	l := openSigned(b, path, testKey(b), Options{})
	records := slices.Repeat([]Record{{
		Time: time.Now(), Type: Issue, Actor: "spiffe://shop.test/agent/n1", SPIFFEID: "spiffe://shop.test/web",
		EntryID: "0195b7a2-5c1e-7c55-8d0e-111111111111", Serial: strings.Repeat("a", 40), AuthorityID: strings.Repeat("b", 40),
		SignedHash: strings.Repeat("c", 64), NotAfter: time.Now().Add(time.Hour),
	}}, 500)
	for range 100 {
		if err := l.Append(b.Context(), records...); err != nil {
			b.Fatal(err)
		}
	}
	appendRecord(b, l, Record{Type: Issue, Serial: "1234", SignedHash: "00"})
	info, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(info.Size())
	for b.Loop() {
		if proofs, _, _, err := l.Prove(b.Context(), "1234"); err != nil || len(proofs) != 1 {
			b.Fatal(len(proofs), err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/50_001, "ns/record")
}
