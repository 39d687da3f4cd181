// What the agent says is in use, and since when that is more than this process has. An
// announcement is the word of an agent that is there: it has lag to send what belongs to
// it, and then what is at hand decides nothing any more. An agent that is gone before is
// no worse than one that was gone before it spoke: its announcement goes with it.

package sdk

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// lag is how long calls are decided by what is at hand after the agent has said that
	// another policy is active. A program comes within milliseconds; where none does, the
	// agent is asked.
	lag = 2 * time.Second
	// maxAwaited bounds the announcements that are told apart; further ones count as
	// said when the last of them was, which is earlier.
	maxAwaited = 64
)

// news are the versions of the policy that the agent has announced. The zero value has
// heard of none. It is safe for concurrent use.
type news struct {
	// since is when the first of awaited was announced, by the steady clock; 0: nothing
	// is awaited. It is read for each call.
	since atomic.Int64
	// asOf is until when the policy at hand is known to be the one in force, by the steady
	// clock in Unix nanoseconds; 0: never. Where none is at hand it is that of the agent's.
	asOf atomic.Int64

	mu sync.Mutex
	// guarded by mu
	heardAsOf int64  // that of the policy which the agent has
	said      uint64 // the last announcement, of an agent that may be gone
	have      uint64 // the version at hand; 0: none came yet
	awaited   []announced
}

// announced is a version that is newer than the one at hand.
type announced struct {
	version uint64
	at      int64 // Unix nanoseconds of the steady clock
}

// overdue says whether it should have come by now.
func (a announced) overdue(now time.Time) bool { return steady(now).UnixNano()-a.at >= int64(lag) }

// hear takes in what the agent says is in use, and says whether that is another version
// than it said last.
func (n *news) hear(version uint64, now time.Time) (changed bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	changed = version != n.said
	n.said = version
	switch last := len(n.awaited) - 1; {
	case n.have == 0 || version <= n.have: // what came was faster than the news of it
		n.awaited = nil
	case last >= 0 && n.awaited[last].version == version:
	case last+1 == maxAwaited:
		n.awaited[last].version = version
	default:
		n.awaited = append(n.awaited, announced{version, steady(now).UnixNano()})
	}
	n.settle()
	return changed
}

// hearAsOf takes in until when the policy that the agent has was in force. That says
// nothing of an older one at hand, which ages.
func (n *news) hearAsOf(at int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.heardAsOf = at
	n.rejuvenate()
}

// arrive takes in that a version is at hand.
func (n *news) arrive(version uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.have = version
	n.awaited = slices.DeleteFunc(n.awaited, func(a announced) bool { return a.version <= version })
	n.settle()
	n.rejuvenate()
}

// rejuvenate has the policy at hand be as old as the agent's, if that is the same one.
// n.mu is held.
func (n *news) rejuvenate() {
	if len(n.awaited) == 0 {
		n.asOf.Store(n.heardAsOf)
	}
}

// gone takes in that the stream of announcements has ended, and says whether what is at
// hand decides on although another version was announced. What an agent that was there
// did not send in time stays awaited, whoever comes after it: nobody who is refused since
// gets in again because that agent ends.
func (n *news) gone(now time.Time) (forgiven bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	awaits := len(n.awaited) > 0
	n.awaited = slices.DeleteFunc(n.awaited, func(a announced) bool { return !a.overdue(now) })
	n.settle()
	return awaits && len(n.awaited) == 0
}

// settle has calls see what is awaited. n.mu is held.
func (n *news) settle() {
	since := int64(0)
	if len(n.awaited) > 0 {
		since = n.awaited[0].at
	}
	n.since.Store(since)
}

// decides says whether what is at hand decides now.
func (n *news) decides(now time.Time) bool {
	since := n.since.Load()
	return since == 0 || !announced{at: since}.overdue(now)
}
