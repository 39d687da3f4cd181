// How soon a CA is ready on a store that holds many entries, and what it then
// holds in memory: the whole CA, from Run to Ready, on either store.

package ca_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
)

// BenchmarkReady starts a CA beside 10 000 entries, or MERLON_BENCH_LARGE many.
func BenchmarkReady(b *testing.B) {
	n := 10_000
	if text := os.Getenv("MERLON_BENCH_LARGE"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("badger", func(b *testing.B) {
		dir := tempDir(b)
		benchReady(b, dir, n, func() (store.Store, error) {
			return badger.Open(filepath.Join(dir, "data", "store"), badger.Options{Logger: slog.New(slog.DiscardHandler)})
		})
	})
	b.Run("etcd", func(b *testing.B) {
		e := stage.StartEtcd(b, 3, "--quota-backend-bytes=8589934592")
		benchReady(b, tempDir(b), n, func() (store.Store, error) {
			return etcd.Open(b.Context(), etcd.Config{
				Endpoints: e.Endpoints(), CAFile: e.Files.CA, CertFile: e.Files.Cert, KeyFile: e.Files.Key,
				Logger: slog.New(slog.DiscardHandler),
			})
		}, onEtcd(e))
		for _, m := range e.Members {
			b.ReportMetric(mebibytes(b, m.PID()), "MiB-"+m.Name)
		}
	})
}

func benchReady(b *testing.B, dir string, n int, open func() (store.Store, error), changes ...func(*ca.Config)) {
	b.Helper()
	c := startCA(b, dir, changes...) // makes the keys
	c.agent("n1")
	c.stop()
	loading := time.Now()
	last := fillEntries(b, n, open, benchEntry)
	loaded := time.Since(loading)
	for b.Loop() {
		debug.FreeOSMemory()
		began, used := time.Now(), measure.CPU()
		c := startCA(b, dir, changes...)
		b.ReportMetric(time.Since(began).Seconds(), "s-ready")
		b.ReportMetric((measure.CPU() - used).Seconds(), "cpu-s-ready")
		debug.FreeOSMemory()
		b.ReportMetric(mebibytes(b, os.Getpid()), "MiB-ca")
		if _, err := c.admin.GetEntry(b.Context(), &capb.GetEntryRequest{EntryId: last}); err != nil {
			b.Fatal(err)
		}
		c.entry("n1", fmt.Sprintf("new-%d", time.Now().UnixNano())) // it takes writes
		c.stop()
	}
	b.ReportMetric(loaded.Seconds(), "s-load")
}

// fillEntries writes n entries past the CA, which is stopped, and returns the ID of
// the last.
func fillEntries(b testing.TB, n int, open func() (store.Store, error), newEntry func(i int) *entry.Entry) (last string) {
	b.Helper()
	st, err := open()
	if err != nil {
		b.Fatal(err)
	}
	var writers errgroup.Group
	writers.SetLimit(64)
	for at := 0; at < n; at += store.MaxTxnOps {
		writers.Go(func() error {
			var ops []store.Op
			for i := at; i < min(n, at+store.MaxTxnOps); i++ {
				e := newEntry(i)
				value, err := entry.Encode(e)
				if err != nil {
					return err
				}
				ops = append(ops, store.Put(registry.EntryPrefix+e.ID, value))
				if i == n-1 {
					last = e.ID
				}
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
	return last
}

// benchEntry is the entry i of 10 000 agents.
func benchEntry(i int) *entry.Entry {
	td := spiffeid.RequireTrustDomainFromString("shop.test")
	return &entry.Entry{
		ID: entry.NewID(), CreatedAt: time.Now(),
		SPIFFEID: spiffeid.RequireFromPathf(td, "/ns/team-%d/sa/service-%d", i%1000, i),
		ParentID: spiffeid.RequireFromPathf(td, "/agent/node-%05d", i%10_000),
		Selectors: []entry.Selector{
			{Type: "unix", Value: fmt.Sprintf("uid:%d", 1000+i%5000)}, {Type: "unix", Value: fmt.Sprintf("path:/usr/bin/service-%d", i)},
		},
	}
}

// mebibytes is how much memory a process has in use.
func mebibytes(b *testing.B, pid int) float64 {
	b.Helper()
	now, _ := measure.MemoryOf(b, pid)
	return float64(now) / (1 << 20)
}
