// One call from its decision to its end, in one piece of memory: who calls, what
// was decided, and the context of its handler, which ends when the policy does not
// allow the call any more.

package sdk

import (
	"context"
	"crypto/tls"
	"sync/atomic"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk/internal/telemetry"
	"merlon.dev/sdk/svid"
)

// Call is a call that [Identity.Begin] has decided. As a context it is the one that
// the call came with, has peer and decision, and ends with the call, or with the
// denial as its cause when the policy stops allowing a call under way.
//
// What a context needs to be cancelled is made when somebody first asks for Done: to
// wait for it, or to make a context below it. Handlers that do neither do not pay
// for it. A Call is safe for concurrent use.
type Call struct {
	id     *Identity
	parent context.Context
	info   callInfo
	in     *policy.Input
	conn   connKey                // nil: not on a live connection
	place  *atomic.Pointer[Call]  // in the table of live calls; nil: not in it
	ended  func(policy.Decision)  // by the policy; may be nil
	own    atomic.Pointer[lasted] // below parent; nil: not asked for yet
	denied atomic.Pointer[policy.Decision]
	over   atomic.Bool
}

// lasted is a context that somebody waits for, or that has ended.
type lasted struct {
	context.Context
	cancel context.CancelCauseFunc
}

// Begin decides one call as [Identity.Decide] does, and watches over it as
// [Identity.Follow] does if it is allowed. It allocates the Call and nothing else,
// takes no lock, and is what httpauth and grpcauth use. in is kept, and must not
// change until End, which the caller owes every Call.
//
// ended, unless nil, is called at most once, with the denial that ends a call under
// way, before the Call's own context ends. It must not block.
func (id *Identity) Begin(ctx context.Context, cs *tls.ConnectionState, in *policy.Input, ended func(policy.Decision)) *Call {
	c := &Call{id: id, parent: ctx, in: in, ended: ended}
	conn, key := id.conns.find(cs)
	c.info.peer, c.info.decision = id.decideOn(ctx, cs, conn, in)
	if conn != nil {
		c.conn = key
	}
	if c.info.decision.Allow {
		id.follow(c)
	}
	return c
}

// Ask decides one call as [Identity.Decide] does, and gives the peer, nil for none,
// in place of a context that has it. It is for enforcement points that pass no
// context on, as proxies, and allocates nothing where the policy is compiled for
// this service.
func (id *Identity) Ask(ctx context.Context, cs *tls.ConnectionState, in *policy.Input) (*svid.Peer, policy.Decision) {
	conn, _ := id.conns.find(cs)
	return id.decideOn(ctx, cs, conn, in)
}

// Decision is what was decided when the call began.
func (c *Call) Decision() policy.Decision { return c.info.decision }

// Denied is the denial that has ended the call, and whether there is one.
func (c *Call) Denied() (policy.Decision, bool) {
	if d := c.denied.Load(); d != nil {
		return *d, true
	}
	return policy.Decision{}, false
}

// End ends the call: nothing watches over it any more, and its context ends. Ending
// it twice is harmless.
func (c *Call) End() {
	c.id.calls.remove(c)
	c.over.Store(true) // before own is read: see lasted
	if own := c.own.Load(); own != nil {
		own.cancel(nil)
	}
}

// Cut ends the connection that the call came on at once, for a reason that is logged.
func (c *Call) Cut(reason string) {
	if c.conn == nil {
		return
	}
	if conn := c.id.conns.at(c.conn); conn != nil {
		c.id.conns.cut(c.conn, conn, reason)
	}
}

// deny ends the call for d.
func (c *Call) deny(d policy.Decision) {
	if c.parent != nil {
		telemetry.OnSpan(c.parent, d) // the span ends with the call
	}
	c.denied.Store(&d)
	if c.ended != nil {
		c.ended(d)
	}
	if c.parent != nil { // else nobody has it as a context: see Follow
		c.lasted().cancel(DeniedBy(d))
	}
}

// lasted is the context below parent, made now if there was none.
func (c *Call) lasted() *lasted {
	if own := c.own.Load(); own != nil {
		return own
	}
	ctx, cancel := context.WithCancelCause(c.parent)
	own := &lasted{ctx, cancel}
	if !c.own.CompareAndSwap(nil, own) {
		cancel(nil)
		return c.own.Load()
	}
	if c.over.Load() { // End did not see it
		cancel(nil)
	}
	return own
}

// Deadline implements context.Context.
func (c *Call) Deadline() (time.Time, bool) { return c.parent.Deadline() }

// Done implements context.Context.
func (c *Call) Done() <-chan struct{} { return c.lasted().Done() }

// Err implements context.Context.
func (c *Call) Err() error {
	if c.over.Load() {
		return c.lasted().Err()
	}
	if own := c.own.Load(); own != nil {
		return own.Err()
	}
	return c.parent.Err()
}

// Value implements context.Context.
func (c *Call) Value(key any) any {
	if key == (callKey{}) {
		return &c.info
	}
	if own := c.own.Load(); own != nil {
		return own.Value(key) // package context looks for what can be cancelled
	}
	return c.parent.Value(key)
}
