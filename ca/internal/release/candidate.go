// What can become of a policy beside the plain push: tried as a candidate, put into
// force, taken away, and taken back to what was before.

package release

import (
	"context"
	"errors"
	"fmt"
	"time"

	"merlon.dev/ca/internal/store"
)

// PublishCandidate makes unsigned the candidate of the bundle called name, in shadow,
// in place of another one.
func (p *Publisher) PublishCandidate(ctx context.Context, name string, unsigned []byte) (*Head, error) {
	if err := p.check(name, unsigned); err != nil {
		return nil, err
	}
	return p.edit(ctx, name, func(before *Head) (draft, error) {
		if before == nil {
			return draft{}, &StateError{"there is no policy yet beside which a candidate could be tried: push this one without --candidate"}
		}
		next, now := *before, time.Now()
		next.Candidate = before.Candidate.next(now, Canary{})
		next.Candidate.Release = newRelease(Pushed, now)
		return draft{&next, []toSeal{{&next.Candidate.Release, true, unsigned}}}, nil
	})
}

// next is the step of c, which may be nil, that begins now.
func (c *Candidate) next(now time.Time, canary Canary) *Candidate {
	n := &Candidate{Step: 1}
	if c != nil {
		*n = *c
		n.Step++
	}
	n.Canary, n.Since, n.Alarm = canary, now.UTC(), nil
	return n
}

// Stage lets the candidate decide where canary says, and nowhere else.
func (p *Publisher) Stage(ctx context.Context, name string, generation uint64, canary Canary) (*Head, error) {
	return p.editCandidate(ctx, name, generation, func(before *Head) (draft, error) {
		next := *before
		next.Candidate = before.Candidate.next(time.Now(), canary)
		return draft{next: &next}, nil
	})
}

// Pause takes a canary back to shadow because of alarm. Where the step is another by
// now, nothing is done and the head is nil.
func (p *Publisher) Pause(ctx context.Context, name string, generation uint64, step uint32, alarm Alarm) (*Head, error) {
	moved := false
	h, err := p.edit(ctx, name, func(before *Head) (draft, error) {
		c := (*Candidate)(nil)
		if before != nil {
			c = before.Candidate
		}
		if moved = c == nil || c.Generation != generation || c.Step != step || c.Canary.Shadow(); moved {
			return draft{}, nil
		}
		next := *before
		next.Candidate = c.next(alarm.At, Canary{})
		next.Candidate.Alarm = &alarm
		return draft{next: &next}, nil
	})
	if moved {
		return nil, err
	}
	return h, err
}

// Promote puts the candidate's content into force, as the next generation.
func (p *Publisher) Promote(ctx context.Context, name string, generation uint64) (*Head, error) {
	return p.editCandidate(ctx, name, generation, func(before *Head) (draft, error) {
		return p.again(ctx, before, &before.Candidate.Release, true, Promoted, before.Candidate.Generation)
	})
}

// Abort takes the candidate away.
func (p *Publisher) Abort(ctx context.Context, name string, generation uint64) (*Head, error) {
	return p.editCandidate(ctx, name, generation, func(before *Head) (draft, error) {
		next := *before
		next.Candidate = nil
		return draft{next: &next}, nil
	})
}

// RollBack puts the content of generation to into force, for 0 of the one before, as
// the next generation.
func (p *Publisher) RollBack(ctx context.Context, name string, to uint64) (*Head, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	return p.edit(ctx, name, func(before *Head) (draft, error) {
		if before == nil {
			return draft{}, ErrNone
		}
		old, err := before.former(to)
		if err != nil {
			return draft{}, err
		}
		return p.again(ctx, before, old, false, RolledBack, old.origin())
	})
}

// again drafts the head in which the content of r is in force. Only what this CA
// signed: who can write the store alone must not have his policy signed.
func (p *Publisher) again(ctx context.Context, before *Head, r *Release, candidate bool, how string, of uint64) (draft, error) {
	signed, err := p.readBlob(ctx, before.Name, r)
	if errors.Is(err, store.ErrNotFound) {
		return draft{}, &StateError{fmt.Sprintf("the content of generation %d is not kept any more", r.Generation)}
	}
	if err != nil {
		return draft{}, err
	}
	unsigned, err := p.opts.Unsign(signed, before.Name, candidate)
	if err != nil {
		return draft{}, &StateError{fmt.Sprintf("generation %d is not taken up again: %v", r.Generation, err)}
	}
	next := before.succeed(before.Name, newRelease(how, time.Now()))
	next.Of = of
	return draft{next, []toSeal{{&next.Release, false, unsigned}}}, nil
}

// editCandidate is edit where there has to be a candidate; generation, if it is not 0,
// says which.
func (p *Publisher) editCandidate(ctx context.Context, name string, generation uint64, change func(before *Head) (draft, error)) (*Head, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	return p.edit(ctx, name, func(before *Head) (draft, error) {
		switch {
		case before == nil:
			return draft{}, ErrNone
		case before.Candidate == nil:
			return draft{}, &StateError{"there is no candidate"}
		case generation != 0 && before.Candidate.Generation != generation:
			return draft{}, &StateError{fmt.Sprintf("the candidate is generation %d, not %d", before.Candidate.Generation, generation)}
		}
		return change(before)
	})
}
