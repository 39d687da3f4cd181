// What is known of an upstream, from its requests and from checks alike, and so
// whether it gets requests: kept here and nowhere else.

package hop

import (
	"sync"
	"sync/atomic"
	"time"
)

// State says whether an upstream gets requests.
type State string

// The states. A resting upstream has just failed a request and is left alone for a
// moment; an unhealthy one has failed its checks, and is left alone until they pass.
const (
	Healthy   State = "healthy"
	Resting   State = "resting"
	Unhealthy State = "unhealthy"
)

// How long an upstream rests after a failure: restAfter, doubled with each further
// one, at most restAtMost.
const (
	restAfter  = 250 * time.Millisecond
	restAtMost = 10 * time.Second
)

// Thresholds are how many checks in a row, against what is known, change it. The
// first check of all counts at once.
type Thresholds struct{ Healthy, Unhealthy int }

// condition is what is known of one upstream. It is safe for concurrent use.
type condition struct {
	failures  atomic.Int64 // of requests, in a row
	retryAt   atomic.Int64 // UnixNano; until then it rests
	unhealthy atomic.Bool  // as checks say

	mu      sync.Mutex // guards the rest
	checked Checked
	streak  int // of checks that contradict unhealthy
}

// Checked is what checks of an upstream have found.
type Checked struct {
	Passed, Failed int64
	// Since is when the last change was; zero before any check.
	Since time.Time
	// Err is why the last check has failed; empty where it passed.
	Err string
}

func (c *condition) at(now time.Time) State {
	switch {
	case c.unhealthy.Load():
		return Unhealthy
	case c.retryAt.Load() > now.UnixNano():
		return Resting
	}
	return Healthy
}

// rank orders the states: those with a lower one come first.
func (c *condition) rank(now time.Time) int {
	switch c.at(now) {
	case Healthy:
		return 0
	case Resting:
		return 1
	}
	return 2
}

// answered takes in a request that was answered, failed one that was not.
func (c *condition) answered() {
	if c.failures.Load() != 0 {
		c.failures.Store(0)
		c.retryAt.Store(0)
	}
}

func (c *condition) failed(now time.Time) {
	rest := restAtMost
	if n := c.failures.Add(1); n < 7 {
		rest = min(restAfter<<(n-1), restAtMost)
	}
	c.retryAt.Store(now.Add(rest).UnixNano())
}

// check takes in the outcome of a check, nil where it passed, and says whether the
// upstream has become healthy or unhealthy by it. One that has become healthy does not
// rest any more.
func (c *condition) check(err error, t Thresholds, now time.Time) (changed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := c.checked.Since.IsZero()
	needed := t.Unhealthy
	if c.checked.Err = ""; err != nil {
		c.checked.Err = err.Error()
		c.checked.Failed++
	} else {
		c.checked.Passed++
		needed = t.Healthy
	}
	if was := c.unhealthy.Load(); was == (err != nil) {
		c.streak = 0
	} else if c.streak++; first || c.streak >= needed {
		c.streak, changed = 0, true
		if was {
			c.answered()
		}
		c.unhealthy.Store(!was)
	}
	if first || changed {
		c.checked.Since = now
	}
	return changed
}
