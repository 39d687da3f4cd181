// Backups from outside: taken, verified, restored where something is lost and
// where nothing is, moved between Badger and etcd; and a store that was put
// back to an earlier state behind the CA's back.

package integration_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid"
)

// ledger is a trust domain whose CA's files the test handles.
type ledger struct {
	*stage.Domain
	t                     *testing.T
	config, data, backups string
}

// newLedger starts a trust domain with an entry, a policy and an SVID served.
func newLedger(t *testing.T) *ledger {
	t.Helper()
	d := stage.Separate(t)
	config := d.CA.Args[1]
	l := &ledger{d, t, config, filepath.Join(filepath.Dir(config), "ca-data"), t.TempDir()}
	d.Entry("/me")
	d.Merlon("policy", "push", quickstartPolicy)
	l.agentServes(1, 1)
	return l
}

func (l *ledger) path(name string) string { return filepath.Join(l.backups, name) }

// store runs merlon store and returns everything it printed with its exit code.
func (l *ledger) store(args ...string) (out string, code int) {
	l.t.Helper()
	stdout, stderr, err := l.Try(append([]string{"store"}, args...)...)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		code = exit.ExitCode()
	} else if err != nil {
		l.t.Fatal(err)
	}
	return stdout + stderr, code
}

// want runs merlon store and compares its exit code and output.
func (l *ledger) want(code int, text string, args ...string) {
	l.t.Helper()
	if err := expect(l.store(args...))(code, text); err != nil {
		l.t.Errorf("merlon store %s: %v", strings.Join(args, " "), err)
	}
}

// storeReport is what of -o json the tests look at.
type storeReport struct {
	Revision     uint64 `json:"revision"`
	Keys         uint64 `json:"keys"`
	Whole        bool   `json:"whole"`
	MissingFirst uint64 `json:"missing_first"`
	MissingLast  uint64 `json:"missing_last"`
	Lossless     bool   `json:"lossless"`
	Tokens       int    `json:"dropped_tokens"`
	Done         bool   `json:"done"`
	Since        []struct {
		What string `json:"what"`
	} `json:"since"`
}

// report runs merlon store with -o json.
func (l *ledger) report(args ...string) (r storeReport) {
	l.t.Helper()
	stdout, stderr, err := l.Try(append([]string{"store", "-o", "json"}, args...)...)
	if err != nil && stdout == "" {
		l.t.Fatalf("merlon store %v: %v\n%s", args, err, stderr)
	}
	stage.Decode(l.t, stdout, &r)
	return r
}

// start starts the CA again, with further flags.
func (l *ledger) start(flags ...string) {
	l.t.Helper()
	l.CA.Args = append([]string{"-config", l.config}, flags...)
	l.CA.Restart()
	stage.Eventually(l.t, "the CA answers", func() error { _, _, err := l.Try("agent", "list"); return err })
}

// refuses runs the CA, which must not start.
func (l *ledger) refuses(text string, flags ...string) {
	l.t.Helper()
	_, stderr, err := stage.Run(l.t.Context(), l.t, nil, "merlon-ca", append([]string{"-config", l.config}, flags...)...)
	if err == nil || !strings.Contains(stderr, text) {
		l.t.Errorf("merlon-ca %v: %v; want it to say %q\n%s", flags, err, text, stderr)
	}
}

// agentServes waits until the agent serves at least these, and a workload gets
// its SVID.
func (l *ledger) agentServes(sequence, generation uint64) {
	l.t.Helper()
	stage.Eventually(l.t, "the agent serves what the CA has", func() error {
		var agents []struct {
			SPIFFEID         string `json:"spiffe_id"`
			Connected        bool   `json:"connected"`
			Sequence         uint64 `json:"trust_bundle_sequence"`
			PolicyGeneration uint64 `json:"policy_generation"`
		}
		stage.Decode(l.t, l.Merlon("agent", "list", "-o", "json"), &agents)
		for _, a := range agents {
			if a.SPIFFEID == l.AgentID() && a.Connected && a.Sequence >= sequence && a.PolicyGeneration >= generation {
				_, err := fetch(l.t, l.Domain)
				return err
			}
		}
		return fmt.Errorf("agents %+v", agents)
	})
}

// issued is the store revision in the serial number of the workload's SVID.
func (l *ledger) issued() uint64 {
	l.t.Helper()
	got, err := fetch(l.t, l.Domain)
	if err != nil {
		l.t.Fatal(err)
	}
	serial, ok := svid.SerialFromBig(got.Certificates[0].SerialNumber)
	if !ok {
		l.t.Fatalf("serial %x is none of ours", got.Certificates[0].SerialNumber)
	}
	return serial.Revision
}

