// A root that ends, with a successor that not everybody knows.

package ca_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"merlon.dev/ca"
	"merlon.dev/sdk/svid"
)

// rootOf makes the first root of a CA in dir, which lives for so long; those that
// follow live for a year.
func rootOf(t *testing.T, dir string, life time.Duration) {
	t.Helper()
	startCA(t, dir, quick, func(cfg *ca.Config) { cfg.RootTTL, cfg.IntermediateTTL = life, life }).stop()
}

// An agent that never acknowledges does not take everybody down with it: the
// next root signs while the others can still renew, and who was left behind is
// on record.
func TestLastCallLetsTheNextRootSign(t *testing.T) {
	t.Parallel() // it mostly waits
	dir, log := tempDir(t), &bytes.Buffer{}
	rootOf(t, dir, 16*time.Second)
	c := startCA(t, dir, quick, func(cfg *ca.Config) {
		cfg.Logger = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelError}))
	})
	silent := c.agent("silent")
	entry := c.entry("silent", "web")
	before := c.authority(rootKind, "active", "")
	next := c.prepare(rootKind)
	last := before.GetNotAfter().AsTime().Add(-2 * time.Second) // an eighth of its life
	if p := c.authority(rootKind, "published", "").GetPending(); !p.GetLastCall().AsTime().Equal(last) || p.GetReady() {
		t.Errorf("pending = %v; want its last call at %s", p, last)
	}
	wantCode(t, c.activate(next, false), codes.FailedPrecondition)
	_, metrics := c.get("/metrics")
	for _, want := range []string{
		`merlon_ca_pending_step_waits{for="agents",kind="x509-root",step="activate"} 1`,
		`merlon_ca_pending_step_waits{for="silent_replicas",kind="x509-root",step="activate"} 0`,
		`merlon_ca_pending_step_since_timestamp_seconds{kind="x509-root",step="activate"} 1.`,
		`merlon_ca_expiry_timestamp_seconds{authority="root"} 1.`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	if strings.Contains(metrics, silent.id) {
		t.Error("/metrics names an agent")
	}
	var signs time.Time
	eventually(t, "the next root signs", func() bool {
		for _, a := range c.authorities() {
			if a.GetAuthorityId() == next && a.GetState() == "active" {
				signs = a.GetSince()["active"].AsTime()
				return true
			}
		}
		return false
	})
	if signs.Before(last) {
		t.Errorf("it signs from %s; want not before the last call at %s", signs, last)
	}
	eventually(t, "SVIDs are under it", func() bool {
		_, chain := silent.svid(entry)
		keys, _ := c.trustBundle()
		peer, err := svid.VerifyRawChain(chain, keys.X509Bundle(), time.Now())
		return err == nil && peer.AuthorityIDs[len(peer.AuthorityIDs)-1] == next
	})
	want := "activate authority at the last call, because " + before.GetAuthorityId() + " ends; left behind of 1: " + silent.id
	if n := c.recordsOf(next, "admin", want); n != 1 {
		t.Errorf("%d records of whom it left behind; want 1: %v", n, c.auditRecords())
	}
	if _, body := c.get("/metrics"); !strings.Contains(body, "merlon_ca_last_calls_total 1") {
		t.Error("/metrics does not count it")
	}
	c.stop()
	if !strings.Contains(log.String(), "root signs at the last call") || !strings.Contains(log.String(), silent.id) {
		t.Errorf("the log names nobody: %s", log)
	}
}

// A CA that was away when its root ended goes on with the one that was published
// by then, which agents know.
func TestCAGoesOnWithThePublishedRoot(t *testing.T) {
	t.Parallel() // it mostly waits
	const life = 12 * time.Second
	dir := tempDir(t)
	rootOf(t, dir, life)
	c := startCA(t, dir, quick)
	c.entry("n1", "web")
	before, next := c.authority(rootKind, "active", "").GetAuthorityId(), c.prepare(rootKind)
	c.stop()
	time.Sleep(life + time.Second)
	log := &bytes.Buffer{}
	c = startCA(t, dir, quick, func(cfg *ca.Config) { cfg.Logger = slog.New(slog.NewTextHandler(log, nil)) })
	if got := c.authority(rootKind, "active", "").GetAuthorityId(); got != next {
		t.Fatalf("root = %s; want %s, which was published", got, next)
	}
	if n := c.recordsOf(next, "admin", "activate authority in place of "+before+", which ended while this CA was away"); n != 1 {
		t.Errorf("%d records of it; want 1", n)
	}
	keys, _ := c.trustBundle()
	_, chain := c.agent("n1").svid(c.entry("n1", "api"))
	if _, err := svid.VerifyRawChain(chain, keys.X509Bundle(), time.Now()); err != nil {
		t.Error(err)
	}
	c.stop()
	if !strings.Contains(log.String(), "the published one signs from now on") {
		t.Errorf("the log does not say so: %s", log)
	}
}
