// Calls that last. A decision is about a moment: when the policy changes, or a
// grant ends, every call that is still under way is decided again, and one that
// is not allowed any more is ended.

package sdk

import (
	"context"
	"sync"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk/internal/telemetry"
)

// redecideEvery is how often calls are decided again without a change, because
// grants and policies end by the clock.
const redecideEvery = time.Second

// liveCalls is the table of calls under way. It is safe for concurrent use.
type liveCalls struct {
	mu    sync.Mutex
	calls map[*liveCall]struct{} // guarded by mu
	poke  chan struct{}
}

type liveCall struct {
	in  *policy.Input
	end func(policy.Decision)
}

func newLiveCalls() *liveCalls {
	return &liveCalls{calls: make(map[*liveCall]struct{}), poke: make(chan struct{}, 1)}
}

func (l *liveCalls) add(c *liveCall) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls[c] = struct{}{}
}

// remove says whether c was still there.
func (l *liveCalls) remove(c *liveCall) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.calls[c]
	delete(l.calls, c)
	return ok
}

func (l *liveCalls) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.calls)
}

func (l *liveCalls) all() []*liveCall {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := make([]*liveCall, 0, len(l.calls))
	for c := range l.calls {
		all = append(all, c)
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
// calls that can last; httpauth and grpcauth do so by themselves.
func (id *Identity) Follow(in *policy.Input, d policy.Decision, end func(policy.Decision)) (stop func()) {
	c := &liveCall{in: in, end: end}
	id.calls.add(c)
	stands := d.Revision == id.generation.Load() || d.Revision == id.candidate.Load()
	if p := id.program(in.Destination, time.Now()); p != nil {
		stands = d.Revision == p.Generation()
	}
	if in.Source != "" && !stands { // it changed between the decision and now
		id.calls.changed()
	}
	return func() { id.calls.remove(c) }
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
func (id *Identity) endCall(ctx context.Context, c *liveCall, d policy.Decision) {
	if d.Allow || id.audit.lets(d.Reason, time.Now()) || !id.calls.remove(c) {
		return
	}
	id.logDenied(ctx, c.in, d, nil)
	id.tell(ctx, c.in, d)
	c.end(d)
}