// replace makes to a copy of from.
func (l *ledger) replace(to, from string) {
	l.t.Helper()
	if err := os.RemoveAll(to); err != nil {
		l.t.Fatal(err)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		l.t.Fatal(err)
	}
}

const epoch = 1 << 32

func TestBackupIsRestoredOntoAFreshFolder(t *testing.T) {
	l := newLedger(t)
	unused := l.Token("--agent", "later")
	file := l.path("monday.backup")

	taken := l.report("backup", file)
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the backup: %v, %v; want mode 0600", fi, err)
	}
	if got := l.report("verify", file); !got.Whole || got.Revision != taken.Revision || got.Keys != taken.Keys || got.Keys == 0 {
		t.Errorf("verify = %+v; want what was taken, %+v", got, taken)
	}
	l.want(1, "hint: choose another name, or replace it with --force", "backup", file)
	l.want(0, "data_dir/keys", "backup", file, "--force")
	l.want(1, "a CA runs", "restore", file, "--config", l.config, "--accept-loss")
	l.want(1, "data_dir in use", "verify", "--config", l.config)

	// What is written from here on will be lost.
	before := l.issued()
	l.Entry("/lost")
	l.Merlon("policy", "push", quickstartPolicy)
	l.Merlon("revoke", "--spiffe-id", l.ID("/me"), "--note", "gone with the loss")
	l.agentServes(1, 2)
	l.CA.Stop()
	head := l.report("verify", "--config", l.config)
	if !head.Whole || head.Revision <= taken.Revision {
		t.Fatalf("verify of the store: %+v; want it whole and beyond %d", head, taken.Revision)
	}

	l.want(1, "there is a store already", "restore", file, "--config", l.config, "--accept-loss")
	store, old := filepath.Join(l.data, "store"), filepath.Join(l.data, "store.old")
	if err := os.Rename(store, old); err != nil {
		t.Fatal(err)
	}
	l.want(1, "create entry", "restore", file, "--config", l.config)
	l.want(1, fmt.Sprintf("the store ended at revision %d", head.Revision), "restore", file, "--config", l.config, "--replaces", old)
	if _, err := os.Stat(store); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a refused restore left something: %v", err)
	}
	l.tampered(file)

	done := l.report("restore", file, "--config", l.config, "--accept-loss")
	if done.Lossless || done.Revision != epoch || done.Tokens != 1 || done.Keys != taken.Keys { // the last realm is a new one
		t.Errorf("restore = %+v; want all keys but one token, and the last realm, above revision %d", done, uint64(epoch))
	}
	var acts []string
	for _, a := range done.Since {
		acts = append(acts, a.What)
	}
	if got := strings.Join(acts, ", "); !strings.Contains(got, "create entry") || !strings.Contains(got, "revoke SPIFFE ID") {
		t.Errorf("done since: %s", got)
	}

	l.start()
	l.agentServes(epoch, epoch)
	if list := l.Merlon("entry", "list"); strings.Contains(list, "/lost") || !strings.Contains(list, "/me") {
		t.Errorf("entries after the restore:\n%s", list)
	}
	if err := attest(t, l.Domain, unused.Token); err == nil {
		t.Error("a token from the backup worked: it may have been used since")
	}
	// A revocation concerns what was issued before the loss too.
	l.Merlon("revoke", "--spiffe-id", l.ID("/me"))
	stage.Eventually(t, "the workload gets an SVID of the new epoch", func() error {
		if got := l.issued(); got <= epoch || got <= before {
			return fmt.Errorf("issued at revision %d", got)
		}
		return nil
	})
	if pushed := l.Merlon("policy", "push", quickstartPolicy, "-o", "json"); !strings.Contains(pushed, strconv.Itoa(epoch+1)) {
		t.Errorf("the next policy: %s; want generation %d", pushed, epoch+1)
	}
	l.restoresTwice(file)
}

// tampered checks that a backup is refused wherever it was touched.
func (l *ledger) tampered(file string) {
	l.t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		l.t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	bad := l.path("bad.backup")
	for _, content := range [][]byte{raw, raw[:len(raw)-1], nil} {
		if err := os.WriteFile(bad, content, 0o600); err != nil {
			l.t.Fatal(err)
		}
		l.want(1, "not a whole backup", "verify", bad)
		l.want(1, "use another backup; nothing was changed", "restore", bad, "--config", l.config, "--accept-loss")
	}
}

