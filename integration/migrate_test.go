// A store that moves from Badger to etcd and back, and a backup that is
// restored into etcd.

package integration_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
)

// onEtcd writes a configuration like the CA's, with its store in etcd.
func (l *ledger) onEtcd(e *stage.Etcd, prefix string) string {
	l.t.Helper()
	text, err := os.ReadFile(l.config)
	if err != nil {
		l.t.Fatal(err)
	}
	file := filepath.Join(filepath.Dir(l.config), "etcd-"+strings.Trim(prefix, "/")+".yaml")
	text = fmt.Appendf(text, "store: etcd\netcd_endpoints: [%s]\netcd_ca_file: %s\netcd_cert_file: %s\netcd_key_file: %s\netcd_prefix: %s\n",
		strings.Join(e.Endpoints(), ", "), e.Files.CA, e.Files.Cert, e.Files.Key, prefix)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		l.t.Fatal(err)
	}
	return file
}

func TestStoreMovesToEtcdAndBack(t *testing.T) {
	l := newLedger(t)
	badger, etcd := l.config, l.onEtcd(stage.StartEtcd(t, 1), "/moved/")
	unused := l.Token()
	list := func() string { return l.Merlon("entry", "list", "-o", "json") }
	entries := list()
	l.want(1, "a CA runs", "migrate", "--from", badger, "--to", etcd)
	l.CA.Stop()
	before := l.report("verify", "--config", badger)

	// Looking for a store leaves none behind that a migration would refuse.
	l.want(1, "there is no store in /moved/", "verify", "--config", etcd)
	l.want(0, "hint: add --yes", "migrate", "--from", badger, "--to", etcd)
	l.want(1, "there is no store", "migrate", "--from", etcd, "--to", l.fresh(badger), "--yes")
	l.want(2, "both configurations name", "migrate", "--from", badger, "--to", badger, "--yes")
	moved := l.report("migrate", "--from", badger, "--to", etcd, "--yes")
	if !moved.Done || moved.Revision != before.Revision {
		t.Errorf("migrate = %+v; want revision %d", moved, before.Revision)
	}
	l.want(1, "there is a store already", "migrate", "--from", badger, "--to", etcd, "--yes")
	if after := l.report("verify", "--config", badger); after.Revision != before.Revision || after.Keys != before.Keys {
		t.Errorf("the source went from %+v to %+v", before, after)
	}
	if there := l.report("verify", "--config", etcd); !there.Whole || there.Keys != moved.Keys {
		t.Errorf("verify of etcd = %+v; want %d keys", there, moved.Keys)
	}

	l.config = etcd
	l.start()
	l.agentServes(1, 1)
	if got := list(); got != entries {
		t.Errorf("entries on etcd = %s; want %s", got, entries)
	}
	// From another machine its socket cannot be seen; that it leads can.
	elsewhere := l.elsewhere(etcd)
	l.want(1, "a CA replica uses /moved/ in etcd", "migrate", "--from", elsewhere, "--to", l.fresh(badger), "--yes")
	l.want(1, "hint: stop merlon-ca on every machine", "backup", l.path("never.backup"), "--config", elsewhere)
	l.Entry("/on-etcd")
	entries = list()
	file := l.path("etcd.backup")
	l.want(0, "sha256", "backup", file)
	l.CA.Stop()

	l.want(1, "there is a store already", "migrate", "--from", etcd, "--to", badger, "--yes")
	if err := os.RemoveAll(filepath.Join(l.data, "store")); err != nil {
		t.Fatal(err)
	}
	back := l.report("migrate", "--from", etcd, "--to", badger, "--yes")
	if !back.Done || back.Revision < moved.Revision || back.Keys <= moved.Keys {
		t.Errorf("migrate back = %+v; want more than %+v", back, moved)
	}
	l.config = badger
	l.start()
	l.agentServes(1, 1)
	if got := list(); got != entries {
		t.Errorf("entries back on Badger = %s; want %s", got, entries)
	}
	if err := attest(t, l.Domain, unused.Token); err != nil {
		t.Errorf("a token that moved twice: %v", err)
	}
	l.CA.Stop()
	l.restoredIntoEtcd(file, etcd)
}

// elsewhere writes a configuration that shares the store alone.
func (l *ledger) elsewhere(config string) string {
	l.t.Helper()
	text, err := os.ReadFile(config)
	if err != nil {
		l.t.Fatal(err)
	}
	file := filepath.Join(filepath.Dir(config), "elsewhere.yaml")
	if err := os.WriteFile(file, []byte(strings.Replace(string(text), l.Admin, l.path("none.sock"), 1)), 0o600); err != nil {
		l.t.Fatal(err)
	}
	return file
}

// fresh writes a configuration like another, with an empty data_dir.
func (l *ledger) fresh(config string) string {
	l.t.Helper()
	text, err := os.ReadFile(config)
	if err != nil {
		l.t.Fatal(err)
	}
	file := filepath.Join(filepath.Dir(config), "fresh.yaml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(strings.ReplaceAll(string(text), l.data, l.path("fresh")), l.Admin, l.path("none.sock"))), 0o600); err != nil {
		l.t.Fatal(err)
	}
	return file
}

// restoredIntoEtcd restores a backup beside the store that is in etcd, and puts
// that one back behind the CA's back.
func (l *ledger) restoredIntoEtcd(file, used string) {
	t := l.t
	l.want(1, "choose another etcd_prefix", "restore", file, "--config", used, "--accept-loss")
	text, err := os.ReadFile(used)
	if err != nil {
		t.Fatal(err)
	}
	l.config = filepath.Join(filepath.Dir(used), "restored.yaml")
	if err := os.WriteFile(l.config, []byte(strings.Replace(string(text), "/moved/", "/restored/", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	l.want(1, "would be lost", "restore", file, "--config", l.config)
	if done := l.report("restore", file, "--config", l.config, "--accept-loss"); done.Lossless || done.Revision != epoch || done.Tokens != 1 {
		t.Errorf("restore = %+v; want revision %d", done, uint64(epoch))
	}
	l.start()
	l.agentServes(epoch, epoch)
	l.CA.Stop()

	// The store of before, which is whole: the data_dir knows better, and without
	// it the agent does.
	l.config = used
	l.refuses("epoch 1 has begun already")
	if err := os.Remove(filepath.Join(l.data, "epoch")); err != nil {
		t.Fatal(err)
	}
	l.start()
	stage.Eventually(t, "the CA notices", func() error {
		if !strings.Contains(l.CA.Log(), "the store was put back to an earlier state") {
			return fmt.Errorf("silent")
		}
		return nil
	})
	l.CA.Stop()
	now := l.report("verify", "--config", used).Revision
	l.refuses(fmt.Sprintf("it is at revision %d", now), fmt.Sprintf("-accept-older-store=%d", now-1))
	l.start(fmt.Sprintf("-accept-older-store=%d", now))
	stage.Eventually(t, "the CA is in the next epoch", func() error {
		if !strings.Contains(l.CA.Log(), "older store accepted") {
			return fmt.Errorf("silent")
		}
		return nil
	})
}
