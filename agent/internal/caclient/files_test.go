// How often the CA is looked for.

package caclient

import (
	"testing"
	"time"
)

func TestRetriesGrowWithTheOutage(t *testing.T) {
	var away time.Duration
	for failures := range 200 {
		wait := retryIn(failures)
		if wait < firstRetry/2 || wait > lastRetry*14/10 {
			t.Fatalf("retryIn(%d) = %v", failures, wait)
		}
		// A restart that took three seconds is noticed within about one.
		if away < 3*time.Second && wait > 1500*time.Millisecond {
			t.Errorf("after %v away the pause is %v", away, wait)
		}
		away += wait
	}
}
