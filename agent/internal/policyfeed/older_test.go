package policyfeed

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/agent/internal/datadir"
	"merlon.dev/sdk/seal"
)

// T27: a generation below one that was active is not even asked for, and the fault says
// what it means. What verifies bundles would refuse it, too.
func TestOlderGenerationIsNotAskedFor(t *testing.T) {
	a := newAuthority(t, "orders")
	dir, err := datadir.Open(filepath.Join(t.TempDir(), "data"), "shop.test", seal.Source{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		f, end := a.feed(t, dir)
		announce := func(generation uint64) {
			a.mu.Lock()
			a.generation = generation
			a.mu.Unlock()
			announced := a.announcement()
			announced.Generation, announced.Candidate = generation, nil
			f.Announce(announced)
			time.Sleep(10 * time.Second)
		}
		announce(5)
		if f.Generation() != 5 || f.Fault() != "" {
			t.Fatalf("generation %d is in use, fault %q; want 5 and none", f.Generation(), f.Fault())
		}
		asked := a.requests()
		announce(4)
		if f.Generation() != 5 || a.requests() != asked {
			t.Errorf("generation %d is in use after %d requests more; want 5 and none", f.Generation(), a.requests()-asked)
		}
		if got, want := f.Fault(), "generation 4 is announced, but generation 5 was active before"; !strings.Contains(got, want) {
			t.Errorf("fault %q; want %q", got, want)
		}
		announce(6)
		if f.Generation() != 6 || f.Fault() != "" {
			t.Errorf("generation %d is in use, fault %q; want 6 and none", f.Generation(), f.Fault())
		}
		end()
	})
}
