package storetest

// What is measured of every store.

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"merlon.dev/ca/internal/store"
)

// BenchmarkTxn is one acknowledged registration by 1, 64 and 512 writers: a new
// key of about 50 bytes with a value of 300. Each run has a store of its own.
func BenchmarkTxn(b *testing.B, open func(*testing.B) store.Store) {
	for _, writers := range []int{1, 64, 512} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			s := open(b)
			defer s.Close()
			value := make([]byte, 300)
			var n atomic.Int64
			b.ReportAllocs()
			defer func() { b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "txn/s") }()
			Spread(b, writers, func() error {
				key := fmt.Sprintf("entry/0195b7a2-5c1e-7c55-8d0e-%012d", n.Add(1))
				_, err := s.Txn(context.Background(), []store.Cmp{{Key: key}}, []store.Op{store.Put(key, value)}, nil)
				return err
			})
		})
	}
}

// Spread runs the iterations in so many goroutines.
func Spread(b *testing.B, writers int, do func() error) {
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
