// What a backup costs, at as many entries as MERLON_BENCH_LARGE says.

package snapshot

import (
	"bufio"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

func largeStore(b *testing.B) (st store.Store, n int) {
	b.Helper()
	n, err := strconv.Atoi(os.Getenv("MERLON_BENCH_LARGE"))
	if err != nil {
		b.Skip("set MERLON_BENCH_LARGE to a number of entries")
	}
	dir := b.TempDir()
	var pairs iter.Seq2[store.KV, error] = func(yield func(store.KV, error) bool) {
		for i := range n {
			if !yield(store.KV{Key: fmt.Sprintf("entry/0195b7a2-5c1e-7c55-8d0e-%012d", i), Value: make([]byte, 300), ModRevision: uint64(i) + 2}, nil) {
				return
			}
		}
	}
	if err := badger.Import(dir, badger.Options{}, uint64(n)+2, pairs); err != nil {
		b.Fatal(err)
	}
	if st, err = badger.Open(dir, badger.Options{}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { st.Close() })
	return st, n
}

// heap is what lives now, in MiB.
func heap() float64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}

// BenchmarkBackup writes a backup to a file and reads it again.
func BenchmarkBackup(b *testing.B) {
	st, n := largeStore(b)
	path := filepath.Join(b.TempDir(), "backup")
	b.Run("write", func(b *testing.B) {
		before, most := heap(), 0.0
		for b.Loop() {
			f, err := os.Create(path)
			if err != nil {
				b.Fatal(err)
			}
			w := &sampled{Writer: bufio.NewWriter(f), every: n / 4}
			s, err := Write(b.Context(), w, st, "badger", at)
			if err != nil || s.Keys != uint64(n) {
				b.Fatalf("%d keys, %v", s.Keys, err)
			}
			if err := w.Flush(); err != nil {
				b.Fatal(err)
			}
			if err := f.Close(); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(s.Bytes)
			most = max(most, w.most)
		}
		b.ReportMetric(most-before, "heap-MiB")
	})
	b.Run("verify", func(b *testing.B) {
		for b.Loop() {
			f, err := os.Open(path)
			if err != nil {
				b.Fatal(err)
			}
			if s, err := Verify(f); err != nil || s.Keys != uint64(n) {
				b.Fatalf("%d keys, %v", s.Keys, err)
			}
			f.Close()
		}
	})
}

// sampled looks at the heap after every so many writes.
type sampled struct {
	*bufio.Writer
	calls, every int
	most         float64
}

func (s *sampled) Write(p []byte) (int, error) {
	if s.calls++; s.calls%max(1, s.every/200) == 0 {
		s.most = max(s.most, heap())
	}
	return s.Writer.Write(p)
}
