// The generations that were active or tried before, so that a decision of one of them can be
// explained. They are kept as they were fetched, which is small, and compiled when
// somebody asks.

package policyfeed

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"merlon.dev/policy/bundle"
	"merlon.dev/policy/engine"
)

const (
	// maxPast and maxPastBytes bound what is kept beside the active generation.
	maxPast      = 4
	maxPastBytes = 8 << 20
)

// ErrGone is returned for a generation that is not kept any more.
var ErrGone = fmt.Errorf("the agent keeps the active generation and the %d before it, since it was started", maxPast)

// past is safe for concurrent use.
type past struct {
	mu sync.Mutex
	// guarded by mu
	kept []pastBundle // the active one last
}

// pastBundle is a bundle that was verified with keys.
type pastBundle struct {
	generation uint64
	raw        []byte
	keys       []bundle.Key
	candidate  bool
}

// keep takes in the generation that is active from now on.
func (p *past) keep(b pastBundle) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kept = slices.DeleteFunc(p.kept, func(old pastBundle) bool { return old.generation == b.generation && old.candidate == b.candidate })
	p.kept = append(p.kept, b) // another share of the same takes its place
	size := 0
	for i, b := range slices.Backward(p.kept) {
		size += len(b.raw)
		if before := len(p.kept) - 1 - i; before > maxPast || before > 0 && size > maxPastBytes {
			p.kept = slices.Clone(p.kept[i+1:])
			return
		}
	}
}

func (p *past) find(generation uint64) (pastBundle, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range slices.Backward(p.kept) {
		if b.generation == generation {
			return b, true
		}
	}
	return pastBundle{}, false
}

// Of returns the policy of a generation that is or was active or tried; ErrGone where it is
// too long ago. It is for explanations: one that is not active is compiled for each.
func (f *Feed) Of(ctx context.Context, generation uint64) (*engine.Engine, error) {
	now := f.Now()
	for _, e := range []*engine.Engine{now.Active, now.Candidate} {
		if e != nil && e.Generation() == generation {
			return e, nil
		}
	}
	b, ok := f.past.find(generation)
	if !ok {
		return nil, ErrGone
	}
	e, err := f.compile(ctx, b.raw, b.keys, bundle.Expect{MinGeneration: generation, Candidate: b.candidate})
	if err == nil && e.Generation() != generation {
		err = errors.New("it is another generation")
	}
	return e, err
}
