// Lists of header fields as they come: what they may cost, and that they are complete.

package http2

import (
	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// maxContinuations is how many CONTINUATION frames one list may take.
const maxContinuations = 64

// fieldList is the list that is being read. It is used again for the next.
type fieldList struct {
	fields         []hpack.HeaderField
	size           int // as SETTINGS_MAX_HEADER_LIST_SIZE counts
	maxSize, count int
	over           bool // it is longer than allowed, and fields are missing
}

func (l *fieldList) limit(limits *hop.Limits) {
	l.maxSize, l.count = limits.HeadBytes, limits.HeaderFields
}

func (l *fieldList) add(f hpack.HeaderField) {
	l.size += int(f.Size())
	if l.size > l.maxSize || len(l.fields) >= l.count {
		l.over = true
	}
	if !l.over {
		l.fields = append(l.fields, f)
	}
}

func (l *fieldList) reset() {
	clear(l.fields)
	l.fields, l.size, l.over = l.fields[:0], 0, false
}

// headers reads a whole list, and acts on it.
func (c *conn) headers(f *codec.HeadersFrame) error {
	id, end := f.StreamID, f.StreamEnded()
	circular := f.HasPriority() && f.Priority.StreamDep == id
	if err := c.readList(f); err != nil {
		return err
	}
	defer c.list.reset()
	switch {
	case circular:
		return c.streamError(id, codec.ErrCodeProtocol)
	case c.pool != nil:
		return c.answer(id, end)
	}
	return c.request(id, end)
}

// readList reads the rest of the list that f begins into c.list.
func (c *conn) readList(f *codec.HeadersFrame) error {
	block, done, total := f.HeaderBlockFragment(), f.HeadersEnded(), 0
	for n := 0; ; n++ {
		if _, err := c.dec.Write(block); err != nil {
			return &connError{codec.ErrCodeCompression, err.Error()}
		}
		if done {
			break
		}
		c.listAt.CompareAndSwap(0, c.eng.clock.Load())
		fh, err := c.fr.ReadFrameHeader()
		if err != nil {
			return c.readError(err)
		}
		if total += int(fh.Length); total > 2*c.list.maxSize || n >= maxContinuations {
			return &connError{codec.ErrCodeEnhanceYourCalm, "the header fields are too long"}
		}
		next, err := c.fr.ReadFrameForHeader(fh)
		if err != nil {
			return c.readError(err)
		}
		continuation := next.(*codec.ContinuationFrame) // the framer lets nothing else come here
		block, done = continuation.HeaderBlockFragment(), continuation.HeadersEnded()
	}
	c.listAt.Store(0)
	if err := c.dec.Close(); err != nil {
		return &connError{codec.ErrCodeCompression, err.Error()}
	}
	return nil
}

// request is a list from a caller: a request's, or the trailers of one.
func (c *conn) request(id uint32, end bool) error {
	c.mu.Lock()
	if s := c.streams[id]; s != nil {
		c.mu.Unlock()
		return c.requestTrailers(s, end)
	}
	switch {
	case id%2 == 0:
		c.mu.Unlock()
		return protocolError("a client's streams have odd numbers")
	case id <= c.lastID:
		known := c.wasReset(id)
		c.mu.Unlock()
		if known { // it was on its way
			return c.idleFrame(1)
		}
		return &connError{codec.ErrCodeStreamClosed, "HEADERS for a stream that has ended"}
	}
	c.lastID = id
	if c.goodbye == saidLast {
		c.mu.Unlock()
		return c.idleFrame(1)
	}
	if len(c.streams) >= c.eng.hop.Limits.Streams {
		c.putReset(id, codec.ErrCodeRefusedStream)
		c.noteReset(id)
		c.written(&c.batch)
		c.unlock(&c.batch)
		if c.calm.cancelled() {
			return &connError{codec.ErrCodeEnhanceYourCalm, "more streams than SETTINGS_MAX_CONCURRENT_STREAMS"}
		}
		return nil
	}
	k := newCall(c, id, end)
	c.streams[id] = &k.down
	c.unlock(&c.batch)
	if ok := k.begin(&c.list, end, &c.batch); !ok && c.calm.cancelled() {
		return &connError{codec.ErrCodeEnhanceYourCalm, "too many requests that are malformed"}
	}
	return nil
}

// requestTrailers passes a request's trailers on, without what claims an identity.
func (c *conn) requestTrailers(s *stream, end bool) error {
	k := s.call
	switch {
	case s.recvEnd: // which the reader alone sets
		return c.streamError(s.id, codec.ErrCodeStreamClosed)
	case !end || c.list.over || !k.counts(s, 0, true) || checkTrailers(c.list.fields) != nil:
		return c.streamError(s.id, codec.ErrCodeProtocol)
	}
	fields := make([]hpack.HeaderField, 0, len(c.list.fields))
	for _, f := range c.list.fields {
		if !k.isInbound() || !c.eng.hop.Strip(f.Name) {
			fields = append(fields, f)
		}
	}
	k.sendTrailers(fields, &c.batch)
	c.peerEnded(s)
	return nil
}

// answer is a list from an upstream: informational, the answer's, or its trailers.
func (c *conn) answer(id uint32, end bool) error {
	c.mu.Lock()
	if c.isIdle(id) {
		c.mu.Unlock()
		return protocolError("HEADERS for a stream that has not begun")
	}
	s := c.streams[id]
	c.mu.Unlock()
	if s == nil {
		return c.idleFrame(1)
	}
	k := s.call
	switch {
	case s.recvEnd:
		return c.streamError(id, codec.ErrCodeStreamClosed)
	case c.list.over:
		return c.streamError(id, codec.ErrCodeProtocol)
	case k.answering.Load():
		if !end || checkTrailers(c.list.fields) != nil {
			return c.streamError(id, codec.ErrCodeProtocol)
		}
		k.passTrailers(c.list.fields, &c.batch)
	default:
		status, fields, err := readAnswer(c.list.fields)
		if err != nil || end && status < 200 {
			return c.streamError(id, codec.ErrCodeProtocol)
		}
		k.answering.Store(status >= 200)
		k.passAnswer(status, fields, end, &c.batch)
	}
	if end {
		c.peerEnded(s)
	}
	return nil
}
