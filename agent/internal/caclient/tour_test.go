// In which order replicas are tried: no pause while there is one to try, a
// pause after each round, and a stale one only when there is no other.

package caclient

import (
	"errors"
	"fmt"
	"testing"
)

var errDead = errors.New("dead")

// walk goes through sessions that end as world says, by address, and returns
// the addresses tried, with "." for a pause and "*" for one that was followed
// although it is stale.
func walk(t *tour, steps int, world func(address string, patient bool) (joined bool, err error)) (path string) {
	for range steps {
		address, patient := t.address(), t.patient()
		joined, err := world(address, patient)
		path += address
		if joined && patient && !errors.Is(err, errDead) {
			path += "*"
		}
		if t.next(joined, err) > 0 {
			path += "."
		}
	}
	return path
}

func newTestTour(addresses ...string) *tour { return &tour{addresses: addresses, fallback: -1} }

func TestRoundsAreMadeWithoutAPause(t *testing.T) {
	dead := func(string, bool) (bool, error) { return false, errDead }
	if got := walk(newTestTour("a", "b", "c"), 7, dead); got != "abc.abc.a" {
		t.Errorf("tried %s; want abc.abc.a", got)
	}
	if got := walk(newTestTour("a"), 3, dead); got != "a.a.a." {
		t.Errorf("tried %s; want a pause after each", got)
	}
}

func TestPausesGrowUntilAReplicaAnswers(t *testing.T) {
	tr := newTestTour("a", "b")
	walk(tr, 60, func(string, bool) (bool, error) { return false, errDead })
	if tr.failures != 30 {
		t.Errorf("%d rounds counted; want 30", tr.failures)
	}
	// An answer, and its end: the other one at once, and short pauses again.
	if wait := tr.next(true, errDead); wait != 0 || tr.failures != 0 {
		t.Errorf("after an answer: pause %v, %d failures; want none", wait, tr.failures)
	}
}

func TestRenewedAgentStaysWithItsReplica(t *testing.T) {
	tr := newTestTour("a", "b")
	tr.at, tr.settled = 1, true
	if wait := tr.next(true, errRenewed); wait != 0 || tr.address() != "b" || !tr.settled {
		t.Errorf("after a renewal: pause %v, address %s; want b at once", wait, tr.address())
	}
}

// What one replica says of a join token all say.
func TestEvidenceIsNotTriedEverywhere(t *testing.T) {
	refused := func(string, bool) (bool, error) { return false, fmt.Errorf("%w: refused", errEvidence) }
	if got := walk(newTestTour("a", "b", "c"), 3, refused); got != "a.b.c." {
		t.Errorf("tried %s; want a pause after each", got)
	}
}

func TestStaleReplicaIsLeftForAnother(t *testing.T) {
	stale := map[string]bool{"a": true}
	world := func(address string, patient bool) (bool, error) {
		switch {
		case address == "c":
			return false, errDead
		case stale[address] && !patient:
			return false, errStale
		case stale[address]:
			return true, errLook
		}
		return true, errDead
	}
	if got := walk(newTestTour("a", "b", "c"), 2, world); got != "ab" {
		t.Errorf("tried %s; want ab", got)
	}
	// None is better: the agent stays with the first, looks at all others
	// again, and comes back to the same.
	stale["b"] = true
	if got := walk(newTestTour("a", "b", "c"), 7, world); got != "abca*bca*" {
		t.Errorf("tried %s; want abca*bca*", got)
	}
}

// What was tried an hour ago does not count.
func TestReplicaThatLosesItsStoreIsLeftAtOnce(t *testing.T) {
	tr := newTestTour("a", "b")
	tr.next(false, errDead) // a was away
	if wait := tr.next(true, errStale); wait != 0 || tr.address() != "a" || tr.patient() {
		t.Errorf("after b lost its store: pause %v, address %s, patient %t; want a tried at once", wait, tr.address(), tr.patient())
	}
}

// A stale replica that also fails must not be called without a pause.
func TestFailingStaleReplicaIsGivenPauses(t *testing.T) {
	world := func(address string, patient bool) (bool, error) {
		if address == "a" && !patient {
			return false, errStale
		}
		return false, errDead
	}
	if got := walk(newTestTour("a", "b"), 8, world); got != "abab.aba" && got != "abab.abab." {
		t.Errorf("tried %s; want pauses", got)
	}
}

func TestAgentsSpreadOverTheReplicas(t *testing.T) {
	first := map[string]int{}
	addresses := []string{"a", "b", "c"}
	for range 300 {
		first[newTour(addresses).address()]++
	}
	for _, a := range addresses {
		if first[a] < 30 {
			t.Errorf("%d of 300 agents begin with %s; want about 100", first[a], a)
		}
	}
	if addresses[0] != "a" || addresses[2] != "c" {
		t.Error("the caller's list was changed")
	}
}
