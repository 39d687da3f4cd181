// A CA whose store is gone does not take an empty one for it.

package ca_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"merlon.dev/ca"
	"merlon.dev/ca/internal/offline"
	"merlon.dev/ca/internal/opening"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/integration/stage"
)

func newStore(cfg *ca.Config) { cfg.NewStore = true }

// away moves what matches away from data_dir, for good.
func away(t *testing.T, dir string, patterns ...string) {
	t.Helper()
	for _, pattern := range patterns {
		found, err := filepath.Glob(filepath.Join(dir, "data", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range found {
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestCAThatHadAStoreBeginsNoOther(t *testing.T) {
	for name, test := range map[string]struct {
		gone  []string // beside the store
		prove func(t *testing.T, data string)
		proof string
	}{
		"epoch file": {proof: "epoch"},
		"audit log":  {gone: []string{"epoch"}, proof: "audit.jsonl"},
		"keys alone": {gone: []string{"epoch", "audit*"}, proof: "intermediate-2", prove: func(t *testing.T, data string) {
			t.Helper()
			laterKeys(t, filepath.Dir(data))
		}},
		"epoch file, after the keys were removed": {gone: []string{"keys"}, proof: "epoch"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			data := filepath.Join(dir, "data")
			c := startCA(t, dir)
			c.entry("n1", "lost")
			c.stop()
			away(t, dir, append(test.gone, "store")...)
			if test.prove != nil {
				test.prove(t, data)
			}
			err := refusedCA(t, dir)
			lost, ok := errors.AsType[*opening.LostStoreError](err)
			if !ok || filepath.Base(lost.Proof) != test.proof || lost.Place != filepath.Join(data, "store") {
				t.Fatalf("the CA ended with %v; want a LostStoreError by %s", err, test.proof)
			}
			for _, way := range []string{"data_dir", "etcd_prefix", "merlon store restore", "-new-store"} {
				if hint := ca.Hint(err); !strings.Contains(hint, way) {
					t.Errorf("hint %q does not name %s", hint, way)
				}
			}
			if _, err := os.Stat(filepath.Join(data, "store")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the CA that refuses made a store: %v", err)
			}
		})
	}
}

// An empty store that somebody made is no store of this CA's.
func TestEmptyStoreIsNotTakenForTheOneThatWas(t *testing.T) {
	dir := tempDir(t)
	startCA(t, dir).stop()
	away(t, dir, "store")
	emptyStore(t, dir)
	if _, ok := errors.AsType[*opening.LostStoreError](refusedCA(t, dir)); !ok {
		t.Error("the CA serves an empty store")
	}
	c := startCA(t, dir, newStore)
	if revision := c.entry("n1", "new").GetRevision(); store.Epoch(revision) != 1 {
		t.Errorf("it goes on at revision %d; want epoch 1", revision)
	}
}

func emptyStore(t *testing.T, dir string) {
	t.Helper()
	st, err := badger.Open(filepath.Join(dir, "data", "store"), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}

// The new store's numbers lie above all that agents remember of the old one.
func TestNewStoreIsBegunWhereItIsAskedForOnce(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	before := c.entry("n1", "lost").GetRevision()
	c.stop()
	away(t, dir, "store")
	c = startCA(t, dir, newStore)
	if len(c.entriesOf("lost")) != 0 {
		t.Error("the entry of the lost store is there")
	}
	if after := c.entry("n1", "new").GetRevision(); store.Epoch(after) != store.Epoch(before)+1 {
		t.Errorf("it goes on at revision %d after %d; want the next epoch", after, before)
	}
	recorded := false
	for _, r := range c.auditRecords() {
		detail, _ := r["detail"].(string)
		recorded = recorded || strings.HasPrefix(detail, "begin a new store")
	}
	if !recorded {
		t.Error("it is not in the audit log")
	}
	c.stop()
	if err := refusedCA(t, dir, newStore); !strings.Contains(err.Error(), "start without -new-store") {
		t.Errorf("with the flag again: %v", err)
	}
	if c = startCA(t, dir); len(c.entriesOf("new")) != 1 {
		t.Error("the entry of the new store is gone")
	}
}

// A first start that is killed between the making of the keys and the first
// write leaves keys and no store, or one with nothing in it.
func TestFirstStartThatWasKilledIsBegunAgain(t *testing.T) {
	for name, left := range map[string]func(*testing.T, string){
		"no store":       func(*testing.T, string) {},
		"an empty store": emptyStore,
	} {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			c := startCA(t, dir)
			root := c.srv.Root()
			c.stop()
			away(t, dir, "store", "epoch", "audit*")
			emptyLog(t, dir) // it is made first
			left(t, dir)
			if c = startCA(t, dir); !c.srv.Root().Equal(root) {
				t.Error("it has another root")
			}
			c.entry("n1", "web")
		})
	}
}

// One that is killed after the first write, before the first record, leaves a log
// with nothing in it.
func TestFirstStartThatWasKilledBeforeItsFirstRecordIsBegunAgain(t *testing.T) {
	dir := tempDir(t)
	startCA(t, dir).stop()
	away(t, dir, "audit*")
	emptyLog(t, dir)
	c := startCA(t, dir)
	if first := c.auditRecords()[0]; first["detail"] != "begin with root" {
		t.Errorf("the log begins with %v", first)
	}
}

func emptyLog(t *testing.T, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "data", "audit.jsonl"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A log that is gone is not replaced under the key that signed for it, neither by
// the CA nor by a restore; without the key another log begins.
func TestCAThatHadALogBeginsNoOther(t *testing.T) {
	for name, test := range map[string]struct {
		prepare func(t *testing.T, dir string)
		proof   string
	}{
		"no file":       {func(*testing.T, string) {}, "log-1"},
		"an empty file": {func(t *testing.T, dir string) { t.Helper(); laterKeys(t, dir); emptyLog(t, dir) }, "intermediate-2"},
		"keys alone":    {func(t *testing.T, dir string) { t.Helper(); away(t, dir, "store", "epoch") }, "log-1"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			c := startCA(t, dir)
			a := c.agent("n1")
			_, before := announced(t, c, a, nil)
			c.stop()
			away(t, dir, "audit*")
			test.prepare(t, dir)
			err := refusedCA(t, dir)
			lost, ok := errors.AsType[*opening.LostLogError](err)
			if !ok || filepath.Base(lost.Proof) != test.proof || lost.Path != filepath.Join(dir, "data", "audit.jsonl") {
				t.Fatalf("the CA ended with %v; want a LostLogError by %s", err, test.proof)
			}
			for _, way := range []string{"audit.tree", "keys/log-1"} {
				if hint := ca.Hint(err); !strings.Contains(hint, way) {
					t.Errorf("hint %q does not name %s", hint, way)
				}
			}
			away(t, dir, "audit*", "keys/log-1", "keys/intermediate-2")
			c = startCA(t, dir)
			if name == "keys alone" {
				return // the agent is unknown
			}
			if _, after := announced(t, c, c.client(a.key, a.chain), &before); after.Origin == before.Origin {
				t.Error("the log that begins is under the same key")
			}
		})
	}
}

// laterKeys makes a second generation of the intermediate, as time would.
func laterKeys(t *testing.T, dir string) {
	t.Helper()
	keys := filepath.Join(dir, "data", "keys", "intermediate-")
	if err := os.CopyFS(keys+"2", os.DirFS(keys+"1")); err != nil {
		t.Fatal(err)
	}
}

// A restore would begin one with its own record.
func TestRestoreBeginsNoLogInPlaceOfOneThatIsLost(t *testing.T) {
	dir := tempDir(t)
	startCA(t, dir).stop()
	cfg := ca.Config{TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "s", "a.sock")}
	backup := filepath.Join(dir, "backup")
	f, err := os.Create(backup)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := offline.Backup(t.Context(), cfg, f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	away(t, dir, "store", "audit*")
	_, err = offline.Restore(t.Context(), cfg, backup, offline.RestoreOptions{AcceptLoss: true})
	if _, ok := errors.AsType[*opening.LostLogError](err); !ok || !strings.Contains(ca.Hint(err), "keys/log-1") {
		t.Fatalf("restored: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "data", "store")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the restore that refuses made a store: %v", err)
	}
	away(t, dir, "keys/log-1")
	if _, err := offline.Restore(t.Context(), cfg, backup, offline.RestoreOptions{AcceptLoss: true}); err != nil {
		t.Fatal(err)
	}
	startCA(t, dir)
}

// A mistyped prefix is no new store, and is left as it is; nor is one that
// somebody has removed.
func TestCAOnEtcdBeginsNoOtherStore(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	dir := tempDir(t)
	c := startCA(t, dir, onEtcd(e))
	c.entry("n1", "web")
	c.stop()
	elsewhere := func(cfg *ca.Config) { cfg.EtcdPrefix = "/elsewhere/" }
	if _, ok := errors.AsType[*opening.LostStoreError](refusedCA(t, dir, onEtcd(e), elsewhere)); !ok {
		t.Error("the CA serves an empty prefix")
	}
	if n := e.Remove("/elsewhere"); n != 0 {
		t.Errorf("the CA that refused wrote %d keys there", n)
	}
	if n := e.Remove("/merlon/"); n == 0 {
		t.Fatal("there was nothing under /merlon/")
	}
	if _, ok := errors.AsType[*opening.LostStoreError](refusedCA(t, dir, onEtcd(e))); !ok {
		t.Error("the CA begins another store in place of one that was removed")
	}
	c = startCA(t, dir, onEtcd(e), newStore)
	if revision := c.entry("n1", "new").GetRevision(); store.Epoch(revision) != 1 {
		t.Errorf("a new one goes on at revision %d; want epoch 1", revision)
	}
}

// Root's files in the store of the CA's own user would be out of its reach.
func TestRootServesNoStoreOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files to another user")
	}
	for _, given := range []string{"", "store"} {
		dir := tempDir(t)
		startCA(t, dir).stop()
		if err := os.Chown(filepath.Join(dir, "data", given), 65534, 65534); err != nil {
			t.Fatal(err)
		}
		err := refusedCA(t, dir)
		if !strings.Contains(err.Error(), "belongs to uid 65534") || !strings.Contains(ca.Hint(err), "as that user") {
			t.Errorf("data/%s of another user: %v, hint %q", given, err, ca.Hint(err))
		}
	}
}
