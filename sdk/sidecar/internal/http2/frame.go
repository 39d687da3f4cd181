// What each frame does.

package http2

import (
	"errors"
	"io"
	"math"
	"sync"

	codec "golang.org/x/net/http2"
)

// frame reads one frame and acts on it.
func (c *conn) frame() error {
	fh, err := c.fr.ReadFrameHeader()
	if err != nil {
		return c.readError(err)
	}
	now := c.eng.clock.Load()
	c.heardAt.Store(now)
	c.frameAt.Store(now)
	if fh.Type == codec.FrameData {
		err = c.data(fh)
	} else {
		err = c.other(fh)
	}
	c.frameAt.Store(0)
	return err
}

// readError says what an error of the framer means for the connection.
func (c *conn) readError(err error) error {
	var conn codec.ConnectionError
	switch {
	case errors.As(err, &conn):
		why := "the frame is malformed"
		if detail := c.fr.ErrorDetail(); detail != nil {
			why = detail.Error()
		}
		return &connError{codec.ErrCode(conn), why}
	case errors.Is(err, codec.ErrFrameTooLarge):
		return &connError{codec.ErrCodeFrameSize, "the frame is longer than SETTINGS_MAX_FRAME_SIZE"}
	}
	return err
}

// other reads the rest of a frame that is not DATA.
func (c *conn) other(fh codec.FrameHeader) error {
	f, err := c.fr.ReadFrameForHeader(fh)
	if err != nil {
		if stream, ok := errors.AsType[codec.StreamError](err); ok {
			if fh.Type == codec.FrameHeaders { // whose fields would be missing from now on
				return &connError{stream.Code, "HEADERS are malformed"}
			}
			return c.streamError(stream.StreamID, stream.Code)
		}
		return c.readError(err)
	}
	switch f := f.(type) {
	case *codec.HeadersFrame:
		return c.headers(f)
	case *codec.SettingsFrame:
		return c.settings(f)
	case *codec.WindowUpdateFrame:
		return c.windowUpdate(f.StreamID, int(f.Increment))
	case *codec.RSTStreamFrame:
		return c.rstStream(f)
	case *codec.PingFrame:
		return c.ping(f)
	case *codec.GoAwayFrame:
		return c.goAway(f)
	case *codec.PriorityFrame:
		if f.StreamDep == f.StreamID {
			return c.streamError(f.StreamID, codec.ErrCodeProtocol)
		}
	case *codec.PushPromiseFrame:
		return protocolError("PUSH_PROMISE, which was never allowed")
	}
	return c.idleFrame(1) // and one that we do not know
}

func (c *conn) idleFrame(cost int32) error {
	if c.calm.idle(cost) {
		return &connError{codec.ErrCodeEnhanceYourCalm, "too many frames that carry nothing"}
	}
	return nil
}

// streamError resets the stream of that number, and its call with it.
func (c *conn) streamError(id uint32, code codec.ErrCode) error {
	c.mu.Lock()
	if c.isIdle(id) {
		c.mu.Unlock()
		return &connError{code, "the stream has not begun"}
	}
	s := c.streams[id]
	if s == nil {
		c.putReset(id, code)
		c.noteReset(id)
	} else {
		c.reset(s, code)
	}
	c.written(&c.batch)
	c.unlock(&c.batch)
	if s != nil {
		s.call.otherEnded(s, &c.batch)
	}
	return c.idleFrame(1)
}

// isIdle says whether nobody has opened the stream yet. c.mu is held.
func (c *conn) isIdle(id uint32) bool { return id%2 == 0 || id > c.lastID }

var frames = sync.Pool{New: func() any { return new([maxFrame]byte) }}

