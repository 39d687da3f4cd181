// What a reconnect costs: what has changed for the node since, by the CA's own
// counters, however many entries there are.

package ca_test

import (
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

// counter reads one from /metrics.
func (c *testCA) counter(t *testing.T, name string) int {
	t.Helper()
	_, _, text := do(t, httpClient(t, nil, nil), http.MethodGet, "http://"+c.srv.HealthAddress().String()+"/metrics", nil, nil)
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				t.Fatal(err)
			}
			return int(n)
		}
	}
	t.Fatalf("/metrics has no %s", name)
	return 0
}

// TestReconnectCostsWhatChanged has 10 000 entries, or MERLON_SYNC_ENTRIES many, of
// which 1000 are the node's.
func TestReconnectCostsWhatChanged(t *testing.T) {
	all, own := 10_000, 1_000
	if text := os.Getenv("MERLON_SYNC_ENTRIES"); text != "" {
		var err error
		if all, err = strconv.Atoi(text); err != nil || all < own {
			t.Fatalf("MERLON_SYNC_ENTRIES=%s: want at least %d", text, own)
		}
	}
	dir := tempDir(t)
	c := startCA(t, dir)
	a := c.agent("n1")
	c.stop()
	fillEntries(t, all, func() (store.Store, error) {
		return badger.Open(filepath.Join(dir, "data", "store"), badger.Options{Logger: slog.New(slog.DiscardHandler)})
	}, func(i int) *entry.Entry {
		e := benchEntry(i)
		if i < own {
			e.ParentID = spiffeid.RequireFromString(a.id)
		}
		return e
	})

	const listings, pushed = "merlon_sync_full_listings_total", "merlon_sync_pushed_entries_total"
	reconnect := func(resume uint64) (got []*capb.SyncResponse, at uint64) {
		t.Helper()
		began := time.Now()
		client := c.client(a.key, a.chain)
		defer client.conn.Close()
		stream := client.sync(resume)
		at = until(t, stream, func(m *capb.SyncResponse) bool { got = append(got, m); return m.GetSynced() }).GetRevision()
		t.Logf("in sync from %d after %s", resume, time.Since(began))
		return got, at
	}
	wantSent := func(what string, got []*capb.SyncResponse, listing bool, entries, removed int) {
		t.Helper()
		gotEntries, gotRemoved := 0, 0
		for _, m := range got {
			gotEntries += len(m.GetEntries())
			gotRemoved += len(m.GetRemovedEntryIds())
		}
		if got[0].GetReset_() != listing || gotEntries != entries || gotRemoved != removed {
			t.Errorf("%s: listing %t, %d entries, %d removed; want %t, %d, %d", what, got[0].GetReset_(), gotEntries, gotRemoved, listing, entries, removed)
		}
	}

	c = startCA(t, dir)
	got, at := reconnect(0)
	wantSent("a new agent", got, true, own, 0)
	if c.counter(t, listings) != 1 || c.counter(t, pushed) != own {
		t.Errorf("counted %d listings and %d entries; want 1 and %d", c.counter(t, listings), c.counter(t, pushed), own)
	}

	// Away, while things change here and elsewhere.
	kept := c.entry("n1", "new1")
	if _, err := c.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: got[0].GetEntries()[0].GetEntryId()}); err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		c.entry("node-00007", fmt.Sprintf("other%d", i))
	}
	got, at = reconnect(at)
	wantSent("after a while", got, false, 1, 1)
	if got[0].GetEntries()[0].GetEntryId() != kept.GetEntryId() {
		t.Errorf("it is sent %v; want the entry that was made", got[0].GetEntries())
	}
	got, at = reconnect(at)
	wantSent("with nothing new", got, false, 0, 0)
	if c.counter(t, listings) != 1 || c.counter(t, pushed) != own+2 {
		t.Errorf("counted %d listings and %d entries; want 1 and %d", c.counter(t, listings), c.counter(t, pushed), own+2)
	}

	// The CA starts again, and knows from its store what went.
	if _, err := c.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: kept.GetEntryId()}); err != nil {
		t.Fatal(err)
	}
	c.stop()
	c = startCA(t, dir)
	got, _ = reconnect(at)
	wantSent("after the CA started again", got, false, 0, 1)
	if c.counter(t, listings) != 0 || c.counter(t, pushed) != 1 {
		t.Errorf("counted %d listings and %d entries; want 0 and 1", c.counter(t, listings), c.counter(t, pushed))
	}
}
