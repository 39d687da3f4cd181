// In which order the replicas of the CA are tried, and when to rest.

package caclient

import (
	"errors"
	"math/rand/v2"
	"time"
)

const (
	firstRetry = 50 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// Why a session ends although its connection is good.
var (
	errRenewed = errors.New("the agent has a new SVID")
	errStale   = errors.New("the CA cannot reach its store")
	errLook    = errors.New("the CA cannot reach its store; looking for a replica that does")
)

// tour goes round the addresses of the CA. One round is made without a pause:
// a replica that is gone is replaced by the next at once. After a round that
// found none comes a pause, longer each time.
//
// A replica that cannot reach its store is left for one that can; if there is
// none the agent settles with it, because it still signs.
type tour struct {
	// addresses are in an order of this agent's own, so that the agents of a
	// replica spread over the others when it is gone.
	addresses []string
	at        int  // the current address
	tried     int  // sessions that ended in this round
	failures  int  // rounds in a row that found no replica
	settled   bool // the current replica may be stale
	fallback  int  // a stale replica that was met in this round; -1 for none
}

func newTour(addresses []string) *tour {
	t := &tour{addresses: append([]string(nil), addresses...), fallback: -1}
	rand.Shuffle(len(t.addresses), func(i, j int) { //nolint:gosec // spreads load
		t.addresses[i], t.addresses[j] = t.addresses[j], t.addresses[i]
	})
	return t
}

func (t *tour) address() string { return t.addresses[t.at] }

// patient says that a stale replica is put up with: all others were tried.
func (t *tour) patient() bool { return t.settled || len(t.addresses) == 1 }

// next moves on after a session. joined says that the CA was in order, and
// err why the session ended. The answer is how long to rest.
func (t *tour) next(joined bool, err error) time.Duration {
	if joined {
		t.failures = 0
	}
	if errors.Is(err, errRenewed) {
		return 0 // the same again
	}
	t.settled = false
	switch {
	case errors.Is(err, errStale), errors.Is(err, errLook):
		if t.fallback < 0 {
			t.fallback = t.at
		}
		if joined {
			t.tried = 0 // all others are to be tried anew
		}
	case errors.Is(err, errEvidence):
		// What one replica says of the node's evidence all of them say.
		t.tried = len(t.addresses)
	}
	t.tried++
	t.at = (t.at + 1) % len(t.addresses)
	if t.tried < len(t.addresses) {
		return 0
	}
	t.tried = 0
	if t.fallback >= 0 {
		t.at, t.settled, t.fallback = t.fallback, true, -1
		return 0
	}
	wait := retryIn(t.failures)
	t.failures++
	return wait
}

// retryIn is how long to wait after so many failures in a row: about a third of
// the time that the CA has been away, so that one that restarts is found soon
// and one that is down is left alone.
func retryIn(failures int) time.Duration {
	d := firstRetry
	for range failures {
		if d = d * 13 / 10; d >= lastRetry {
			d = lastRetry
			break
		}
	}
	return jittered(d)
}

// jittered is d ± 30 %.
func jittered(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.7 + 0.6*rand.Float64())) //nolint:gosec // jitter
}
