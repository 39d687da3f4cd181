// Calls that last. A decision is about a moment: when the policy changes, or a
// grant ends, every call that is still under way is decided again, and one that
// is not allowed any more is ended.

package sdk

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk/internal/telemetry"
)

// redecideEvery is how often calls are decided again without a change, because
// grants and policies end by the clock.
const redecideEvery = time.Second

// liveCalls is the table of calls under way: rows of places, each empty or with one
// call. A place is taken and left by compare-and-swap, so that no call waits for
// another; a row is added when those there are nearly full, and stays. It is safe
// for concurrent use.
type liveCalls struct {
	rows atomic.Pointer[row] // the newest, which is the largest
	poke chan struct{}
}

type row struct {
	places []atomic.Pointer[Call] // a power of two of them
	older  *row
}

const (
	// firstRow is how many calls at a time an Identity is made for, about twice.
	firstRow = 256
	// tries is how many places of a row a call looks at. Of a row that is half full
	// one call in 256 finds none.
	tries = 8
)

func newLiveCalls() *liveCalls {
	l := &liveCalls{poke: make(chan struct{}, 1)}
	l.rows.Store(&row{places: make([]atomic.Pointer[Call], firstRow)})
	return l
}

func (l *liveCalls) add(c *Call) {
	for {
		newest := l.rows.Load()
		for r := newest; r != nil; r = r.older {
			if r.take(c) {
				return
			}
		}
		l.rows.CompareAndSwap(newest, &row{make([]atomic.Pointer[Call], 2*len(newest.places)), newest})
	}
}

// take looks for a place from one that no two processors are likely to share.
func (r *row) take(c *Call) bool {
	at := int(rand.Uint32()) //nolint:gosec // a place in a table
	for i := range tries {
		place := &r.places[(at+i)&(len(r.places)-1)]
		if place.Load() != nil {
			continue
		}
		c.place = place // which nobody reads before the call is in it
		if place.CompareAndSwap(nil, c) {
			return true
		}
	}
	return false
}

// remove says whether c was still there.
func (l *liveCalls) remove(c *Call) bool {
	return c.place != nil && c.place.CompareAndSwap(c, nil)
}

func (l *liveCalls) len() (n int) {
	for r := l.rows.Load(); r != nil; r = r.older {
		for i := range r.places {
			if r.places[i].Load() != nil {
				n++
			}
		}
	}
	return n
}

func (l *liveCalls) all() (all []*Call) {
	for r := l.rows.Load(); r != nil; r = r.older {
		for i := range r.places {
			if c := r.places[i].Load(); c != nil {
				all = append(all, c)
			}
		}
	}
	return all
}

// changed has every call decided again.
func (l *liveCalls) changed() {
	select {
	case l.poke <- struct{}{}:
	default:
	}
}

// Follow watches over a call that d has allowed until stop is called: when the
// policy does not allow it any more, end is called once, with the denial. in is
// kept, and must not change. end must not block. Enforcement points use it for
// calls that can last; [Identity.Begin] decides and follows in one.
func (id *Identity) Follow(in *policy.Input, d policy.Decision, end func(policy.Decision)) (stop func()) {
	c := &Call{id: id, in: in, ended: end}
	c.info.decision = d
	id.follow(c)
	return func() { id.calls.remove(c) }
}

// follow enters a call, and then looks whether the policy that decided it is still
// the one in use: whoever changes it decides again what is in the table by then.
func (id *Identity) follow(c *Call) {
	id.calls.add(c)
	revision := c.info.decision.Revision
	stands := revision == id.generation.Load() || revision == id.candidate.Load()
	if p := id.program(c.in.Destination, time.Now()); p != nil {
		stands = revision == p.Generation()
	}
	if c.in.Source != "" && !stands { // it changed between the decision and now
		id.calls.changed()
	}
}

// followCalls decides live calls again until ctx ends.
func (id *Identity) followCalls(ctx context.Context) {
	every := time.NewTicker(redecideEvery)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-id.calls.poke:
			id.redecide(ctx, true)
		case <-every.C:
			telemetry.Current() // gauges need no call to be seen
			id.redecide(ctx, false)
		}
	}
}

// redecide decides every live call again; those that the agent must decide only
// if ask is set.
func (id *Identity) redecide(ctx context.Context, ask bool) {
	for _, c := range id.calls.all() {
		now := time.Now()
		p := id.program(c.in.Destination, now)
		switch {
		case c.in.Source == "": // without TLS
			if !id.audit.letsPlaintext(now) {
				id.endCall(ctx, c, policy.Deny(policy.NoIdentity))
			}
		case p != nil && id.stale(now) == "":
			if v := p.Decide(c.in, now); v.Allow() || id.audit.lets(v.Reason, now) {
				continue
			}
			id.endCall(ctx, c, id.decideHere(p, c.in, now))
		case p != nil:
			id.endCall(ctx, c, id.decideHere(p, c.in, now))
		case ask:
			d := id.askAgent(ctx, c.in)
			if d.Reason == policy.AgentUnavailable { // which says nothing about the call
				time.AfterFunc(redecideEvery, id.calls.changed)
				continue
			}
			id.endCall(ctx, c, d)
		}
	}
}

// endCall ends c if d denies it and it is still under way.
func (id *Identity) endCall(ctx context.Context, c *Call, d policy.Decision) {
	if d.Allow || id.audit.lets(d.Reason, time.Now()) || !id.calls.remove(c) {
		return
	}
	id.logDenied(ctx, c.in, d, nil)
	id.tell(ctx, c.in, d)
	c.deny(d)
}
