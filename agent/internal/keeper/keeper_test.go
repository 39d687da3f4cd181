// How often the disk is written to, and what happens when it fails.

package keeper

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/datadir"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/seal"
	"merlon.dev/sdk/svid/forge"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const td = "example.test"

// away is a CA that does not answer.
type away struct{}

var errAway = status.Error(codes.Unavailable, "away")

func (away) Sign(context.Context, []*capb.SignItem) ([]*capb.SignResult, error) { return nil, errAway }

func (away) SignJWT(context.Context, []*capb.SignJWTItem) ([]*capb.SignJWTResult, error) {
	return nil, errAway
}

func newCache(tb testing.TB, trust *cache.Trust) *cache.Cache {
	tb.Helper()
	c := cache.New(cache.Options{
		TrustDomain: spiffeid.RequireTrustDomainFromString(td), Authority: away{},
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	c.SetTrust(tb.Context(), trust)
	return c
}

func newTrust(tb testing.TB) *cache.Trust {
	tb.Helper()
	jwks, err := forge.New(tb, td).Bundle().Marshal()
	if err != nil {
		tb.Fatal(err)
	}
	trust, err := cache.ParseTrust(&capb.TrustBundle{TrustDomain: td, Sequence: 1, Jwks: jwks}, td)
	if err != nil {
		tb.Fatal(err)
	}
	return trust
}

func newKeeper(tb testing.TB, folder string, c *cache.Cache, agentID string) (*Keeper, *datadir.Dir, *strings.Builder) {
	tb.Helper()
	var log strings.Builder
	logger := slog.New(slog.NewTextHandler(&log, nil))
	dir, err := datadir.Open(folder, td, seal.Source{}, logger)
	if err != nil {
		tb.Fatal(err)
	}
	return New(Config{
		Dir: dir, Cache: c, TrustDomain: td, AgentID: func() string { return agentID }, Secrets: true,
		Logger: logger, Registerer: prometheus.NewRegistry(),
	}), dir, &log
}

// written is how often the disk was written to.
func written(t *testing.T, k *Keeper) float64 {
	t.Helper()
	families, err := k.cfg.Registerer.(*prometheus.Registry).Gather()
	if err != nil || len(families) != 1 || len(families[0].GetMetric()) != 1 {
		t.Fatalf("metrics: %v, %v", families, err)
	}
	return families[0].GetMetric()[0].GetCounter().GetValue()
}

// put changes one entry, the revision's own.
func put(tb testing.TB, c *cache.Cache, revision uint64) {
	tb.Helper()
	if err := c.Apply(tb.Context(), &capb.SyncResponse{Revision: revision, Synced: true, Entries: []*capb.Entry{entry(revision)}}); err != nil {
		tb.Fatal(err)
	}
}

func entry(n uint64) *capb.Entry {
	return &capb.Entry{
		EntryId: fmt.Sprintf("entry-%d", n), SpiffeId: fmt.Sprintf("spiffe://%s/ns/shop/workload-%d", td, n), Revision: n,
		Selectors: []*capb.Selector{{Type: "unix", Value: "uid:1000"}, {Type: "unix", Value: fmt.Sprintf("path:/usr/bin/workload-%d", n)}},
	}
}

func list(tb testing.TB, c *cache.Cache, n uint64) {
	tb.Helper()
	m := &capb.SyncResponse{Revision: n, Reset_: true, Synced: true}
	for i := range n {
		m.Entries = append(m.Entries, entry(i+1))
	}
	if err := c.Apply(tb.Context(), m); err != nil {
		tb.Fatal(err)
	}
}

func TestChangesGatherBeforeTheDiskIsWritten(t *testing.T) {
	trust := newTrust(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, trust)
		folder := filepath.Join(t.TempDir(), "data")
		k, _, _ := newKeeper(t, folder, c, "")
		list(t, c, 10)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		// Three seconds of a change every millisecond.
		for i := range uint64(3000) {
			put(t, c, 11+i)
			time.Sleep(time.Millisecond)
		}
		if got := written(t, k); got < 2 || got > 3000/float64((settle+minPause).Milliseconds())+1 {
			t.Errorf("%v writes of 3000 changes", got)
		}
		put(t, c, 99_999) // too late for the next, but for the end
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if k.Revision() != 99_999 {
			t.Errorf("revision %d is on the disk; want the last one", k.Revision())
		}
		again := newCache(t, trust)
		other, _, log := newKeeper(t, folder, again, "")
		if err := other.Load(t.Context()); err != nil || again.State().Entries != 3011 || other.Revision() != 99_999 {
			t.Errorf("Load = %v, %d entries at revision %d; %s", err, again.State().Entries, other.Revision(), log)
		}
	})
}

