// What a commit costs, how soon a watcher sees it, and a read.

package badger_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/store/storetest"
)

func BenchmarkTxn(b *testing.B) {
	storetest.BenchmarkTxn(b, func(b *testing.B) store.Store { return open(b, b.TempDir(), badger.Options{}) })
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
