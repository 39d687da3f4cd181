// What the picture costs: a change, a page, the grounds of an issuance, memory
// per entry and, with MERLON_BENCH_LARGE=1, opening a store of a million.

package registry

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/integration/measure"
)

const (
	large  = 1_000_000
	agents = 10_000
)

// realEntry is entry number n as operators make them.
func realEntry(tb testing.TB, n int) store.KV {
	tb.Helper()
	op := encoded(tb, &entry.Entry{
		ID: entry.NewID(), CreatedAt: time.Now(),
		SPIFFEID: spiffeid.RequireFromPathf(td, "/ns/team-%d/sa/service-%d", n%1000, n),
		ParentID: spiffeid.RequireFromPathf(td, "/agent/node-%05d", n%agents),
		Selectors: []entry.Selector{
			{Type: "unix", Value: fmt.Sprintf("uid:%d", 1000+n%5000)}, {Type: "unix", Value: fmt.Sprintf("path:/usr/bin/service-%d", n)},
		},
	})
	return store.KV{Key: op.Key, Value: op.Value, ModRevision: uint64(n + 1)}
}

// filled is a registry of n entries without a store, and some of their records.
func filled(tb testing.TB, n int) (r *Registry, some []store.KV) {
	tb.Helper()
	var dec entry.Decoder
	all := make([]*entry.Entry, n)
	for i := range all {
		kv := realEntry(tb, i)
		var err error
		if all[i], err = decodeEntry(kv, &dec); err != nil {
			tb.Fatal(err)
		}
		if len(some) < 1000 {
			some = append(some, kv)
		}
	}
	pic := &picture{
		revision: uint64(n), entries: indexed(all),
		heads: make(map[string]*release.Head), replicas: replicas{byName: make(map[string]*replica.Record)},
	}
	return newRegistry(nil, slog.New(slog.DiscardHandler), pic), some
}

// The cost of one change must not depend on how many entries there are: within
// 2 ×. An operation is one new entry and one that goes.
func BenchmarkChange(b *testing.B) {
	for _, n := range []int{1_000, 100_000, large} {
		b.Run(fmt.Sprintf("entries=%d", n), func(b *testing.B) {
			r, _ := filled(b, n)
			fresh := make([]store.KV, 5000)
			for i := range fresh {
				fresh[i] = realEntry(b, n+i)
			}
			revision := uint64(n)
			change := func(ev store.Event) {
				revision++
				ev.KV.ModRevision = revision
				if err := r.apply(b.Context(), store.Batch{Revision: revision, Events: []store.Event{ev}}); err != nil {
					b.Fatal(err)
				}
			}
			runtime.GC()
			b.ReportAllocs()
			b.ResetTimer()
			before := measure.CPU()
			for i := 0; b.Loop(); i++ {
				kv := fresh[i%len(fresh)]
				change(store.Event{KV: kv})
				change(store.Event{KV: store.KV{Key: kv.Key}, Delete: true})
			}
			b.ReportMetric(float64(measure.CPU()-before)/float64(b.N), "cpu-ns/op")
		})
	}
}

func BenchmarkRead(b *testing.B) {
	r, some := filled(b, large)
	b.Run("page", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if page, more := r.Entries(Filter{}, some[i%len(some)].Key[len(EntryPrefix):], 1000); !more && len(page) == 0 {
				b.Fatal("an empty page")
			}
		}
	})
	b.Run("page of one agent", func(b *testing.B) {
		f := Filter{ParentID: spiffeid.RequireFromPathf(td, "/agent/node-%05d", 7).String()}
		b.ReportAllocs()
		for b.Loop() {
			if page, _ := r.Entries(f, "", 1000); len(page) != large/agents {
				b.Fatalf("%d entries", len(page))
			}
		}
	})
	b.Run("page of a registrar", func(b *testing.B) { // looks at every entry
		team := role.Role{Name: role.Registrar, Prefix: "/ns/team-7"}
		f := Filter{Only: func(e *entry.Entry) bool { return team.Covers(e.SPIFFEID.Path()) }}
		b.ReportAllocs()
		for b.Loop() {
			if page, _ := r.Entries(f, "", 1000); len(page) != large/1000 {
				b.Fatalf("%d entries", len(page))
			}
		}
	})
	b.Run("role", func(b *testing.B) { // of most: none
		id := spiffeid.RequireFromPath(td, "/ns/team-7/sa/service-7")
		b.ReportAllocs()
		for b.Loop() {
			if r.Role(id, noon) != (role.Role{}) {
				b.Fatal("a role")
			}
		}
	})
	b.Run("grounds", func(b *testing.B) {
		p := peerAt(b, spiffeid.RequireFromPathf(td, "/agent/node-%05d", 7), 1)
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if g := r.Grounds(p, some[i%len(some)].Key[len(EntryPrefix):]); g.Entries[0] == nil {
				b.Fatal("no entry")
			}
		}
	})
}

func BenchmarkBytesPerEntry(b *testing.B) {
	for _, n := range []int{100_000, 400_000, large} {
		b.Run(fmt.Sprintf("entries=%d", n), func(b *testing.B) {
			for b.Loop() {
				before := live()
				r, some := filled(b, n)
				b.ReportMetric(float64(live()-before)/float64(n), "B/entry")
				runtime.KeepAlive(r)
				runtime.KeepAlive(some)
			}
		})
	}
}

func live() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func BenchmarkOpen(b *testing.B) {
	if os.Getenv("MERLON_BENCH_LARGE") == "" {
		b.Skip("writes a million entries: set MERLON_BENCH_LARGE=1")
	}
	dir := b.TempDir()
	fill(b, dir, large)
	for b.Loop() {
		st, err := badger.Open(dir, badger.Options{})
		if err != nil {
			b.Fatal(err)
		}
		begin, before := time.Now(), measure.CPU()
		r, err := Open(b.Context(), st, slog.New(slog.DiscardHandler))
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(time.Since(begin).Seconds(), "s/open")
		b.ReportMetric((measure.CPU() - before).Seconds(), "cpu-s/open")
		if n, _, _, _ := r.Counts(); n != large {
			b.Fatalf("%d entries", n)
		}
		if err := st.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// fill writes n entries to a store in dir.
func fill(b *testing.B, dir string, n int) {
	b.Helper()
	st, err := badger.Open(dir, badger.Options{KeepRevisions: 1000})
	if err != nil {
		b.Fatal(err)
	}
	var writers errgroup.Group
	writers.SetLimit(64)
	for at := 0; at < n; at += store.MaxTxnOps {
		writers.Go(func() error {
			var ops []store.Op
			for i := at; i < min(n, at+store.MaxTxnOps); i++ {
				kv := realEntry(b, i)
				ops = append(ops, store.Put(kv.Key, kv.Value))
			}
			_, err := st.Txn(context.Background(), nil, ops, nil)
			return err
		})
	}
	if err := writers.Wait(); err != nil {
		b.Fatal(err)
	}
	if err := st.Close(); err != nil {
		b.Fatal(err)
	}
}
