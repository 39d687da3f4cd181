// What a commit costs, how soon a watcher sees it, and a store with a million
// entries, on three members on one machine.

package etcd_test

import (
	"context"
	"fmt"
	"iter"
	"os"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/ca/internal/store/storetest"
	"merlon.dev/integration/stage"
)

// BenchmarkTxn is synced by a majority of three members.
func BenchmarkTxn(b *testing.B) {
	e := stage.StartEtcd(b, 3)
	storetest.BenchmarkTxn(b, func(b *testing.B) store.Store { return open(b, config(e)) })
}

// BenchmarkWatch is the way from the call of Txn to a watcher, and what of it
// lies behind the commit.
func BenchmarkWatch(b *testing.B) {
	s := open(b, config(stage.StartEtcd(b, 3)))
	defer s.Close()
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	ch, err := s.Watch(ctx, "", 0)
	if err != nil {
		b.Fatal(err)
	}
	var behind time.Duration
	for b.Loop() {
		put(b, s, "a", "")
		acknowledged := time.Now()
		<-ch
		behind += time.Since(acknowledged)
	}
	b.ReportMetric(float64(behind.Nanoseconds())/float64(b.N), "ns-after-commit/op")
}

func BenchmarkGet(b *testing.B) {
	s := open(b, config(stage.StartEtcd(b, 3)))
	defer s.Close()
	put(b, s, "a", string(make([]byte, 300)))
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := s.Get(b.Context(), "a"); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLarge fills a store with 10 000 entries, with MERLON_BENCH_LARGE a
// million, opens it and lists it as a CA does that starts.
func BenchmarkLarge(b *testing.B) {
	n := 10_000
	if os.Getenv("MERLON_BENCH_LARGE") != "" {
		n = 1_000_000
	}
	e := stage.StartEtcd(b, 3, "--quota-backend-bytes=8589934592")
	for b.Loop() {
		cfg := config(e)
		began := time.Now()
		if err := etcd.Import(b.Context(), cfg, uint64(n), entries(n)); err != nil {
			b.Fatal(err)
		}
		imported := time.Now()
		s := open(b, cfg)
		listed := 0
		for after, revision, more := "", uint64(0), true; more; {
			var kvs []store.KV
			var err error
			if kvs, revision, more, err = s.List(b.Context(), "entry/", after, 1000, revision); err != nil {
				b.Fatal(err)
			}
			listed += len(kvs)
			after = kvs[len(kvs)-1].Key
		}
		if listed != n {
			b.Fatalf("%d listed; want %d", listed, n)
		}
		b.ReportMetric(imported.Sub(began).Seconds(), "s-import")
		b.ReportMetric(time.Since(imported).Seconds(), "s-open-list")
		s.Close()
		status, err := e.Client().Status(b.Context(), e.Members[0].Endpoint)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(status.DbSize>>20), "MiB-db")
	}
}

func entries(n int) iter.Seq2[store.KV, error] {
	value := make([]byte, 300)
	return func(yield func(store.KV, error) bool) {
		for i := range n {
			kv := store.KV{Key: fmt.Sprintf("entry/0195b7a2-5c1e-7c55-8d0e-%012d", i), Value: value, ModRevision: uint64(i + 1)}
			if !yield(kv, nil) {
				return
			}
		}
	}
}
