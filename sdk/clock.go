// Clocks that are set. A certificate is good or not by the wall clock, whatever that
// says; an age, and the life of a connection, must neither grow nor shrink with it.

package sdk

import "time"

// begun is where steady begins.
var begun = time.Now()

// steady is now by a wall clock that nobody has set since this process began.
func steady(now time.Time) time.Time { return begun.Add(now.Sub(begun)) }

// steadyAsOf is at, of which the agent spoke at now, by the steady clock, in Unix
// nanoseconds; 0 stays 0: never. What lies ahead of now counts as now.
func steadyAsOf(at, now time.Time) int64 {
	if at.Unix() == 0 {
		return 0
	}
	return steady(now).Add(-max(0, now.Sub(at))).UnixNano()
}
