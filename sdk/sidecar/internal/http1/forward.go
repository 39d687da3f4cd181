// A request that may go on: to an upstream, and the answer back.

package http1

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
	"merlon.dev/sdk/sidecar/internal/relay"
)

// maxProvisional bounds the 1xx answers to one request.
const maxProvisional = 8

// forward sends the request on, of which the first end bytes that are there are the
// head, and the answer back. It says whether another request may follow.
func (s *session) forward(c *call, end int) bool {
	s.current.Store(c)
	if s.left.Load() { // before current was there
		c.abandon()
	}
	out := takeOut()
	defer giveOut(out)
	out.b = s.appendHead(out.b[:0], c.decision.Response)
	s.in.skip(end)
	first := len(out.b)
	var err error
	if out.b, c.whole, err = c.body.takeBuffered(out.b); err != nil {
		return s.fail(c, hop.Malformed, err) // not reached: check has passed it
	}
	c.bytesIn = int64(len(out.b) - first)
	f, up, err := s.exchange(c, out.b)
	s.hop.Settle(&c.tries)
	if err != nil {
		return s.broken(c, f, up, err)
	}
	return s.answer(c, f, up)
}

// appendHead appends the head that the upstream gets: the caller's own lines but for
// those that stay behind, who the caller is, and what the policy adds.
func (s *session) appendHead(out []byte, send *policy.Response) []byte {
	m := &s.req
	_, rest := cutLine(m.raw)
	out = append(out, m.raw[:rest]...)
	for i := range m.fields {
		f := &m.fields[i]
		if f.drop || send != nil && f.kind == other && send.Replaces(s.names[i]) {
			continue
		}
		out = append(out, m.line(f)...)
	}
	out = append(out, s.identity...)
	out = appendFields(out, s.entry.Trace.Fields())
	if m.webSocket {
		out = append(out, "Connection: Upgrade\r\n"...)
	}
	if send != nil {
		out = appendFields(out, send.Headers)
	}
	return append(out, '\r', '\n')
}

func appendFields(out []byte, fields []policy.HeaderField) []byte {
	for _, f := range fields {
		out = append(out, f.Name...)
		out = append(out, ": "...)
		out = append(out, f.Value...)
		out = append(out, '\r', '\n')
	}
	return out
}

// upload is the rest of a request's body on its way, beside the answer.
type upload struct {
	consumed atomic.Bool // all of it has been read off the caller's connection
	unwanted atomic.Bool // nobody wants the rest
	done     chan struct{}
	err      error // when done is closed
}

// exchange sends the head and what of the body is there to an upstream, and waits for
// the answer's head. On error f may be a connection that has to be closed.
func (s *session) exchange(c *call, out []byte) (f *far, up *upload, err error) {
	for {
		if f, err = s.connect(c); err != nil {
			return nil, nil, err
		}
		err = f.clock.tick(f, false, s.within(s.hop.Limits.StallTimeout))
		if err == nil {
			_, err = f.Write(out)
		}
		if err == nil && !c.whole && up == nil {
			up = s.upload(c, f)
		}
		if err == nil {
			err = s.readAnswer(c, f)
		}
		if err == nil || up != nil || !s.mayRepeat(c, f, err) || !s.hop.Again(&c.tries) {
			return f, up, err
		}
		f.discard()
		f.upstream.Done(!f.reused)
	}
}

// mayRepeat says whether c, of which all is at hand, may be sent again though the
// upstream broke off because of err and the first may have arrived: where it closed a
// connection that was idle just as it was used, what RFC 9110 section 9.2.2 calls
// idempotent, else what is configured.
func (s *session) mayRepeat(c *call, f *far, err error) bool {
	if c.hinted || len(f.in.bytes()) > 0 || errors.Is(err, os.ErrDeadlineExceeded) || c.finishedEarly() != nil {
		return false
	}
	return f.reused && hop.IsIdempotent(c.in.Method) || s.hop.Retry.Repeats(c.in.Method)
}

// connect gives a connection to an upstream: of each one that is kept, or a new one.
func (s *session) connect(c *call) (*far, error) {
	var tried []*hop.Upstream
	var last error
	for {
		u, err := s.hop.Upstreams.Pick(tried...)
		if err != nil {
			if last == nil || errors.Is(err, hop.ErrUpstreamFull) {
				last = err
			}
			return nil, &unreachableError{last}
		}
		f := s.pools[u].get()
		if f == nil {
			f, err = s.pools[u].dial(s.ctx, s.within(s.hop.Limits.HandshakeTimeout))
		}
		if err != nil {
			full := errors.Is(err, hop.ErrUpstreamFull)
			u.Done(!full && !s.late())
			last = err
			tried = append(tried, u)
			switch {
			case s.late():
				return nil, errLate
			case len(tried) == len(s.hop.Upstreams.All()), !full && !s.hop.Again(&c.tries):
				return nil, &unreachableError{last}
			}
			continue
		}
		s.entry.Upstream = u.Address
		if err := c.use(f); err != nil {
			f.discard()
			u.Done(false)
			return nil, err
		}
		return f, nil
	}
}

