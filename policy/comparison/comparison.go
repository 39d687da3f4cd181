// Package comparison counts what two generations of a policy say of the same calls:
// the one that is in force, and a candidate that is tried beside it. It knows counts,
// never calls, and its memory is bounded whatever arrives.
package comparison

import (
	"sync"

	"merlon.dev/policy"
)

// Bounds of one Tally.
const (
	MaxSites       = 4096
	MaxDifferences = 1024
	// MaxDifferenceBytes is what the texts of one difference may have: they come from
	// whoever compared the calls, and all of them are told on in one message.
	MaxDifferenceBytes = 2048
)

// Site is where calls arrive, and who decides them.
type Site struct {
	Destination string
	// Canary: the candidate decides; otherwise the policy in force does.
	Canary bool
}

// Counts are numbers of calls. WouldAllow are those that the candidate allows and the
// policy in force denies, WouldDeny the other way round.
type Counts struct{ BothAllow, BothDeny, WouldAllow, WouldDeny uint64 }

// Plus is the sum of both.
func (c Counts) Plus(d Counts) Counts {
	return Counts{c.BothAllow + d.BothAllow, c.BothDeny + d.BothDeny, c.WouldAllow + d.WouldAllow, c.WouldDeny + d.WouldDeny}
}

// Difference is a kind of call that comes out differently.
type Difference struct {
	Source, Destination string
	// What the policy in force says, and what the candidate says.
	Reason, CandidateReason policy.Reason
	RuleID, CandidateRuleID string
	CandidateAllows         bool
}

// bytes is what the texts of d have.
func (d *Difference) bytes() int {
	return len(d.Source) + len(d.Destination) + len(d.Reason) + len(d.CandidateReason) + len(d.RuleID) + len(d.CandidateRuleID)
}

// Report is what a Tally holds.
type Report struct {
	Sites       map[Site]Counts
	Differences map[Difference]uint64
	// Dropped is the number of calls with a difference that there was no room for.
	Dropped uint64
}

// Empty says whether nothing was counted.
func (r *Report) Empty() bool { return len(r.Sites) == 0 && len(r.Differences) == 0 && r.Dropped == 0 }

// Add adds what other holds, as far as there is room.
func (r *Report) Add(other Report) {
	if r.Sites == nil {
		r.Sites, r.Differences = map[Site]Counts{}, map[Difference]uint64{}
	}
	for site, c := range other.Sites {
		if before, known := r.Sites[site]; known || len(r.Sites) < MaxSites {
			r.Sites[site] = before.Plus(c)
		}
	}
	for d, n := range other.Differences {
		r.count(d, n)
	}
	r.Dropped += other.Dropped
}

func (r *Report) count(d Difference, n uint64) {
	if before, known := r.Differences[d]; known || len(r.Differences) < MaxDifferences && d.bytes() <= MaxDifferenceBytes {
		r.Differences[d] = before + n
	} else {
		r.Dropped += n
	}
}

// Tally counts. It is safe for concurrent use; the zero value is empty.
type Tally struct {
	mu     sync.Mutex
	report Report // guarded by mu
}

// Note counts one call: active is what the policy in force says of it and candidate
// what the candidate says, which decided it where canary is set. It says whether
// they differ.
func (t *Tally) Note(in *policy.Input, canary bool, active, candidate policy.Decision) (differ bool) {
	var one Counts
	switch {
	case active.Allow && candidate.Allow:
		one.BothAllow = 1
	case active.Allow:
		one.WouldDeny = 1
	case candidate.Allow:
		one.WouldAllow = 1
	default:
		one.BothDeny = 1
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	r := &t.report
	if r.Sites == nil {
		r.Sites, r.Differences = map[Site]Counts{}, map[Difference]uint64{}
	}
	site := Site{in.Destination, canary}
	if before, known := r.Sites[site]; known || len(r.Sites) < MaxSites {
		r.Sites[site] = before.Plus(one)
	}
	if active.Allow == candidate.Allow {
		return false
	}
	r.count(Difference{
		Source: in.Source, Destination: in.Destination, Reason: active.Reason, RuleID: active.RuleID,
		CandidateReason: candidate.Reason, CandidateRuleID: candidate.RuleID, CandidateAllows: candidate.Allow,
	}, 1)
	return true
}

// Add adds a report.
func (t *Tally) Add(r Report) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.report.Add(r)
}

// Take empties t.
func (t *Tally) Take() Report {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.report
	t.report = Report{}
	return r
}