// data passes a piece of a body on.
func (c *conn) data(fh codec.FrameHeader) error {
	if fh.StreamID == 0 {
		return protocolError("DATA belongs to no stream")
	}
	n := int(fh.Length)
	c.mu.Lock()
	s, err := c.takeWindow(fh.StreamID, n)
	c.unlock(&c.batch)
	if err != nil {
		return err
	}
	pad := 0
	if fh.Flags.Has(codec.FlagDataPadded) {
		var length [1]byte
		if n == 0 {
			return &connError{codec.ErrCodeFrameSize, "DATA has no room for the length of its padding"}
		}
		if _, err := io.ReadFull(&c.in, length[:]); err != nil {
			return err
		}
		n--
		if pad = int(length[0]); pad > n {
			return protocolError("DATA is shorter than its padding")
		}
	}
	body := c.in.peek(n)
	if body != nil {
		c.in.discard(n)
	} else {
		frame := frames.Get().(*[maxFrame]byte)
		defer frames.Put(frame)
		body = frame[:n]
		if _, err := io.ReadFull(&c.in, body); err != nil {
			return err
		}
	}
	return c.pass(s, fh, body[:n-pad])
}

// takeWindow accounts for n bytes that have come, and gives the stream that they are
// for; nil for one that has gone. c.mu is held.
func (c *conn) takeWindow(id uint32, n int) (*stream, error) {
	if c.isIdle(id) {
		return nil, protocolError("DATA for a stream that has not begun")
	}
	if c.recvWindow -= n; c.recvWindow < 0 {
		return nil, &connError{codec.ErrCodeFlowControl, "more DATA than the connection's window"}
	}
	s := c.streams[id]
	if s == nil {
		return nil, nil
	}
	s.recvWindow -= n
	return s, nil
}

// pass sends what came in a DATA frame to the other side.
func (c *conn) pass(s *stream, fh codec.FrameHeader, body []byte) error {
	all, end := int(fh.Length), fh.Flags.Has(codec.FlagDataEndStream)
	c.mu.Lock()
	gone := s == nil || s.gone
	late := !gone && s.recvEnd
	tooMuch := !gone && s.recvWindow < 0
	if c.pool != nil || gone || late || tooMuch {
		c.repay(all) // else when the other side has taken it
	}
	if s == nil && !c.wasReset(fh.StreamID) {
		c.putReset(fh.StreamID, codec.ErrCodeStreamClosed)
		c.noteReset(fh.StreamID)
	}
	c.written(&c.batch)
	c.unlock(&c.batch)
	switch {
	case gone:
		return c.idleFrame(1)
	case late:
		return c.streamError(fh.StreamID, codec.ErrCodeStreamClosed)
	case tooMuch:
		return c.streamError(fh.StreamID, codec.ErrCodeFlowControl)
	}
	switch {
	case len(body) > 0:
		c.calm.useful()
	case !end:
		if err := c.idleFrame(1); err != nil {
			return err
		}
	}
	k := s.call
	if !k.counts(s, len(body), end) {
		s.credit(all, &c.batch)
		return c.streamError(fh.StreamID, codec.ErrCodeProtocol) // it is not as long as it said
	}
	taken := k.send(s, body, end, &c.batch)
	s.credit(taken+all-len(body), &c.batch)
	if end {
		c.peerEnded(s)
	}
	return nil
}

// peerEnded is after the peer's END_STREAM.
func (c *conn) peerEnded(s *stream) {
	c.mu.Lock()
	defer c.unlock(&c.batch)
	s.recvEnd = true
	if s.sentEnd {
		c.forget(s)
	}
}

func (c *conn) settings(f *codec.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	c.mu.Lock()
	defer c.unlock(&c.batch)
	if err := f.ForeachSetting(c.setting); err != nil {
		return err
	}
	c.putFrame(codec.FrameSettings, codec.FlagSettingsAck, 0, nil)
	c.pump()
	c.written(&c.batch)
	return c.idleFrame(10)
}

