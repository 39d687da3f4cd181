// When an expired revocation may go. A clock that is ahead, if only for one
// start, would take revocations for expired while what they withdraw still
// lives, and nothing brings them back. So a record stays for its life once
// more, counted by the clock that only runs (time.Time's monotonic reading)
// from when it was first found expired: by then all that it can concern is over,
// whatever the other clock says.

package ca

import (
	"time"

	"merlon.dev/ca/internal/revocation"
)

// overdue holds when each record was first found expired, by key. It is the
// leader's, and begins anew with the next one.
type overdue map[string]time.Time

// ripe takes the records that are expired at now, and returns the keys of those
// that may go.
func (o overdue) ripe(expired []*revocation.Record, now time.Time) (keys []string) {
	still := make(map[string]bool, len(expired))
	for _, r := range expired {
		still[r.Key] = true
		since, found := o[r.Key]
		switch {
		case !found:
			o[r.Key] = now
		case now.Sub(since) >= r.Life():
			keys = append(keys, r.Key)
		}
	}
	for key := range o {
		if !still[key] { // removed, or the clock went back
			delete(o, key)
		}
	}
	return keys
}
