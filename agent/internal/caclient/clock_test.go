// The CA says with each message when it sent it, so that clocks that are apart are an
// alarm before anybody's SVID is refused for it (SECURITY.md T41).

package caclient

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
)

const year = 365 * 24 * time.Hour

// It is said once when they come apart, also by years and in both directions, and once
// more when they do after they were together; and never for less than half a minute.
func TestClocksThatDifferAreAnAlarm(t *testing.T) {
	for _, far := range []time.Duration{31 * time.Second, -31 * time.Second, time.Hour, -time.Hour, 5 * year, -5 * year} {
		synctest.Test(t, func(t *testing.T) {
			var log bytes.Buffer
			st := newStream(slog.New(slog.NewTextHandler(&log, nil)))
			said := 0
			for i, step := range []struct {
				ahead time.Duration // the node's clock, of the CA's
				alarm bool
			}{{0, false}, {30 * time.Second, false}, {far, true}, {far, false}, {-30 * time.Second, false}, {far, true}} {
				st.checkClock(t.Context(), &capb.SyncResponse{SentAt: timestamppb.New(time.Now().Add(-step.ahead))})
				if ahead, known := st.ClockAhead(); !known || ahead != step.ahead {
					t.Errorf("step %d: ClockAhead() = %s, %t; want %s", i, ahead, known, step.ahead)
				}
				if step.alarm {
					said++
				}
				if got := strings.Count(log.String(), `level=ERROR msg="clocks of CA and node differ"`); got != said {
					t.Errorf("step %d, apart by %s: %d alarms; want %d:\n%s", i, step.ahead, got, said, &log)
				}
			}
			st.checkClock(t.Context(), &capb.SyncResponse{}) // an older CA
			if ahead, _ := st.ClockAhead(); ahead != far {
				t.Errorf("a message without a time: %s; want what is known to stay", ahead)
			}
		})
	}
}