// restoresTwice restores the backup again: in an epoch of its own.
func (l *ledger) restoresTwice(file string) {
	l.t.Helper()
	l.CA.Stop()
	if err := os.RemoveAll(filepath.Join(l.data, "store")); err != nil {
		l.t.Fatal(err)
	}
	if done := l.report("restore", file, "--config", l.config, "--accept-loss"); done.Revision != 2*epoch {
		l.t.Errorf("the second restore = %+v; want revision %d", done, uint64(2*epoch))
	}
	l.start()
	l.agentServes(2*epoch, 2*epoch)
}

func TestBackupOfTheLastRevisionLosesNothing(t *testing.T) {
	l := newLedger(t)
	unused := l.Token()
	entries := l.Merlon("entry", "list", "-o", "json")
	l.CA.Stop()
	file := l.path("last.backup")
	taken := l.report("backup", file, "--config", l.config)
	store, old := filepath.Join(l.data, "store"), filepath.Join(l.data, "store.old")
	if err := os.Rename(store, old); err != nil {
		t.Fatal(err)
	}
	l.want(1, "there is no store", "backup", l.path("none.backup"), "--data-dir", l.data)
	done := l.report("restore", file, "--config", l.config, "--replaces", old)
	if !done.Lossless || done.Revision != taken.Revision || done.Keys != taken.Keys || done.Tokens != 0 {
		t.Errorf("restore = %+v; want all of %+v", done, taken)
	}
	l.start()
	l.agentServes(1, 1)
	if got := l.Merlon("entry", "list", "-o", "json"); got != entries {
		t.Errorf("entries = %s; want %s", got, entries)
	}
	if err := attest(t, l.Domain, unused.Token); err != nil {
		t.Errorf("a token that was not used: %v", err)
	}
}

// SECURITY.md T43: the CA's disk, or a part of it, is put back to yesterday.
func TestStoreThatWasPutBackIsNoticed(t *testing.T) {
	l := newLedger(t)
	store, yesterday, today := filepath.Join(l.data, "store"), l.path("yesterday"), l.path("today")
	l.CA.Stop()
	l.replace(yesterday, store)
	was := l.report("verify", yesterday)
	l.start()
	l.Merlon("policy", "push", quickstartPolicy)
	l.Entry("/second")
	l.agentServes(1, 2)
	before := l.issued()
	l.CA.Stop()
	l.replace(today, store)

	// Badger's files alone: the head knows better.
	l.replace(store, yesterday)
	head, err := os.ReadFile(filepath.Join(today, "HEAD"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(store, "HEAD"), head, 0o600); err != nil {
		t.Fatal(err)
	}
	l.refuses(fmt.Sprintf("the last good revision is %d", was.Revision))
	if got := l.report("verify", "--config", l.config); got.Whole || got.Revision != was.Revision || got.MissingFirst != was.Revision+1 || got.MissingLast == 0 {
		t.Errorf("verify = %+v; want the last good revision %d and what is missing", got, was.Revision)
	}

	// All of it: the store is whole, and the agent knows better.
	l.replace(store, yesterday)
	l.start()
	stage.Eventually(t, "the CA notices", func() error {
		if !strings.Contains(l.CA.Log(), "the store was put back to an earlier state") {
			return errors.New("silent")
		}
		return nil
	})
	if !strings.Contains(l.CA.Log(), "-accept-older-store=") || !strings.Contains(l.CA.Log(), "spiffe_id="+l.AgentID()) {
		t.Errorf("the log does not say who noticed and what to do:\n%s", l.CA.Log())
	}
	if _, err := fetch(t, l.Domain); err != nil {
		t.Errorf("a workload on the node: %v; want what it had", err)
	}
	// Others are served: one liar must not stop the CA.
	if err := attest(t, l.Domain, l.Token().Token); err != nil {
		t.Errorf("another agent: %v", err)
	}
	l.CA.Stop()

	now := l.report("verify", "--config", l.config).Revision
	l.refuses(fmt.Sprintf("-accept-older-store=%d", now), fmt.Sprintf("-accept-older-store=%d", now-1))
	accept := fmt.Sprintf("-accept-older-store=%d", now)
	l.start(accept)
	l.agentServes(epoch, epoch)
	l.CA.Stop()
	l.start(accept) // left in a unit file it does no harm
	l.agentServes(epoch, epoch)
	l.Merlon("revoke", "--spiffe-id", l.ID("/me"))
	stage.Eventually(t, "the workload gets an SVID of the new epoch", func() error {
		if got := l.issued(); got <= epoch || got <= before {
			return fmt.Errorf("issued at revision %d", got)
		}
		return nil
	})
}
