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
	"slices"
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
		bringOlder := keepKeys(t, dir, "older")
		c = startCA(t, dir, quick)
		old, next := c.authority(jwtKind, "active", "ca").GetAuthorityId(), c.prepare(jwtKind)
		if err := c.activate(next, true); err != nil {
			t.Fatal(err)
		}
		if err := withdraw(c, old); err != nil {
			t.Fatal(err)
		}
		c.stop()
		bringOlder()
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

// The start with an older copy of the keys stands when the newest come back; while
// something that the newer root signed lives, it can sign again.
func TestNewestKeysDoNotUndoTheStartWithOlderOnes(t *testing.T) {
	t.Parallel() // it mostly waits
	dir := tempDir(t)
	c := startCA(t, dir)
	bringOlder := keepKeys(t, dir, "older")
	first, second := c.authority(rootKind, "active", "").GetAuthorityId(), c.prepare(rootKind)
	if err := c.activate(second, true); err != nil {
		t.Fatal(err)
	}
	under := func(root string) func() bool {
		return func() bool { return c.authority("x509-intermediate", "active", "").GetRootAuthorityId() == root }
	}
	eventually(t, "an intermediate under the newer root", under(second))
	c.stop()
	bringNewest := keepKeys(t, dir, "newest")
	bringOlder()
	startCA(t, dir).stop()
	bringNewest()
	c = startCA(t, dir)
	if active, old := c.authority(rootKind, "active", "").GetAuthorityId(), c.authority(rootKind, "old", "").GetAuthorityId(); active != first || old != second {
		t.Errorf("%s signs, and %s is old; want %s and %s", active, old, first, second)
	}
	if err := c.activate(second, true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an intermediate under the newer root again", under(second))
}

// keepKeys makes a copy of the keys, which bring puts in their place.
func keepKeys(t *testing.T, dir, name string) (bring func()) {
	t.Helper()
	keys, older := filepath.Join(dir, "data", "keys"), filepath.Join(dir, name)
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", keys, older).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return func() {
		t.Helper()
		if err := errors.Join(os.RemoveAll(keys), os.Rename(older, keys)); err != nil {
			t.Fatal(err)
		}
	}
}

// crowdOut makes a revoked authority leave the list, as time would.
func (c *testCA) crowdOut(id string) {
	c.t.Helper()
	for range 80 {
		if !slices.ContainsFunc(c.authorities(), func(a *capb.CAAuthority) bool { return a.GetAuthorityId() == id }) {
			return
		}
		if err := c.revoke(c.prepare(jwtKind), true); err != nil {
			c.t.Fatal(err)
		}
	}
	eventually(c.t, "it has left the list", func() bool {
		return !slices.ContainsFunc(c.authorities(), func(a *capb.CAAuthority) bool { return a.GetAuthorityId() == id })
	})
}

// Nor does one come back of which nothing is on the list any more.
func TestKeyThatWasWithdrawnLongAgoStaysAway(t *testing.T) {
	t.Parallel() // it mostly waits
	dir := tempDir(t)
	c := startCA(t, dir, quick)
	c.stop()
	bringFirst := keepKeys(t, dir, "first")
	c = startCA(t, dir, quick)
	root, jwt := c.authority(rootKind, "active", "").GetAuthorityId(), c.authority(jwtKind, "active", "ca").GetAuthorityId()
	for kind, old := range map[string]string{rootKind: root, jwtKind: jwt} {
		next := c.prepare(kind)
		if err := c.activate(next, true); err != nil {
			t.Fatal(err)
		}
		if kind == rootKind {
			eventually(t, "an intermediate under it", func() bool {
				return c.authority("x509-intermediate", "active", "").GetRootAuthorityId() == next
			})
		}
		if err := c.revoke(old, true); err != nil {
			t.Fatal(err)
		}
	}
	c.crowdOut(root)
	c.crowdOut(jwt)
	next := c.authority(rootKind, "active", "").GetAuthorityId()
	c.stop()
	// The key of each comes back beside what is there.
	keys := filepath.Join(dir, "data", "keys")
	for _, name := range []string{"root-1", "jwt-1"} {
		if out, err := exec.CommandContext(t.Context(), "cp", "-a", filepath.Join(dir, "first", name), keys).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for _, name := range glob(t, dir, "jwt-*") { // and is the only one
		if name != "jwt-1" {
			if err := os.RemoveAll(filepath.Join(keys, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	c = startCA(t, dir, quick)
	for _, a := range c.authorities() {
		if a.GetAuthorityId() == root || a.GetAuthorityId() == jwt {
			t.Errorf("%s is %s again", a.GetAuthorityId(), a.GetState())
		}
	}
	if kid := c.agent("n1").jwtKeyID(c.entry("n1", "web")); kid == jwt {
		t.Error("the JWT key that was withdrawn signs")
	}
	if got := c.authority(rootKind, "active", "").GetAuthorityId(); got != next || slices.Contains(glob(t, dir, "*-1"), "root-1") || slices.Contains(glob(t, dir, "*-1"), "jwt-1") {
		t.Errorf("root %s signs, keys %v; want %s, and nothing that was withdrawn", got, glob(t, dir, "*-*"), next)
	}
	c.stop()
	bringFirst()
	err := refusedCA(t, dir, quick)
	if want := "x509-root " + root + " was withdrawn at"; err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(ca.Hint(err), "old copy of data_dir/keys") {
		t.Errorf("Run = %v; want %q and a hint", err, want)
	}
}
