package crashtest

// Syncs: each acknowledged write waited for its own, and none is acknowledged
// after one has failed. Needs strace.

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// badgerNeeds are the syncs that a write to Badger waits for: its log, which is
// mapped, and our head. Badger syncs its value log too, and goes on where that
// fails; it holds nothing of ours.
var badgerNeeds = []needed{
	{"Badger's log", func(c syncCall) bool { return c.name == "msync" && strings.HasSuffix(c.file, ".mem") }},
	{"HEAD", func(c syncCall) bool { return strings.HasSuffix(c.file, "/HEAD") }},
}

// needStrace skips where strace is absent or may not trace.
func needStrace(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("strace is not installed: apt-get install strace")
	}
	if out, err := exec.Command("strace", "-f", "--seccomp-bpf", "-e", "trace=fsync", "-o", "/dev/null", "true").CombinedOutput(); err != nil {
		t.Skipf("strace cannot trace here (ptrace is forbidden, or it is older than 5.3): %v: %s", err, out)
	}
}

// runTraced lets one child live under strace and returns its history, settled,
// and its syncs. They fail from the n-th of each thread on; 0: none.
func runTraced(t testing.TB, program string, n int) (*rig, []syncCall) {
	t.Helper()
	trace := filepath.Join(t.TempDir(), "trace")
	r := newRig(t, target{Dir: t.TempDir(), KeepRevisions: 6_000}, program, uint64(n))
	r.wrap = traced(trace, n)
	l := r.life()
	l.Writers, l.Readers, l.Calls, l.Large = 6, 0, 40, 0
	l.Watches = l.Watches[:1]
	p := r.launch(l)
	r.await(p, p.ended, "under strace")
	lines, dead, err := p.bury()
	if err != nil && n == 0 {
		t.Fatalf("child: %v: %s", err, p.lastWords())
	}
	if n > 0 { // a store that could not be laid out says so
		lines = slices.DeleteFunc(lines, func(l line) bool { return l.What == lineRefused || l.What == lineEnd })
	}
	r.history.add(lines, dead)
	r.wrap = nil
	calls, err := readTrace(trace, clockOffset())
	if err != nil {
		t.Fatal(err)
	}
	return r, calls
}

func TestNothingIsAcknowledgedBeforeItsSync(t *testing.T) {
	t.Parallel()
	needStrace(t)
	r, calls := runTraced(t, plain(t), 0)
	report(t, short(r.history.checkSyncs(calls, badgerNeeds)))
	ok, _, _ := r.history.counts()
	if ok == 0 || len(calls) == 0 {
		t.Errorf("%d calls were answered, %d syncs were seen", ok, len(calls))
	}
	t.Logf("%d calls answered, %d syncs", ok, len(calls))
	r.finish()
	report(t, r.history.check())
}

func TestNothingIsAcknowledgedAfterAFailedSync(t *testing.T) {
	t.Parallel()
	needStrace(t)
	tried := 0
	// Which thread syncs is not ours to say: some of these fail while the store
	// is laid out, some never.
	for _, n := range []int{8, 20, 45} {
		r, calls := runTraced(t, plain(t), n)
		ok, _, _ := r.history.counts()
		failed := slices.IndexFunc(calls, func(c syncCall) bool { return c.injected })
		what := ""
		if failed >= 0 {
			what = calls[failed].name + " " + calls[failed].file
		}
		t.Logf("from sync %d of each thread on: %d calls answered, sync %d of %d is the first to fail: %s", n, ok, failed, len(calls), what)
		if ok > 0 && failed >= 0 {
			tried++
		}
		report(t, short(r.history.checkSyncs(calls, badgerNeeds)))
		if ok > 0 {
			r.finish() // without strace: what was acknowledged is there
			report(t, r.history.check())
		}
	}
	if tried == 0 {
		t.Error("no sync failed while calls were answered")
	}
}
