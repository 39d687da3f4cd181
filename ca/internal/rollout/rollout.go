// Package rollout is what enforcement points say of policy: by which generation each
// decides, and how a candidate compares with the policy in force. It judges when a
// canary denies too much. A replica keeps what its own agents say, and writes it down
// for the others, and for itself after a restart.
package rollout

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"merlon.dev/ca/internal/release"
	"merlon.dev/policy/comparison"
)

// Limits say when a canary is paused: when of at least MinCalls calls that the policy
// in force allows it denied more than the share MaxRise, of those to one destination
// or of all.
type Limits struct {
	MaxRise  float64
	MinCalls uint64
}

// Judge says whether what a canary decided, as r has it, is past the limits.
func (l Limits) Judge(r comparison.Report, now time.Time) (release.Alarm, bool) {
	var all comparison.Counts
	var worst release.Alarm
	rise := -1.0
	judge := func(destination string, c comparison.Counts) {
		allowed := c.BothAllow + c.WouldDeny
		if allowed == 0 || allowed < l.MinCalls {
			return
		}
		if share := float64(c.WouldDeny) / float64(allowed); share > l.MaxRise && share > rise {
			rise = share
			worst = release.Alarm{At: now.UTC().Truncate(time.Second), Destination: destination, Allowed: allowed, Denied: c.WouldDeny}
		}
	}
	for site, c := range r.Sites {
		if site.Canary {
			judge(site.Destination, c)
			all = all.Plus(c)
		}
	}
	if rise < 0 { // one destination says more than all
		judge("", all)
	}
	return worst, rise >= 0
}

// Trial names what is counted: a step of a candidate. The zero value is none.
type Trial struct {
	Generation uint64 `json:"generation"`
	Step       uint32 `json:"step"`
}

// TrialOf is that of h's candidate.
func TrialOf(h *release.Head) Trial {
	if h == nil || h.Candidate == nil {
		return Trial{}
	}
	return Trial{h.Candidate.Generation, h.Candidate.Step}
}

// Point is an agent, with the processes below it.
type Point struct {
	AgentID   string    `json:"agent_id"`
	Connected bool      `json:"connected,omitempty"`
	Bundle    string    `json:"bundle,omitempty"` // that it follows; "" where it did not say
	Known     bool      `json:"known,omitempty"`  // whether it said what is active there
	Active    uint64    `json:"active,omitempty"`
	Candidate uint64    `json:"candidate,omitempty"`
	Fault     string    `json:"fault,omitempty"`
	Processes []Process `json:"processes,omitempty"`
	// Unnamed is how many further processes there are.
	Unnamed int `json:"unnamed,omitempty"`
}

// Process decides by compiled policy.
type Process struct {
	SPIFFEID   string    `json:"spiffe_id"`
	PID        int32     `json:"pid"`
	Generation uint64    `json:"generation"`
	Lagging    time.Time `json:"lagging,omitzero"` // since when
}

// Said is what an agent said of the policy on its node.
type Said struct {
	Bundle    string
	Candidate uint64
	Fault     string
	Processes []Process
	Unnamed   int
}

// Board is safe for concurrent use.
type Board struct {
	mu sync.Mutex
	// guarded by mu
	said   map[string]Said // by agent
	trials map[string]*counted
	dirty  bool
	calls  comparison.Counts // since the start, of every trial
}

type counted struct {
	trial  Trial
	report comparison.Report
}

// NewBoard makes an empty board.
func NewBoard() *Board {
	return &Board{said: map[string]Said{}, trials: map[string]*counted{}}
}

// Hear notes what an agent said.
func (b *Board) Hear(agent string, s Said) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.said[agent], b.dirty = s, true
}

// Forget drops what an agent said that is gone.
func (b *Board) Forget(agent string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.said, agent)
	b.dirty = true
}

// Said is what the agent said last.
func (b *Board) Said(agent string) (Said, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, ok := b.said[agent]
	return s, ok
}

// Count adds to what is counted of the bundle called name, if now is its trial. Own is
// what was written down before this process began.
func (b *Board) Count(name string, now, of Trial, own *Share, r comparison.Report) {
	if now == (Trial{}) || of != now {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.counted(name, now, own).report.Add(r)
	b.dirty = true
	for _, c := range r.Sites {
		b.calls = b.calls.Plus(c)
	}
}

// counted is what is counted of trial; mu is held.
func (b *Board) counted(name string, trial Trial, own *Share) *counted {
	c := b.trials[name]
	if c == nil || c.trial != trial {
		c = &counted{trial: trial}
		c.report.Add(own.counts(trial))
		b.trials[name] = c
	}
	return c
}

// Counts is what was counted of trial: here, and by others as they wrote it down.
func (b *Board) Counts(name string, trial Trial, own *Share, others []*Share) comparison.Report {
	var sum comparison.Report
	if trial == (Trial{}) {
		return sum
	}
	b.mu.Lock()
	sum.Add(b.counted(name, trial, own).report)
	b.mu.Unlock()
	for _, o := range others {
		sum.Add(o.counts(trial))
	}
	return sum
}

// Calls are those that were compared since the start.
func (b *Board) Calls() comparison.Counts {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls
}

// TakeDirty says whether there is something new since the last time.
func (b *Board) TakeDirty() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	dirty := b.dirty
	b.dirty = false
	return dirty
}

// Dirty has the next TakeDirty say so.
func (b *Board) Dirty() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
}

// Since is from when a point has lagged behind h that decides by generation: when the
// first one after that was issued. Zero: it does not lag.
func Since(h *release.Head, generation uint64) time.Time {
	if generation >= h.Generation {
		return time.Time{}
	}
	since := h.IssuedAt
	for i := range h.History {
		if h.History[i].Generation <= generation {
			break
		}
		since = h.History[i].IssuedAt
	}
	return since
}

// laggardsFirst orders points so that those behind generation come first.
func laggardsFirst(points []Point, generation uint64) {
	slices.SortStableFunc(points, func(a, b Point) int {
		behind := func(p Point) int {
			if p.Active < generation || p.Fault != "" {
				return 0
			}
			return 1
		}
		return cmp.Or(behind(a)-behind(b), cmp.Compare(a.AgentID, b.AgentID))
	})
}