func TestFailingDiskIsSaidOnceAndTriedAgain(t *testing.T) {
	trust := newTrust(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, trust)
		folder := filepath.Join(t.TempDir(), "data")
		k, _, log := newKeeper(t, folder, c, "")
		if err := os.Rename(folder, folder+".away"); err != nil {
			t.Fatal(err)
		}
		list(t, c, 3)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		time.Sleep(time.Minute)
		if _, err := k.State(); err == nil || k.Revision() != 0 || strings.Count(log.String(), "cache not written") != 1 {
			t.Errorf("State = %v, revision %d; log: %s", err, k.Revision(), log)
		}
		if err := os.Rename(folder+".away", folder); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if at, err := k.State(); err != nil || at.IsZero() || k.Revision() != 3 {
			t.Errorf("State = %v, %v, revision %d; want it on the disk", at, err, k.Revision())
		}
		cancel()
		<-done
	})
}

// A cache of another agent, or under another key, is not this node's.
func TestForeignCacheIsSetAside(t *testing.T) {
	trust := newTrust(t)
	for name, tt := range map[string]struct {
		agentID string
		rekey   bool
		want    string
	}{
		"the same agent": {"spiffe://example.test/agent/a", false, "cache taken up"},
		"not known yet":  {"", false, "cache taken up"},
		"another agent":  {"spiffe://example.test/agent/b", false, "this is spiffe://example.test/agent/b"},
		"another key":    {"spiffe://example.test/agent/a", true, "another key-encryption key"},
	} {
		t.Run(name, func(t *testing.T) {
			folder := filepath.Join(t.TempDir(), "data")
			c := newCache(t, trust)
			list(t, c, 3)
			k, _, _ := newKeeper(t, folder, c, "spiffe://example.test/agent/a")
			if !k.save(t.Context()) {
				t.Fatal("not saved")
			}
			if tt.rekey {
				if err := os.Remove(filepath.Join(folder, seal.KeyFile)); err != nil {
					t.Fatal(err)
				}
			}
			again := newCache(t, trust)
			k, _, log := newKeeper(t, folder, again, tt.agentID)
			if err := k.Load(t.Context()); err != nil || !strings.Contains(log.String(), tt.want) {
				t.Errorf("Load = %v; log: %s", err, log)
			}
			taken := tt.want == "cache taken up"
			if again.State().Synced != taken {
				t.Errorf("taken up: %v", again.State())
			}
			if aside, _ := filepath.Glob(filepath.Join(folder, "*set-aside*")); (len(aside) == 0) != taken {
				t.Errorf("set aside: %q", aside)
			}
		})
	}
}

// BenchmarkKeep10k is what a change costs where a node has 10 000 entries: change
// is what the stream waits for, write what happens beside it, load what a start
// takes.
func BenchmarkKeep10k(b *testing.B) {
	const n = 10_000
	trust := newTrust(b)
	c := newCache(b, trust)
	list(b, c, n)
	folder := filepath.Join(b.TempDir(), "data")
	k, dir, _ := newKeeper(b, folder, c, "")
	b.Run("change", func(b *testing.B) {
		b.ReportAllocs()
		for i := uint64(n + 1); b.Loop(); i++ {
			put(b, c, i)
		}
	})
	c = newCache(b, trust)
	list(b, c, n)
	k.cfg.Cache = c
	b.Run("write", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if !k.save(b.Context()) {
				b.Fatal("not saved")
			}
		}
		content, err := dir.Read(b.Context(), file)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(content)), "bytes")
	})
	b.Run("load", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			again, _, _ := newKeeper(b, folder, newCache(b, trust), "")
			if err := again.Load(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	})
}
