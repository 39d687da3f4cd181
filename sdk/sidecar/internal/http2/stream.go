// One call's stream on one connection, and flow control: what is taken from one side
// is given back as window when the other side has taken it.

package http2

import (
	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	// firstWindow is the window of a new stream, the protocol's default; it doubles up
	// to lastWindow while the other side keeps up.
	firstWindow = 64<<10 - 1
	lastWindow  = 256 << 10
	// connWindow bounds what the calls of one accepted connection hold of bodies that
	// upstreams have not taken. An upstream's connection is shared by many callers, of
	// whom none may hold up others: there the streams' own windows are the bound.
	connWindow = 1 << 20
	maxWindow  = 1<<31 - 1
)

// ending is how the direction of a stream that we send ends.
type ending byte

const (
	notYet       ending = iota
	withData            // by END_STREAM on the last DATA frame
	withTrailers        // by HEADERS
)

// stream is one call's part of one connection.
type stream struct {
	call *call
	conn *conn
	id   uint32

	// Guarded by conn.mu.
	sendWindow, recvWindow int
	window                 int // what recvWindow is opened up to
	owed                   int // taken and not given back yet
	queue                  queue
	ending                 ending
	trailers               []hpack.HeaderField // with withTrailers, once the queue is empty
	blocked                bool                // in conn.blocked
	sent                   int64               // of the body
	begun                  bool                // HEADERS were sent, but for informational ones
	sentEnd, recvEnd       bool
	stopped                bool // nothing that the other side sends is passed on any more
	resetAfter             bool // a peer that goes on after our end is told to stop
	gone                   bool // not in conn.streams any more
}

// credit is window that a sender gets back.
type credit struct {
	to *stream
	n  int
}

// send passes data on, and that it was the last if end. It says how much has been
// taken: the rest waits, and is given back as it is sent. data is not kept, and is
// dropped where the stream has gone.
func (s *stream) send(data []byte, end bool, b *batch) (taken int, gone bool) {
	c := s.conn
	c.mu.Lock()
	defer c.unlock(b)
	if s.gone || s.stopped || s.ending != notYet {
		return len(data), s.gone
	}
	all := len(data)
	for s.queue.n == 0 && len(data) > 0 {
		n := c.sendable(s, len(data))
		if n == 0 {
			break
		}
		c.putData(s, data[:n], end && n == len(data))
		data = data[n:]
	}
	if end {
		s.ending = withData
	}
	switch {
	case len(data) > 0:
		s.queue.push(data)
		c.block(s)
	case end && !s.sentEnd && s.queue.n == 0:
		c.putData(s, nil, true)
	}
	c.written(b)
	return all - len(data), false
}

// sendTrailers ends what is sent with fields.
func (s *stream) sendTrailers(fields []hpack.HeaderField, b *batch) (gone bool) {
	c := s.conn
	c.mu.Lock()
	defer c.unlock(b)
	if s.gone || s.stopped || s.ending != notYet {
		return s.gone
	}
	s.ending = withTrailers
	s.trailers = fields
	if s.queue.n == 0 {
		c.putTrailers(s)
	}
	c.written(b)
	return false
}

// sendable is how much of n bytes of the body may be put into c.out. c.mu is held.
func (c *conn) sendable(s *stream, n int) int {
	return max(0, min(n, maxFrame, s.sendWindow, c.sendWindow, maxOut-c.waiting()))
}

// putData appends a DATA frame. c.mu is held.
func (c *conn) putData(s *stream, data []byte, end bool) {
	var flags codec.Flags
	if end {
		flags = codec.FlagDataEndStream
	}
	c.putFrame(codec.FrameData, flags, s.id, data)
	s.sendWindow -= len(data)
	c.sendWindow -= len(data)
	s.sent += int64(len(data))
	if s.sendWindow > 0 && c.sendWindow > 0 { // else the peer has it dribble
		c.calm.useful()
	}
	if end {
		c.ended(s)
	}
}

