// Keys that the CA does not find where it starts, or finds withdrawn.

package ca_test

import (
	"bytes"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
)

// A key that is lost is replaced, and nobody has to find that out.
func TestLostJWTKeyIsReplacedAndRecorded(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	lost, intermediate := c.authority(jwtKind, "active", "ca").GetAuthorityId(), c.authority("x509-intermediate", "active", "ca").GetAuthorityId()
	c.stop()
	for _, pattern := range []string{"jwt-*", "intermediate-*"} {
		for _, name := range glob(t, dir, pattern) {
			if err := os.RemoveAll(filepath.Join(dir, "data", "keys", name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	var log bytes.Buffer
	c = startCA(t, dir, func(cfg *ca.Config) { cfg.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	next, made := c.authority(jwtKind, "active", "ca").GetAuthorityId(), c.authority("x509-intermediate", "active", "ca").GetAuthorityId()
	if next == lost || made == intermediate {
		t.Fatalf("JWT key %s and intermediate %s sign; their keys are gone", next, made)
	}
	if n := c.recordsOf(next, "admin", "activate authority by force, in place of "+lost); n != 1 {
		t.Errorf("%d records that another JWT key signs; want 1", n)
	}
	if n := c.recordsOf(made, "renew", "intermediate"); n != 1 {
		t.Errorf("%d records of the intermediate that was made at the start; want 1", n)
	}
	c.stop()
	if !strings.Contains(log.String(), "another JWT key signs from now on") {
		t.Errorf("the log does not say so: %s", log.String())
	}
	c = startCA(t, dir)
	if n := c.recordsOf(made, "renew", "intermediate"); n != 1 {
		t.Errorf("%d records of the intermediate after another start; want 1", n)
	}
}

// What an old copy of the keys holds may be withdrawn by now: it does not come
// back, and JWT-SVIDs are signed all the same.
func TestWithdrawnJWTKeyOfAnOldCopyIsReplaced(t *testing.T) {
	t.Parallel() // it mostly waits
	for state, withdraw := range map[string]func(c *testCA, id string) error{
		"revoked": func(c *testCA, id string) error { return c.revoke(id, true) },
		"tainted": func(c *testCA, id string) error {
			_, err := c.admin.TaintAuthority(t.Context(), &capb.TaintAuthorityRequest{AuthorityId: id})
			return err
		},
	} {
		dir := tempDir(t)
		c := startCA(t, dir, quick)
		c.stop()
		keys, older := filepath.Join(dir, "data", "keys"), filepath.Join(dir, "older")
		if out, err := exec.CommandContext(t.Context(), "cp", "-a", keys, older).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		c = startCA(t, dir, quick)
		old, next := c.authority(jwtKind, "active", "ca").GetAuthorityId(), c.prepare(jwtKind)
		if err := c.activate(next, true); err != nil {
			t.Fatal(err)
		}
		if err := withdraw(c, old); err != nil {
			t.Fatal(err)
		}
		c.stop()
		if err := errors.Join(os.RemoveAll(keys), os.Rename(older, keys)); err != nil {
			t.Fatal(err)
		}
		c = startCA(t, dir, quick)
		active := c.authority(jwtKind, "active", "ca").GetAuthorityId()
		if active == old || active == next {
			t.Fatalf("%s: JWT key %s is active; %s is withdrawn, and %s is lost", state, active, old, next)
		}
		if a := c.authority(jwtKind, state, "ca"); a.GetAuthorityId() != old {
			t.Errorf("%s is %s; want %s", old, a.GetState(), state)
		}
		if kid := c.agent("n1").jwtKeyID(c.entry("n1", "web")); kid != active {
			t.Errorf("%s: %s signs; want %s", state, kid, active)
		}
		if n := c.recordsOf(active, "admin", "activate authority by force, in place of "+next); n != 1 {
			t.Errorf("%s: %d records that another JWT key signs; want 1", state, n)
		}
		if code, body := c.get("/ready"); code != http.StatusOK {
			t.Errorf("%s: /ready = %d %s", state, code, body)
		}
		c.stop()
	}
}

// recordsOf counts the records of an authority.
func (c *testCA) recordsOf(id, kind, detail string) (n int) {
	c.t.Helper()
	for _, r := range c.auditRecords() {
		if r["authority_id"] == id && r["type"] == kind && text(r["detail"]) == detail {
			n++
		}
	}
	return n
}
