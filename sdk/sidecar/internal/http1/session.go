// Package http1 serves HTTP/1.1 as a sidecar has to: one goroutine per connection
// reads a head, has it decided, and sends the very lines on. It is not built on
// net/http, which parses, normalizes and writes anew: that costs several times as
// much, and leaves room between what is decided and what is sent.
package http1

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// New is the engine of protocol http.
func New(h *hop.Hop) hop.Engine {
	e := &engine{hop: h, pools: make(map[*hop.Upstream]*pool), callers: newWatch(), stop: func() {}}
	for _, u := range h.Upstreams.All() {
		e.pools[u] = newPool(h, u)
	}
	if h.Direction == hop.Outbound {
		e.stop = h.Identity.OnRotate(func() {
			for _, p := range e.pools {
				p.renew()
			}
		})
	}
	return e
}

type engine struct {
	hop   *hop.Hop
	pools map[*hop.Upstream]*pool
	// callers tells of those that go away.
	callers *watch
	stop    func()
}

// Close implements hop.Engine.
func (e *engine) Close() {
	e.stop()
	e.callers.close()
	for _, p := range e.pools {
		p.close()
	}
}

// session is one connection of a caller.
type session struct {
	*engine
	ending context.Context // when it ends, so does the connection, after the request under way
	ctx    context.Context // of the work for it, which goes on then
	near   net.Conn
	caller hop.Caller
	// identity are the header lines that tell the app who calls.
	identity []byte

	in    buffer
	clock clock
	req   message
	res   message
	names []string // of req.fields, in lower case; inbound
	entry hop.Entry
	// deadline is when the request has to be over; zero: whenever.
	deadline time.Time

	current atomic.Pointer[call] // that is on its way to an upstream; nil: none
	left    atomic.Bool          // the caller sends nothing any more
	cut     atomic.Bool          // this side has closed the connection

	mu       sync.Mutex // guards the rest
	idle     bool       // between two requests
	served   bool       // one request at least
	draining bool
}

// firstRequest is how long a connection that was just accepted may take to make its
// first request when the sidecar ends: whoever opens one means to.
const firstRequest = time.Second

// Serve implements hop.Engine.
func (e *engine) Serve(ctx context.Context, conn net.Conn) {
	s := &session{engine: e, ending: ctx, ctx: context.WithoutCancel(ctx), near: conn, caller: e.hop.CallerOf(conn)}
	if s.caller.ID != "" {
		s.identity = []byte(hop.IDField + ": " + s.caller.ID + "\r\n" + hop.CertField + ": " + s.caller.Cert + "\r\n")
	}
	defer conn.Close()
	defer s.in.release()
	stop := context.AfterFunc(ctx, s.drain)
	defer stop()
	onClose(conn, s.closed)
	number := e.callers.add(conn, s)
	defer e.callers.remove(number)
	for s.serveOne() {
	}
}

// drain has the connection end after the request under way.
func (s *session) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
	if s.idle {
		_ = s.near.SetReadDeadline(s.lastMoment()) // it may be closed already
	}
}

// lastMoment is until when a connection may still make a request when the sidecar
// ends. s.mu is held.
func (s *session) lastMoment() time.Time {
	if s.served {
		return time.Unix(1, 0)
	}
	return time.Now().Add(firstRequest)
}

func (s *session) isDraining() bool { return s.ending.Err() != nil }