func (c *conn) putTrailers(s *stream) {
	for _, f := range s.trailers {
		c.field(f)
	}
	s.trailers = nil
	c.endFields(s.id, true)
	c.ended(s)
}

// ended is after END_STREAM was put. c.mu is held.
func (c *conn) ended(s *stream) {
	s.sentEnd = true
	if c.pool == nil {
		c.calm.answered()
	}
	switch {
	case s.recvEnd:
		c.forget(s)
	case s.resetAfter:
		c.reset(s, codec.ErrCodeNo)
	}
}

// reset ends the stream at once. c.mu is held.
func (c *conn) reset(s *stream, code codec.ErrCode) {
	if s.gone {
		return
	}
	c.putReset(s.id, code)
	c.noteReset(s.id)
	c.forget(s)
}

// forget takes the stream out of the connection. c.mu is held.
func (c *conn) forget(s *stream) {
	if s.gone {
		return
	}
	s.gone = true
	delete(c.streams, s.id)
	c.load.Store(int32(len(c.streams)))
	c.dropQueue(s)
	c.over = append(c.over, s.call)
	if len(c.streams) == 0 {
		c.idleSince = c.eng.clock.Load()
		c.endIfDrained()
	}
}

// dropQueue throws away what waits to be sent. c.mu is held.
func (c *conn) dropQueue(s *stream) {
	s.trailers = nil
	if n := s.queue.drop(); n > 0 {
		c.repayOther(s, n)
	}
}

// repayOther gives n bytes that came from the other side of s back there. c.mu is held.
func (c *conn) repayOther(s *stream, n int) {
	if other := s.call.other(s); other != nil {
		c.credits = append(c.credits, credit{other, n})
	}
}

// block has s wait for the connection, for its window, or for both. c.mu is held.
func (c *conn) block(s *stream) {
	if !s.blocked && s.sendWindow > 0 {
		s.blocked = true
		c.blocked = append(c.blocked, s)
	}
}

// pump puts what waits into c.out, a frame of each stream in turn. c.mu is held.
func (c *conn) pump() {
	for len(c.blocked) > 0 && c.sendWindow > 0 && c.waiting() < maxOut {
		s := c.blocked[0]
		c.blocked = c.blocked[1:]
		s.blocked = false
		if s.gone || s.queue.n == 0 {
			continue
		}
		data := s.queue.first(c.sendable(s, s.queue.n))
		if n := len(data); n > 0 {
			c.putData(s, data, s.ending == withData && n == s.queue.n)
			if s.gone {
				// Its end was sent, and so all of the queue.
				continue
			}
			s.queue.advance(n)
			c.repayOther(s, n)
		}
		switch {
		case s.queue.n > 0:
			c.block(s)
		case s.ending == withTrailers && !s.sentEnd:
			c.putTrailers(s)
		}
	}
	if len(c.blocked) == 0 {
		c.blocked = nil
	}
}

// credit gives n bytes of window back to the peer that sent them.
func (s *stream) credit(n int, b *batch) {
	if n == 0 {
		return
	}
	c := s.conn
	c.mu.Lock()
	defer c.unlock(b)
	if c.pool == nil {
		c.repay(n)
	}
	if s.gone || s.recvEnd {
		c.written(b)
		return
	}
	if s.owed += n; s.owed >= s.window/2 {
		// A sender whose bytes are taken as they come is let further ahead.
		if more := s.window; more*2 <= lastWindow+1 && s.recvWindow+s.owed >= s.window {
			s.window += more
			s.owed += more
		}
		c.put32(codec.FrameWindowUpdate, s.id, uint32(s.owed))
		s.recvWindow += s.owed
		s.owed = 0
	}
	c.written(b)
}

// repay gives n bytes of the connection's window back. c.mu is held.
func (c *conn) repay(n int) {
	if c.owed += n; c.owed >= connWindow/4 {
		c.put32(codec.FrameWindowUpdate, 0, uint32(c.owed))
		c.recvWindow += c.owed
		c.owed = 0
	}
}
