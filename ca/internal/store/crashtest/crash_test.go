package crashtest

// SIGKILL at random moments, on Badger.

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"go.uber.org/goleak"

	"merlon.dev/integration/stage"
)

func TestMain(m *testing.M) {
	if IsChild() {
		os.Exit(Child()) //nolint:forbidigo // the main of a child process
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		stage.RemoveBins()
		os.Exit(code) //nolint:forbidigo // as VerifyTestMain does
	}))
}

// seed is MERLON_SEED, or a new one; a failing test prints it.
func seed(t testing.TB) uint64 {
	t.Helper()
	s := rand.Uint64()
	if text := os.Getenv("MERLON_SEED"); text != "" {
		var err error
		if s, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("MERLON_SEED: %v", err)
		}
	}
	t.Logf("MERLON_SEED=%d", s)
	return s
}

// number reads a number from the environment.
func number(t testing.TB, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// killsPerHistory keeps the search of porcupine small: after so many kills the
// next history begins, on the same store.
const killsPerHistory = 20

func report(t testing.TB, found []string) {
	t.Helper()
	for _, what := range found {
		t.Error(what)
	}
}

// TestKilledBadgerLosesNothingAcknowledged shows that nothing is acknowledged
// before it left the process. It shows nothing about power loss, for the kernel
// still has all pages: TestNothingIsAcknowledgedBeforeItsSync does.
func TestKilledBadgerLosesNothingAcknowledged(t *testing.T) {
	t.Parallel()
	// So short a history that children compact while they are killed, and so
	// long that no watch falls out of it between two lives.
	where := target{Dir: t.TempDir(), KeepRevisions: 1_500}
	r := newRig(t, where, "", seed(t))
	for kills := number(t, "KILLS", killsPerHistory); kills > 0 && !t.Failed(); kills -= killsPerHistory {
		report(t, r.round(min(kills, killsPerHistory)))
	}
}
