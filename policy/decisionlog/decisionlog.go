// Package decisionlog keeps the record of decisions: exact counts of all of them,
// and in a bounded ring all denials, all decisions that a dry-run grant would have
// changed, and a sample of the other allowed calls. To record costs a call some
// hundred nanoseconds and no allocation, and never makes it wait. What is in the
// ring one goroutine takes out: in the SDK to tell the agent, in the agent to write
// it down (Writer) as OPA writes decision logs. It imports no OPA.
package decisionlog

// This file is what a call meets: what is counted, what is kept, and what is
// dropped.

import (
	"sync/atomic"
	"time"

	"merlon.dev/policy"
)

// Options of a Recorder. Zero fields have defaults.
type Options struct {
	// Records is how many decisions wait for whoever takes them out, a power of
	// two; 1024 where zero, less than zero for none: decisions are only counted.
	Records int
	// Rows is how many different rows are counted; 1024 where zero.
	Rows int
	// RowsPerDestination is how many of them one destination may have, so that a
	// service which makes callers up leaves room for the others; 0 for all.
	RowsPerDestination int
	// AllowsPerSecond is about how many allowed calls are kept; 10 where zero, none
	// where less.
	AllowsPerSecond int
}

// Recorder takes decisions in. It is safe for concurrent use; Take, Waiting and
// TakeCounts are for one goroutine.
type Recorder struct {
	counts  *Counts
	ring    *ring // nil: only counted
	sampler sampler
	dropped atomic.Uint64
	wake    chan struct{}
}

// NewRecorder makes a Recorder, with all the memory that its records will need.
func NewRecorder(o Options) *Recorder {
	or := func(n, otherwise int) int {
		if n == 0 {
			return otherwise
		}
		return n
	}
	r := &Recorder{counts: newCounts(or(o.Rows, 1024), o.RowsPerDestination), wake: make(chan struct{}, 1)}
	if n := or(o.Records, 1024); n > 0 {
		r.ring = newRing(n)
	}
	if n := or(o.AllowsPerSecond, 10); n > 0 {
		r.sampler.pause = int64(time.Second) / int64(n)
	}
	return r
}

// Record counts the decision d about the call in, and keeps it where it is to be
// kept. in and d are not kept, nor written to. Both are complete: in.Destination
// is the service that decided.
func (r *Recorder) Record(in *policy.Input, d *policy.Decision, now time.Time) {
	row := r.counts.row(in.Source, in.Destination, d.RuleID, string(d.Reason))
	row.n.Add(1)
	if r.ring == nil {
		return
	}
	at, standsFor := now.UnixNano(), uint64(1)
	if d.Allow && len(d.DryRun) == 0 {
		if standsFor = r.sampler.take(at); standsFor == 0 {
			return
		}
	}
	if !r.put(row, in, d, at, standsFor, 0) && d.Allow && len(d.DryRun) == 0 {
		r.sampler.giveBack(standsFor) // the next one stands for these, too
	}
}

// Add keeps a decision that was counted elsewhere; standsFor is how many allowed
// calls it stands for, itself included, and 1 for all others. incomplete is what of
// the call was left out.
func (r *Recorder) Add(in *policy.Input, d *policy.Decision, at time.Time, standsFor uint64, incomplete Fields) {
	if r.ring != nil {
		r.put(r.counts.row(in.Source, in.Destination, d.RuleID, string(d.Reason)), in, d, at.UnixNano(), max(standsFor, 1), incomplete)
	}
}

// Count adds n decisions that were made elsewhere to the counts.
func (r *Recorder) Count(source, destination, ruleID string, reason policy.Reason, n uint64) {
	if source == Other {
		r.counts.otherOf(string(reason)).n.Add(n)
		return
	}
	r.counts.row(source, destination, ruleID, string(reason)).n.Add(n)
}

// put keeps a record if there is room.
func (r *Recorder) put(row *Row, in *policy.Input, d *policy.Decision, at int64, standsFor uint64, incomplete Fields) bool {
	rec, place := r.ring.begin()
	if rec == nil {
		if !d.Allow || len(d.DryRun) > 0 {
			r.dropped.Add(1)
		}
		return false
	}
	rec.set(row, in, d, at, standsFor, incomplete)
	r.ring.end(place)
	select {
	case r.wake <- struct{}{}:
	default:
	}
	return true
}

// Dropped is how many denials and dry-run differences there was no room for.
func (r *Recorder) Dropped() uint64 { return r.dropped.Load() }

// DroppedElsewhere adds decisions that a service had no room to report.
func (r *Recorder) DroppedElsewhere(n uint64) { r.dropped.Add(n) }

// Waiting says whether there is something to take.
func (r *Recorder) Waiting() bool { return r.ring != nil && r.ring.waiting() }

// Woken says that there may be something to take.
func (r *Recorder) Woken() <-chan struct{} { return r.wake }

// Take hands up to limit records to f, in the order in which they came, and says
// how many there were. A record is f's until f returns.
func (r *Recorder) Take(limit int, f func(*Record)) (n int) {
	for r.ring != nil && n < limit && r.ring.next(f) {
		n++
	}
	return n
}

// Rows are the counts so far, the largest first.
func (r *Recorder) Rows() []Count {
	return r.counts.rows(func(row *Row) uint64 { return row.n.Load() })
}

// TakeCounts are the counts since those that were taken last, of as many rows as
// have texts of room bytes; done takes them. Where it is not called they come again.
func (r *Recorder) TakeCounts(room int) (since []Count, done func()) {
	upTo := map[*Row]uint64{}
	since = r.counts.rows(func(row *Row) uint64 {
		n := row.n.Load()
		if n == row.taken || room < 0 {
			return 0
		}
		room -= len(row.Source) + len(row.Destination) + len(row.RuleID) + len(row.Reason)
		upTo[row] = n
		return n - row.taken
	})
	return since, func() {
		for row, n := range upTo {
			row.taken = n
		}
	}
}

// sampler chooses which allowed calls are kept: about one in each pause, with how
// many went by since the last. Under load it takes every n-th, so that what
// happens within a pause is not hidden by what begins it; n follows the load.
type sampler struct {
	pause   int64 // between two, in nanoseconds; 0: none are kept
	every   atomic.Uint64
	lastAt  atomic.Int64
	carried atomic.Uint64 // of those that were chosen and could not be kept
	_       [64]byte      // what every call writes is not beside what every call reads
	since   atomic.Uint64
	_       [64]byte
}

// maxPauses is after how many pauses the next call is kept, whatever n is.
const maxPauses = 10

// take is called for each allowed call. It says how many calls this one stands for,
// itself included; 0 if it is not chosen.
func (s *sampler) take(at int64) uint64 {
	if s.pause == 0 {
		return 0
	}
	n := s.since.Add(1)
	last := s.lastAt.Load()
	elapsed := at - last
	if n < s.every.Load() && elapsed < maxPauses*s.pause && elapsed >= 0 {
		return 0
	}
	if !s.since.CompareAndSwap(n, 0) { // another call went by, and is chosen instead
		return 0
	}
	s.lastAt.Store(at)
	s.adapt(n, elapsed)
	return n + s.carried.Swap(0)
}

// adapt sets n so that at this rate one call is chosen in each pause. It at most
// doubles, because a few calls in a row say little about the rate.
func (s *sampler) adapt(n uint64, elapsed int64) {
	next := 2 * n
	if elapsed > 0 {
		next = min(next, uint64(float64(n)*float64(s.pause)/float64(elapsed)))
	}
	s.every.Store(max(next, 1))
}

func (s *sampler) giveBack(n uint64) { s.carried.Add(n) }