// setting takes in one setting. c.mu is held.
func (c *conn) setting(s codec.Setting) error {
	if err := s.Valid(); err != nil {
		if conn, ok := errors.AsType[codec.ConnectionError](err); ok {
			return &connError{codec.ErrCode(conn), "the setting has no such value"}
		}
		return err
	}
	switch s.ID {
	case codec.SettingHeaderTableSize:
		c.enc.SetMaxDynamicTableSizeLimit(min(s.Val, headerTable))
	case codec.SettingMaxConcurrentStreams:
		if c.goodbye == staying {
			c.room.Store(int32(min(s.Val, math.MaxInt32)))
		}
	case codec.SettingInitialWindowSize:
		more := int(s.Val) - c.peerWindow
		c.peerWindow = int(s.Val)
		for _, stream := range c.streams {
			if stream.sendWindow += more; stream.sendWindow > maxWindow {
				return &connError{codec.ErrCodeFlowControl, "a window is larger than 2^31-1"}
			}
			if stream.queue.n > 0 {
				c.block(stream)
			}
		}
	case codec.SettingEnablePush:
		if c.pool != nil && s.Val != 0 {
			return protocolError("a server does not set ENABLE_PUSH")
		}
	}
	return nil
}

func (c *conn) windowUpdate(id uint32, n int) error {
	c.mu.Lock()
	if id == 0 {
		c.sendWindow += n
		flood := c.sendWindow > maxWindow
		c.pump()
		c.written(&c.batch)
		c.unlock(&c.batch)
		if flood {
			return &connError{codec.ErrCodeFlowControl, "the connection's window is larger than 2^31-1"}
		}
		return c.opened(n)
	}
	if c.isIdle(id) {
		c.mu.Unlock()
		return protocolError("WINDOW_UPDATE for a stream that has not begun")
	}
	s := c.streams[id]
	if s == nil {
		c.mu.Unlock()
		return c.idleFrame(1)
	}
	s.sendWindow += n
	tooLarge := s.sendWindow > maxWindow
	if s.queue.n > 0 {
		c.block(s)
		c.pump()
	}
	c.written(&c.batch)
	c.unlock(&c.batch)
	if tooLarge {
		return c.streamError(id, codec.ErrCodeFlowControl)
	}
	return c.opened(n)
}

// opened counts a window that was opened by n bytes. Who reads much at once says so
// often; nobody has to say it byte by byte, and have it sent so.
func (c *conn) opened(n int) error {
	if n >= 1<<10 {
		return nil
	}
	return c.idleFrame(1)
}

func (c *conn) rstStream(f *codec.RSTStreamFrame) error {
	c.mu.Lock()
	if c.isIdle(f.StreamID) {
		c.mu.Unlock()
		return protocolError("RST_STREAM for a stream that has not begun")
	}
	s := c.streams[f.StreamID]
	if s != nil && c.pool == nil {
		c.forget(s)
	}
	c.unlock(&c.batch)
	if s == nil {
		return c.idleFrame(1)
	}
	if c.pool != nil {
		s.call.upstreamReset(s, f.ErrCode, &c.batch)
		return nil
	}
	s.call.otherEnded(s, &c.batch)
	if c.calm.cancelled() {
		return &connError{codec.ErrCodeEnhanceYourCalm, "too many requests are cancelled"}
	}
	return nil
}

func (c *conn) ping(f *codec.PingFrame) error {
	if f.IsAck() {
		return nil
	}
	c.mu.Lock()
	tooMuch := c.waiting() > maxControl
	if !tooMuch {
		c.putFrame(codec.FramePing, codec.FlagPingAck, 0, f.Data[:])
		c.written(&c.batch)
	}
	c.unlock(&c.batch)
	if tooMuch {
		return &connError{codec.ErrCodeEnhanceYourCalm, "answers are not read"}
	}
	return c.idleFrame(1)
}

// goAway is the peer's wish that no new streams come.
func (c *conn) goAway(f *codec.GoAwayFrame) error {
	if c.pool == nil {
		return c.idleFrame(10) // a client says that it takes no pushes
	}
	c.pool.leave(c)
	c.mu.Lock()
	c.goodbye = announced
	c.room.Store(0)
	var refused []*stream
	for id, s := range c.streams {
		if id > f.LastStreamID {
			refused = append(refused, s)
		}
	}
	c.endIfDrained()
	c.unlock(&c.batch)
	for _, s := range refused {
		s.call.upstreamReset(s, codec.ErrCodeRefusedStream, &c.batch)
	}
	return c.idleFrame(10)
}