// upload sends the rest of the body while the answer may already come: a large body is
// not kept, and an upstream need not read all of it before it answers.
func (s *session) upload(c *call, f *far) *upload {
	up := &upload{done: make(chan struct{})}
	go func() {
		defer close(up.done)
		tick := func(read bool) error {
			if !read {
				return f.clock.tick(f, false, s.within(s.hop.Limits.StallTimeout))
			}
			err := s.clock.tick(s.near, true, s.within(s.hop.Limits.StallTimeout))
			if up.unwanted.Load() { // looked at after the deadline, which wait moves after it
				return errUnwanted
			}
			return err
		}
		var n int64
		n, up.err = c.body.send(f, tick, func() { up.consumed.Store(true) })
		c.bytesIn += n
		if errors.Is(up.err, os.ErrDeadlineExceeded) && up.unwanted.Load() {
			up.err = errUnwanted
		}
		if _, refused := errors.AsType[*writeError](up.err); up.err != nil && !refused {
			_ = f.Close() // half a request gets no answer
		}
	}()
	return up
}

// errUnwanted ends an upload that is not needed any more.
var errUnwanted = errors.New("the answer came before the whole request")

// wait waits for the end of the upload. Where the caller still owes some of the body,
// nobody wants it any more.
func (s *session) wait(up *upload) error {
	if up == nil {
		return nil
	}
	if !up.consumed.Load() {
		up.unwanted.Store(true)
		_ = s.near.SetReadDeadline(time.Unix(1, 0)) // it may be closed already
	}
	<-up.done
	return up.err
}

// readAnswer reads the head of the answer, and sends on what comes before it.
func (s *session) readAnswer(c *call, f *far) error {
	for range maxProvisional {
		if err := s.readAnswerHead(f); err != nil {
			return err
		}
		switch {
		case s.res.status == 101:
			if !s.req.webSocket || !s.res.webSocket || !s.res.upgrade {
				return errors.New("the upstream changes the protocol and was not asked to")
			}
			return nil
		case s.res.status >= 200:
			return nil
		}
		if err := s.sendProvisional(c, f); err != nil {
			return err
		}
	}
	return errTooMany
}

// readAnswerHead reads one head into s.res. It stays in f's buffer.
func (s *session) readAnswerHead(f *far) error {
	for from := 0; ; {
		end, next, err := endOfHead(f.in.bytes(), from)
		from = next
		switch {
		case err != nil:
			return err
		case end > s.hop.Limits.HeadBytes, end == 0 && len(f.in.bytes()) >= s.hop.Limits.HeadBytes:
			return errLong
		case end > 0:
			return s.res.parseAnswer(f.in.bytes()[:end:end], s.hop.Limits.HeaderFields)
		}
		if err := f.clock.tick(f, true, s.within(s.hop.Limits.ResponseTimeout)); err != nil {
			return err
		}
		if err := f.in.fill(f, s.hop.Limits.HeadBytes); err != nil {
			return err
		}
	}
}

// sendProvisional sends a 1xx answer on, such as 100 Continue.
func (s *session) sendProvisional(c *call, f *far) error {
	c.hinted = true
	out := takeOut()
	defer giveOut(out)
	out.b = s.appendAnswer(out.b[:0], nil, false)
	f.in.skip(len(s.res.raw))
	return s.writeNear(out.b)
}

// appendAnswer appends the head of the answer as the caller gets it.
func (s *session) appendAnswer(out []byte, add []policy.HeaderField, closing bool) []byte {
	m := &s.res
	_, rest := cutLine(m.raw)
	out = append(out, "HTTP/1.1"...)
	out = append(out, m.raw[len("HTTP/1.1"):rest]...)
	for i := range m.fields {
		if f := &m.fields[i]; !s.staysBehind(f) {
			out = append(out, m.line(f)...)
		}
	}
	for _, f := range add {
		if !m.has(f.Name) {
			out = appendFields(out, []policy.HeaderField{f})
		}
	}
	switch {
	case m.status == 101:
		out = append(out, "Connection: Upgrade\r\n"...)
	case closing:
		out = append(out, "Connection: close\r\n"...)
	}
	return append(out, '\r', '\n')
}

