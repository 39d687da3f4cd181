// Deadlines, for all connections of an engine by one goroutine: what should have
// happened by now is looked for once a second.

package http2

import (
	"errors"
	"time"

	codec "golang.org/x/net/http2"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

const (
	round = time.Second
	// writeTimeout is how long a peer may take nothing at all.
	writeTimeout = 30 * time.Second
	// pingAfter is after how long a silence on a connection with open streams the peer
	// is asked whether it still lives. gRPC's servers take more for an attack.
	pingAfter = 6 * time.Minute
	pongTime  = 30 * time.Second
)

// keep looks once a second until the engine is closed.
func (e *engine) keep() {
	every := time.NewTicker(round)
	defer every.Stop()
	for {
		select {
		case <-e.done:
			return
		case now := <-every.C:
			e.clock.Store(now.Unix())
			for _, c := range e.all() {
				c.check(now.Unix())
			}
		}
	}
}

// late says whether limit has passed since a time that is 0 for never.
func late(since, now int64, limit time.Duration) bool {
	return since != 0 && limit > 0 && now-since > int64(limit/time.Second)
}

// check ends what is overdue.
func (c *conn) check(now int64) {
	l := &c.eng.hop.Limits
	c.calm.tick()
	if late(c.writeAt.Load(), now, writeTimeout) || late(c.listAt.Load(), now, l.HeadTimeout) || late(c.frameAt.Load(), now, writeTimeout) {
		c.kill()
		return
	}
	c.mu.Lock()
	switch c.goodbye {
	case announced:
		c.sayLast()
	case staying:
		state := c.caller.State
		if c.pool != nil {
			state = c.state
		}
		idle := len(c.streams) == 0 && late(c.idleSince, now, l.IdleTimeout)
		if idle || state != nil && c.eng.hop.Identity.Draining(state) {
			c.sayGoodbye()
		}
	}
	dead := c.probe(now)
	var overdue, stalled, over []*call
	if c.pool == nil {
		overdue, stalled, over = c.overdue(now)
	}
	leaving := c.goodbye != staying
	c.unlock(nil)
	if c.pool != nil && leaving {
		c.pool.leave(c)
	}
	if dead {
		c.kill()
	}
	for _, k := range overdue {
		k.fail(hop.Late, errors.New("the upstream's answer did not begin in time"), nil)
	}
	for _, k := range stalled {
		k.fail(hop.Late, errors.New("nothing has moved for too long"), nil)
	}
	for _, k := range over {
		k.fail(hop.Late, errors.New("the request is not over in time"), nil)
	}
}

// probe says whether the peer is dead, and asks it where that is in doubt. c.mu is
// held.
func (c *conn) probe(now int64) (dead bool) {
	switch silent := now - c.heardAt.Load(); {
	case len(c.streams) == 0 || silent < int64(pingAfter/time.Second):
		c.pinged = false
	case !c.pinged:
		c.pinged = true
		c.putFrame(codec.FramePing, 0, 0, make([]byte, 8))
		c.written(nil)
	default:
		dead = silent > int64((pingAfter+pongTime)/time.Second)
	}
	return dead
}

// overdue are the calls whose answer does not begin, those of which nothing moves, and
// those that should be over.
// How long the answer to a gRPC call may take its caller says himself, and a stream on
// which nobody has anything to say is none that stalls. c.mu is held.
func (c *conn) overdue(now int64) (overdue, stalled, over []*call) {
	l := &c.eng.hop.Limits
	grpc := c.eng.hop.Protocol == policy.GRPC
	for _, s := range c.streams {
		switch moved := s.call.movedAt.Load(); {
		case l.RequestTimeout > 0 && late(s.call.entry.Begun.Unix(), now, l.RequestTimeout):
			over = append(over, s.call)
		case !grpc && !s.begun && s.recvEnd && late(moved, now, l.ResponseTimeout):
			overdue = append(overdue, s.call)
		case (!grpc || s.queue.n > 0) && late(moved, now, l.StallTimeout):
			stalled = append(stalled, s.call)
		}
	}
	return overdue, stalled, over
}

// kill closes the connection at once.
func (c *conn) kill() { c.eng.goroutines.Go(c.hangUp) }
