// What a million entries cost: load, reopening, memory, disk, and one change
// beside the same in a small store. It takes minutes: set MERLON_BENCH_LARGE to
// the number of entries (1000000), or run `make bench-store`.

package badger_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/integration/measure"
)

// large is the number of entries; without it the benchmark is skipped.
func large(b *testing.B) int {
	b.Helper()
	n, err := strconv.Atoi(os.Getenv("MERLON_BENCH_LARGE"))
	if err != nil {
		b.Skip("set MERLON_BENCH_LARGE to a number of entries")
	}
	return n
}

// entryKey spreads the entries over the key space, as their IDs do.
func entryKey(i int) string { return fmt.Sprintf("entry/0195b7a2-5c1e-7c55-8d0e-%012d", i) }

func entries(n int) iter.Seq2[store.KV, error] {
	return func(yield func(store.KV, error) bool) {
		for i := range n {
			if !yield(store.KV{Key: entryKey(i), Value: make([]byte, 300), ModRevision: uint64(i) + 2}, nil) {
				return
			}
		}
	}
}

func BenchmarkImport(b *testing.B) {
	n := large(b)
	for b.Loop() {
		if err := badger.Import(b.TempDir(), badger.Options{}, uint64(n)+2, entries(n)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpen reopens a store: closed, and as SIGKILL leaves it.
func BenchmarkOpen(b *testing.B) {
	n := large(b)
	dir := b.TempDir()
	if err := badger.Import(dir, badger.Options{}, uint64(n)+2, entries(n)); err != nil {
		b.Fatal(err)
	}
	s := open(b, dir, badger.Options{})
	changeMany(b, s, n, 150_000) // a log of full length
	used := heap()
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	b.Run("size", func(b *testing.B) {
		for b.Loop() {
		}
		b.ReportMetric(float64(used)/(1<<20), "heap-MiB")
		b.ReportMetric(float64(diskUse(b, dir))/(1<<20), "disk-MiB")
	})
	b.Run("closed", func(b *testing.B) {
		for b.Loop() {
			s := open(b, dir, badger.Options{})
			b.StopTimer()
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
	b.Run("verify", func(b *testing.B) {
		for b.Loop() {
			if r, err := badger.Verify(dir); err != nil || r.Damage != nil {
				b.Fatal(err, r.Damage)
			}
		}
	})
	b.Run("list", func(b *testing.B) {
		s := open(b, dir, badger.Options{})
		defer s.Close()
		for b.Loop() {
			var after string
			var revision uint64
			for more := true; more; {
				kvs, at, next, err := s.List(b.Context(), "entry/", after, 1000, revision)
				if err != nil {
					b.Fatal(err)
				}
				after, revision, more = kvs[len(kvs)-1].Key, at, next
			}
		}
	})
}

// changeMany rewrites random entries with 64 writers.
func changeMany(b *testing.B, s *badger.Store, entries, changes int) {
	b.Helper()
	errs := make(chan error)
	var left atomic.Int64
	left.Store(int64(changes))
	for range 64 {
		go func() {
			var err error
			for err == nil && left.Add(-1) >= 0 {
				_, err = s.Txn(context.Background(), nil, []store.Op{store.Put(entryKey(rand.IntN(entries)), make([]byte, 300))}, nil)
			}
			errs <- err
		}()
	}
	for range 64 {
		if err := <-errs; err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLoad registers the entries one by one with 64 writers, each synced.
func BenchmarkLoad(b *testing.B) {
	n := large(b)
	for b.Loop() {
		s := open(b, b.TempDir(), badger.Options{})
		register(b, s, n)
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "registrations/s")
}

func register(b *testing.B, s *badger.Store, n int) {
	b.Helper()
	var next atomic.Int64
	spreadN(b, 64, n, func() error {
		key := entryKey(int(next.Add(1)) - 1)
		_, err := s.Txn(context.Background(), []store.Cmp{{Key: key}}, []store.Op{store.Put(key, make([]byte, 300))}, nil)
		return err
	})
}

// BenchmarkChange is one change of one entry: it is read, and rewritten if it
// is still the same; every fourth time it is deleted and made anew. Both stores
// run in turns, so that they meet the same machine; what their tables cost in
// the background is in the CPU time.
func BenchmarkChange(b *testing.B) {
	sizes := []int{1000, large(b)}
	var stores []*badger.Store
	for _, n := range sizes {
		s := open(b, b.TempDir(), badger.Options{})
		defer s.Close()
		register(b, s, n)
		changeMany(b, s, n, 50_000)
		stores = append(stores, s)
	}
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) { benchmarkChange(b, stores, sizes, writers) })
	}
}

func benchmarkChange(b *testing.B, stores []*badger.Store, sizes []int, writers int) {
	var wall, cpu [2]time.Duration
	const turn = 2000
	var turns int
	for b.Loop() {
		for i, s := range stores {
			began, used := time.Now(), measure.CPU()
			spreadN(b, writers, turn, func() error { return change(s, entryKey(rand.IntN(sizes[i]))) })
			wall[i] += time.Since(began)
			cpu[i] += measure.CPU() - used
		}
		turns++
	}
	per := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(turns*turn) }
	b.ReportMetric(per(wall[0]), "µs/change-small")
	b.ReportMetric(per(wall[1]), "µs/change-large")
	b.ReportMetric(per(cpu[0]), "cpu-µs/change-small")
	b.ReportMetric(per(cpu[1]), "cpu-µs/change-large")
	b.ReportMetric(float64(wall[1])/float64(wall[0]), "x-wall")
	b.ReportMetric(float64(cpu[1])/float64(cpu[0]), "x-cpu")
}

func change(s *badger.Store, key string) error {
	kv, _, err := s.Get(context.Background(), key)
	if errors.Is(err, store.ErrNotFound) {
		return nil // another one is making it anew
	}
	if err != nil {
		return err
	}
	same := []store.Cmp{{Key: key, ModRevision: kv.ModRevision}}
	if rand.IntN(4) > 0 {
		_, err = s.Txn(context.Background(), same, []store.Op{store.Put(key, kv.Value)}, nil)
		return err
	}
	res, err := s.Txn(context.Background(), same, []store.Op{store.Delete(key)}, nil)
	if err == nil && res.Succeeded {
		_, err = s.Txn(context.Background(), []store.Cmp{{Key: key}}, []store.Op{store.Put(key, kv.Value)}, nil)
	}
	return err
}

// spreadN does something n times in so many goroutines.
func spreadN(b *testing.B, writers, n int, do func() error) {
	b.Helper()
	errs := make(chan error)
	for range writers {
		go func() {
			var err error
			for i := 0; i < n/writers && err == nil; i++ {
				err = do()
			}
			errs <- err
		}()
	}
	for range writers {
		if err := <-errs; err != nil {
			b.Fatal(err)
		}
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// diskUse is what the files of a folder take.
func diskUse(b *testing.B, dir string) (bytes int64) {
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			bytes += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return bytes
}