// staysBehind says whether a field of the answer is for the upstream's connection
// alone.
func (s *session) staysBehind(f *field) bool {
	switch f.kind {
	case connection, hopByHop:
		return true
	case upgrade:
		return s.res.status != 101
	case other:
		return len(s.res.named) > 0 && s.res.names(lowerName(s.res.name(f)))
	}
	return false
}

// has says whether there is a field of the name, which is in lower case.
func (m *message) has(lower string) bool {
	for i := range m.fields {
		if equalFold(m.name(&m.fields[i]), lower) {
			return true
		}
	}
	return false
}

// answer sends the answer on, of which the head is in s.res.
func (s *session) answer(c *call, f *far, up *upload) bool {
	if s.res.status == 101 {
		return s.tunnel(c, f)
	}
	back := body{conn: f, in: &f.in, maxBytes: s.hop.Limits.HeadBytes, maxFields: s.hop.Limits.HeaderFields}
	back.form, back.left = s.res.answerBody(c.in.Method == "HEAD")
	owed := up != nil && !up.consumed.Load()
	closing := s.req.close || owed || back.form == untilClose || s.isDraining() ||
		s.caller.State != nil && s.hop.Identity.Draining(s.caller.State)
	farClose := s.res.close || back.form == untilClose
	if err := s.sendAnswer(c, f, &back, closing); err != nil {
		return s.broken(c, f, up, err)
	}
	uploadErr := s.wait(up)
	if denied := c.finish(); denied != nil || farClose || uploadErr != nil || owed {
		f.discard()
	} else {
		f.keep()
	}
	f.upstream.Done(false)
	s.over(c)
	if closing && owed {
		s.linger()
	}
	return !closing && uploadErr == nil
}

// sendAnswer sends head and body of the answer.
func (s *session) sendAnswer(c *call, f *far, back *body, closing bool) error {
	var add []policy.HeaderField
	if c.decision.Response != nil {
		add = c.decision.Response.ResponseHeaders
	}
	out := takeOut()
	defer giveOut(out)
	out.b = s.appendAnswer(out.b[:0], add, closing)
	s.entry.Status = s.res.status
	f.in.skip(len(s.res.raw))
	head := len(out.b)
	var ended bool
	var err error
	if out.b, ended, err = back.takeBuffered(out.b); err != nil {
		return err
	}
	if err := c.answerBegins(ended); err != nil {
		return err
	}
	s.entry.BytesOut = int64(len(out.b) - head)
	if err := s.writeNear(out.b); err != nil || ended {
		return err
	}
	tick := func(read bool) error {
		if read {
			return f.clock.tick(f, true, s.within(s.hop.Limits.StallTimeout))
		}
		return s.clock.tick(s.near, false, s.within(s.hop.Limits.StallTimeout))
	}
	n, err := back.send(s.near, tick, func() { c.finish() })
	s.entry.BytesOut += n
	return err
}

func (s *session) writeNear(p []byte) error {
	if err := s.clock.tick(s.near, false, s.hop.Limits.StallTimeout); err != nil {
		return err
	}
	_, err := s.near.Write(p)
	return err
}

// tunnel carries a WebSocket for as long as both ends like and the policy allows.
func (s *session) tunnel(c *call, f *far) bool {
	c.mu.Lock()
	c.tunnelled = true
	c.mu.Unlock()
	defer f.upstream.Done(false)
	defer f.discard()
	defer s.over(c)
	out := takeOut()
	out.b = s.appendAnswer(out.b[:0], nil, false)
	s.entry.Status = s.res.status
	f.in.skip(len(s.res.raw))
	late := f.in.bytes()
	out.b = append(out.b, late...)
	err := c.answerBegins(false)
	if err == nil {
		err = s.writeNear(out.b)
	}
	giveOut(out)
	early := s.in.bytes()
	if err == nil && len(early) > 0 {
		_, err = f.Write(early)
	}
	if err != nil {
		s.entry.Failed, s.entry.Err = true, err.Error()
		return false
	}
	for _, conn := range []net.Conn{s.near, f.Conn} {
		_ = conn.SetDeadline(time.Time{}) // Splice has its own
	}
	relay.Splice(s.near, f.Conn, s.hop.Limits.QuietTimeout, &s.entry)
	s.entry.BytesOut += int64(len(late))
	c.bytesIn = s.entry.BytesIn + int64(len(early))
	if c.finish() != nil {
		s.entry.Err = errDenied.Error()
	}
	return false
}

// finishedEarly is why the request has ended while it was under way, if it has.
func (c *call) finishedEarly() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.endedEarly()
}
