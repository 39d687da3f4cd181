// What a commit costs, how soon a watcher sees it, and a read.

package badger_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

// BenchmarkTxn is one acknowledged registration: a new key of about 50 bytes
// with a value of 300, synced.
func BenchmarkTxn(b *testing.B) {
	for _, writers := range []int{1, 64, 512} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			s := open(b, b.TempDir(), badger.Options{})
			defer s.Close()
			value := make([]byte, 300)
			var n atomic.Int64
			b.ReportAllocs()
			spread(b, writers, func() error {
				key := fmt.Sprintf("entry/0195b7a2-5c1e-7c55-8d0e-%012d", n.Add(1))
				_, err := s.Txn(context.Background(), []store.Cmp{{Key: key}}, []store.Op{store.Put(key, value)}, nil)
				return err
			})
		})
	}
}

// spread runs the iterations in so many goroutines.
func spread(b *testing.B, writers int, do func() error) {
	work := make(chan struct{}, writers)
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range work {
				if err := do(); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for b.Loop() {
		work <- struct{}{}
	}
	close(work)
	wg.Wait()
}

// BenchmarkWatch is the way from the call of Txn to a watcher, its median, and
// what of it lies behind the commit.
func BenchmarkWatch(b *testing.B) {
	s := open(b, b.TempDir(), badger.Options{})
	defer s.Close()
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	ch, err := s.Watch(ctx, "", 1)
	if err != nil {
		b.Fatal(err)
	}
	var (
		whole  []time.Duration
		behind time.Duration
	)
	for b.Loop() {
		called := time.Now()
		if _, err := s.Txn(ctx, nil, []store.Op{store.Put("a", nil)}, nil); err != nil {
			b.Fatal(err)
		}
		acknowledged := time.Now()
		<-ch
		behind += time.Since(acknowledged)
		whole = append(whole, time.Since(called))
	}
	slices.Sort(whole)
	b.ReportMetric(float64(whole[len(whole)/2].Nanoseconds()), "p50-ns")
	b.ReportMetric(float64(behind.Nanoseconds())/float64(b.N), "ns-after-commit/op")
}

func BenchmarkGet(b *testing.B) {
	s := open(b, b.TempDir(), badger.Options{})
	defer s.Close()
	if _, err := s.Txn(b.Context(), nil, []store.Op{store.Put("a", make([]byte, 300))}, nil); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := s.Get(b.Context(), "a"); err != nil {
			b.Fatal(err)
		}
	}
}
