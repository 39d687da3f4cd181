// When a request may be tried once more, and how many may be at the same time: tries
// that are safe each are harmful together, where a service that is down gets a
// multiple of its load.

package hop

import (
	"slices"
	"sync/atomic"
)

// Retry is what a hop's requests may be tried again for.
type Retry struct {
	// Attempts are how many tries one request has at most, the first included.
	Attempts int
	// Methods are tried again, too, where the upstream broke off before its answer began,
	// and may have done what was asked.
	Methods []string
}

// Repeats says whether a request of that method is tried again though an upstream may
// have done what it asks.
func (r *Retry) Repeats(method string) bool { return slices.Contains(r.Methods, method) }

// Budget is how many of the requests under way may be further tries: a share of them in
// percent, or Floor where that is more.
type Budget struct{ Percent, Floor int }

// budget counts the further tries of a list of upstreams. It is safe for concurrent use.
type budget struct {
	underWay     atomic.Int64
	made, denied atomic.Int64
}

// Tries are those of one request. The zero value is the first. It is safe for
// concurrent use.
type Tries struct{ more, held atomic.Int32 }

// More is how many further ones there were.
func (t *Tries) More() int32 { return t.more.Load() }

// Again says whether a request may be tried once more, and counts that it is. Settle has
// to follow once the outcome is known.
func (h *Hop) Again(t *Tries) bool {
	if t.more.Load()+1 >= int32(h.Retry.Attempts) {
		return false
	}
	if !h.Upstreams.again() {
		return false
	}
	t.more.Add(1)
	t.held.Add(1)
	return true
}

// Settle gives back what the tries hold of the budget: an answer has begun, or none
// will.
func (h *Hop) Settle(t *Tries) {
	if t.held.Load() != 0 {
		h.Upstreams.budget.underWay.Add(-int64(t.held.Swap(0)))
	}
}

func (s *Upstreams) again() bool {
	var live int64
	for _, u := range s.all {
		live += u.Active()
	}
	if s.budget.underWay.Add(1) > max(live*int64(s.Budget.Percent)/100, int64(s.Budget.Floor)) {
		s.budget.underWay.Add(-1)
		s.budget.denied.Add(1)
		return false
	}
	s.budget.made.Add(1)
	return true
}

// Retries are the further tries so far, and those that the budget did not allow.
func (s *Upstreams) Retries() (made, denied int64) {
	return s.budget.made.Load(), s.budget.denied.Load()
}

// IsIdempotent says whether a request of that method may be made twice by the letter of
// RFC 9110 section 9.2.2.
func IsIdempotent(method string) bool {
	switch method {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}