// await waits for the first byte of a request, without holding much.
func (s *session) await() error {
	s.in.shrink()
	if len(s.in.bytes()) > 0 {
		return nil // it came with the one before
	}
	s.mu.Lock()
	s.idle = true
	var err error
	if s.draining {
		err = s.near.SetReadDeadline(s.lastMoment())
	} else {
		err = s.clock.tick(s.near, true, s.hop.Limits.IdleTimeout)
	}
	s.mu.Unlock()
	if err == nil {
		err = s.in.fill(s.near, s.hop.Limits.HeadBytes)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.idle, s.served = false, true
	if s.draining && err == nil {
		s.clock.read = time.Time{} // drain has moved the deadline
	}
	return err
}

// readHead waits for the whole head of a request and gives its length.
func (s *session) readHead() (end int, err error) {
	if err := s.await(); err != nil {
		return 0, err
	}
	limited := false
	for from := 0; ; {
		end, from, err = endOfHead(s.in.bytes(), from)
		switch {
		case err != nil:
			return 0, &malformedError{err}
		case end > s.hop.Limits.HeadBytes, end == 0 && len(s.in.bytes()) >= s.hop.Limits.HeadBytes:
			return 0, &malformedError{errLong}
		case end > 0:
			return end, nil
		}
		if !limited { // from its first byte, however slowly it comes
			limited = true
			s.clock.read = time.Time{}
			if err := s.near.SetReadDeadline(time.Now().Add(s.hop.Limits.HeadTimeout)); err != nil {
				return 0, err
			}
		}
		if err := s.in.fill(s.near, s.hop.Limits.HeadBytes); err != nil {
			return 0, err
		}
	}
}

// malformedError is for a request that reaches nobody.
type malformedError struct{ why error }

// Error implements error.
func (e *malformedError) Error() string { return e.why.Error() }

// serveOne serves one request. It says whether another one may follow.
func (s *session) serveOne() bool {
	end, err := s.readHead()
	if bad, ok := errors.AsType[*malformedError](err); ok {
		s.begin()
		return s.refuse(new(call), bad.why)
	}
	if err != nil {
		return false // nobody asks for anything any more
	}
	s.begin()
	c := new(call)
	err = s.req.parseRequest(s.in.bytes()[:end:end], s.hop.Limits.HeaderFields)
	s.describe(c)
	if err != nil {
		return s.refuse(c, err)
	}
	// All that is needed of the head is built from it before the buffer moves.
	c.body = body{
		conn: s.near, in: &s.in, maxBytes: s.hop.Limits.HeadBytes, maxFields: s.hop.Limits.HeaderFields,
	}
	c.body.form, c.body.left = s.req.bodyOf()
	if s.hop.Direction == hop.Inbound {
		c.body.drop = s.hop.Strip
	}
	return s.handle(c, end)
}

func (s *session) begin() {
	s.entry = hop.Entry{Begun: time.Now(), Source: s.caller.ID, Remote: s.caller.Remote}
	if limit := s.hop.Limits.RequestTimeout; limit > 0 {
		s.deadline = s.entry.Begun.Add(limit)
	}
}

// within is limit, or what is left until the request has to be over.
func (s *session) within(limit time.Duration) time.Duration {
	if s.deadline.IsZero() {
		return limit
	}
	return min(limit, max(time.Until(s.deadline), 0))
}

// late says whether the request should be over.
func (s *session) late() bool { return !s.deadline.IsZero() && time.Now().After(s.deadline) }

// errLate is for a request that should be over.
var errLate = fmt.Errorf("the request is not over in time: %w", os.ErrDeadlineExceeded)

// over records the request.
func (s *session) over(c *call) {
	s.entry.Took = time.Since(s.entry.Begun)
	s.current.Store(nil)
	s.entry.BytesIn = c.bytesIn
	s.hop.Settle(&c.tries)
	s.entry.Retries = c.tries.More()
	if c.counted {
		s.hop.End()
	}
	s.hop.Record(&s.entry)
}

// handle decides the request and sends it on.
func (s *session) handle(c *call, end int) bool {
	whole, err := c.body.check(s.in.bytes()[end:])
	if err != nil {
		return s.refuse(c, err)
	}
	c.whole = whole
	if !s.hop.Begin() { // before anything that costs more
		s.in.skip(end)
		return s.turnAway(c, hop.ListenerFull, hop.ErrListenerFull)
	}
	c.counted = true
	if s.hop.Direction == hop.Outbound {
		return s.forward(c, end)
	}
	if err := policy.CheckPath(c.in.Path); err != nil {
		return s.refuse(c, err)
	}
	_, d := s.hop.Identity.Decide(s.entry.Trace.Context(s.ctx), s.caller.State, &c.in)
	s.noteDecision(d)
	if !d.Allow {
		s.in.skip(end)
		return s.deny(c, d)
	}
	c.decision = d
	stop := s.hop.Identity.Follow(&c.in, d, func(d policy.Decision) { c.end(s, d) })
	defer stop()
	return s.forward(c, end)
}

func (s *session) noteDecision(d policy.Decision) {
	s.entry.Reason, s.entry.DecisionID, s.entry.Denied = d.Reason, d.DecisionID, !d.Allow
}

// call is one request under way. It is not used again: who follows it may still hold
// it when it is over.
type call struct {
	in       policy.Input
	decision policy.Decision
	body     body
	whole    bool // all of the body had come with the head
	counted  bool // by hop.Begin
	bytesIn  int64
	tries    hop.Tries
	hinted   bool // a provisional answer has come

	mu sync.Mutex // guards the rest
	// denied is what ended the request while it was under way.
	denied *policy.Decision
	begun  bool // something of the answer was sent
	over   bool
	far    *far
	// abandoned says that nobody waits for the answer any more, tunnelled that the
	// connection is a WebSocket's.
	abandoned, tunnelled bool
}

// end is called when the policy does not allow the request any more.
func (c *call) end(s *session, d policy.Decision) {
	if c.deny(d) { // without the lock, which the end of the connection takes
		s.hop.Identity.Cut(s.caller.State, "the policy does not allow a request under way any more")
	}
}

// deny ends c because of d, and says whether something of the answer was sent.
func (c *call) deny(d policy.Decision) (begun bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return false
	}
	c.denied = &d
	if c.far != nil {
		_ = c.far.Close() // who reads from it goes on with the denial
	}
	return c.begun
}

// use says that f serves the request, unless it has been denied meanwhile.
func (c *call) use(f *far) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.endedEarly(); err != nil {
		return err
	}
	c.far = f
	return nil
}

// answerBegins says that what follows reaches the caller, unless it has been denied.
// whole says that it is all: the caller may have it before anybody here goes on, and
// then nothing is under way any more.
func (c *call) answerBegins(whole bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.endedEarly(); err != nil {
		return err
	}
	c.begun, c.over = true, whole
	return nil
}

// endedEarly is why c has ended while it was under way, if it has. c.mu is held.
func (c *call) endedEarly() error {
	switch {
	case c.denied != nil:
		return errDenied
	case c.abandoned:
		return errAbandoned
	}
	return nil
}

// finish ends the life of c, and gives what ended it early.
func (c *call) finish() (denied *policy.Decision) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	return c.denied
}

var (
	errDenied    = errors.New("the policy does not allow the request any more")
	errAbandoned = errors.New("the caller has gone away")
	errCut       = errors.New("the sidecar has closed the caller's connection while the request was under way")
)

// unreachableError is for a request that no upstream has taken.
type unreachableError struct{ err error }

// Error implements error.
func (e *unreachableError) Error() string { return e.err.Error() }

var errTooMany = fmt.Errorf("the upstream sends more than %d provisional answers", maxProvisional)
