// Stores that were put back, and the epochs that they go on in.

package ca_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"merlon.dev/ca"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

func accepting(revision uint64) func(*ca.Config) {
	return func(cfg *ca.Config) { cfg.AcceptOlderStore = revision }
}

// lastRevision is that of the store of a CA that is stopped: its upkeep may have
// written behind the last call.
func lastRevision(t *testing.T, dir string) uint64 {
	t.Helper()
	r, err := badger.Verify(filepath.Join(dir, "data", "store"))
	if err != nil {
		t.Fatal(err)
	}
	return r.Revision
}

func replaceDir(t *testing.T, dir, by string) {
	t.Helper()
	if err := errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(by))); err != nil {
		t.Fatal(err)
	}
}

// A snapshot that is put back twice takes two epochs: agents have seen what was
// written in the first.
func TestEveryAcceptedStoreTakesAnEpochOfItsOwn(t *testing.T) {
	dir, snapshot := tempDir(t), filepath.Join(tempDir(t), "snapshot")
	data := filepath.Join(dir, "data", "store")
	c := startCA(t, dir)
	c.entry("n1", "kept")
	c.stop()
	at := lastRevision(t, dir)
	if err := os.CopyFS(snapshot, os.DirFS(data)); err != nil {
		t.Fatal(err)
	}
	for epoch := uint64(1); epoch <= 3; epoch++ {
		replaceDir(t, data, snapshot)
		c = startCA(t, dir, accepting(at))
		if revision := c.entry("n1", "new").GetRevision(); store.Epoch(revision) != epoch {
			t.Fatalf("accepted for the time %d, it goes on at revision %d; want epoch %d", epoch, revision, epoch)
		}
		c.stop()
	}
	// Without the flag it is not used.
	replaceDir(t, data, snapshot)
	err := refusedCA(t, dir)
	if older, ok := errors.AsType[*store.OlderError](err); !ok || older.Revision != at {
		t.Fatalf("the CA ended with %v; want an OlderError of revision %d", err, at)
	}
	if hint := ca.Hint(err); !strings.Contains(hint, "-accept-older-store=") {
		t.Errorf("hint %q", hint)
	}
}

// A start with the flag that was killed before it wrote that down is written down
// by the next one, which has no flag.
func TestNewEpochThatNobodyWroteDownIsRecorded(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	c.entry("n1", "kept")
	c.stop()
	at := lastRevision(t, dir)
	remembered := filepath.Join(dir, "data", "epoch")
	before, err := os.ReadFile(remembered)
	if err != nil {
		t.Fatal(err)
	}
	startCA(t, dir, accepting(at)).stop()
	if err := os.WriteFile(remembered, before, 0o600); err != nil { // as the kill would have left it
		t.Fatal(err)
	}
	for range 2 { // once
		c = startCA(t, dir)
		c.stop()
	}
	recorded := 0
	for _, r := range c.auditRecords() {
		if strings.HasPrefix(text(r["detail"]), "go on with a store of a later epoch") {
			recorded++
		}
	}
	if recorded != 1 {
		t.Errorf("the later epoch is recorded %d times; want once", recorded)
	}
}

// A flag that was left in the unit file does nothing, and nobody says that it
// did.
func TestStoreIsSaidToBeAcceptedOnce(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	c.entry("n1", "kept")
	c.stop()
	at := lastRevision(t, dir)
	for _, revision := range []uint64{at, at, 1} {
		c = startCA(t, dir, accepting(revision))
		c.stop()
	}
	accepted := 0
	for _, r := range c.auditRecords() {
		if detail, _ := r["detail"].(string); strings.HasPrefix(detail, "accept the store") {
			accepted++
		}
	}
	if accepted != 1 {
		t.Errorf("it is accepted %d times in the audit log; want 1", accepted)
	}
}
