// Answers of the sidecar's own: denials, and what became of a request that reached no
// upstream or got no whole answer.

package http1

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// outBuffer is what is written at once: a head, and what of the body is there.
type outBuffer struct{ b []byte }

var outs = sync.Pool{New: func() any { return &outBuffer{make([]byte, 0, 8<<10)} }}

// maxOut is the largest buffer that is kept.
const maxOut = 64 << 10

func takeOut() *outBuffer { return outs.Get().(*outBuffer) }

func giveOut(o *outBuffer) {
	if cap(o.b) <= maxOut {
		outs.Put(o)
	}
}

// refuse answers a request that is too malformed to be decided. The connection ends:
// nobody can tell where a next request would begin.
func (s *session) refuse(c *call, why error) bool {
	if s.hop.Direction == hop.Inbound {
		d := s.hop.Identity.Refuse(s.entry.Trace.Context(s.ctx), s.caller.State, &c.in, why)
		s.noteDecision(d)
		s.entry.Err = why.Error()
		_ = s.answerDenial(c, d, true) // the connection ends anyway
		s.over(c)
		s.linger()
		return false
	}
	return s.fail(c, hop.Malformed, why)
}

// deny answers a request that d denies. The next one on the connection may be another
// matter, if it is clear where it begins.
func (s *session) deny(c *call, d policy.Decision) bool {
	closing := s.passOver(c) || d.Reason == policy.BadRequest
	return s.answered(c, closing, s.answerDenial(c, d, closing))
}

// turnAway answers a request that there is no room for. The connection may be of use
// again when there is.
func (s *session) turnAway(c *call, f *hop.Failure, why error) bool {
	closing := s.passOver(c)
	return s.answered(c, closing, s.answerFailure(c, f, why, closing))
}

// passOver drops the body of a request that goes nowhere, and says whether the
// connection has to end.
func (s *session) passOver(c *call) (closing bool) {
	if !c.whole {
		return true
	}
	out := takeOut()
	defer giveOut(out)
	_, _, err := c.body.takeBuffered(out.b[:0])
	return err != nil || s.req.close || s.isDraining() || s.caller.State != nil && s.hop.Identity.Draining(s.caller.State)
}

// answered ends a request that the sidecar has answered itself, with err. It says whether
// another one may follow.
func (s *session) answered(c *call, closing bool, err error) bool {
	s.over(c)
	if closing && err == nil {
		s.linger()
	}
	return !closing && err == nil
}

// answerDenial writes the denial as httpauth does.
func (s *session) answerDenial(c *call, d policy.Decision, closing bool) error {
	a := denial.HTTP(d)
	s.entry.Status = a.Status
	return s.writeAnswer(c, a, closing)
}

// fail answers a request that went wrong for another reason than a decision, and ends
// the connection.
func (s *session) fail(c *call, f *hop.Failure, why error) bool {
	_ = s.answerFailure(c, f, why, true) // the connection ends anyway
	s.over(c)
	s.linger()
	return false
}

func (s *session) answerFailure(c *call, f *hop.Failure, why error, closing bool) error {
	a := s.hop.Problem(f, why)
	s.entry.Status, s.entry.Failed, s.entry.Failure, s.entry.Err = a.Status, true, f, why.Error()
	return s.writeAnswer(c, a, closing)
}

// writeAnswer writes an answer of the sidecar's own.
func (s *session) writeAnswer(c *call, a denial.Answer, closing bool) error {
	out := takeOut()
	defer giveOut(out)
	b := append(out.b[:0], "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(a.Status), 10)
	b = append(b, ' ')
	b = append(b, http.StatusText(a.Status)...)
	b = append(b, "\r\nDate: "...)
	b = time.Now().UTC().AppendFormat(b, http.TimeFormat)
	b = append(b, '\r', '\n')
	b = appendFields(b, a.Fields)
	bodiless := a.Status == http.StatusNoContent || a.Status == http.StatusNotModified
	if !bodiless {
		b = append(b, "Content-Length: "...)
		b = strconv.AppendInt(b, int64(len(a.Body)), 10)
		b = append(b, '\r', '\n')
	}
	if closing {
		b = append(b, "Connection: close\r\n"...)
	}
	b = append(b, '\r', '\n')
	if !bodiless && c.in.Method != http.MethodHead {
		b = append(b, a.Body...)
	}
	out.b = b
	return s.writeNear(b)
}

// broken ends a request whose exchange failed with err. f and up are nil where it did
// not come so far.
func (s *session) broken(c *call, f *far, up *upload, err error) bool {
	if f != nil {
		_ = f.Close() // which also ends an upload that is writing
	}
	uploadErr := s.wait(up)
	denied := c.finish()
	abandoned := c.isAbandoned()
	if f != nil {
		f.discard()
		f.upstream.Done(denied == nil && !abandoned && !c.begun && uploadErr == nil)
	}
	switch {
	case denied == nil && abandoned:
		s.entry.Err = s.whyAbandoned().Error()
		s.over(c)
		hangUp(s.near)
		return false
	case denied != nil && !c.begun:
		s.noteDecision(*denied)
		_ = s.answerDenial(c, *denied, true) // the connection ends anyway
		s.over(c)
		s.linger()
		return false
	case c.begun:
		s.entry.Failed, s.entry.Failure, s.entry.Err = true, failureOf(err), err.Error()
		s.over(c)
		hangUp(s.near) // what was sent must not pass for a whole answer
		return false
	case errors.Is(uploadErr, errChunk), errors.Is(uploadErr, errLong):
		return s.fail(c, hop.Malformed, uploadErr)
	case uploadErr != nil && !isWriteError(uploadErr) && !errors.Is(uploadErr, errUnwanted):
		s.entry.Failed, s.entry.Err = true, "the caller's request broke off: "+uploadErr.Error()
		s.over(c)
		return false
	}
	return s.fail(c, failureOf(err), err)
}

// failureOf is what an error of an exchange with an upstream is to the caller.
func failureOf(err error) *hop.Failure {
	if e, ok := errors.AsType[*unreachableError](err); ok {
		return hop.Unconnected(e.err)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return hop.Late
	}
	return hop.Broken
}

func isWriteError(err error) bool {
	_, ok := errors.AsType[*writeError](err)
	return ok
}

// hangUp ends a connection without the end of file that TLS marks a whole answer with.
func hangUp(conn net.Conn) {
	if secured, ok := conn.(*tls.Conn); ok {
		conn = secured.NetConn()
	}
	_ = conn.Close() // it may be closed already
}

// How much and how long is read of a connection that ends, so that its last answer is
// not lost to a reset for what the caller had sent on.
const (
	lingerTime  = 500 * time.Millisecond
	lingerBytes = 256 << 10
)

// linger ends the connection so that the caller can read the answer first.
func (s *session) linger() {
	half, ok := s.near.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	_ = s.near.SetReadDeadline(time.Now().Add(lingerTime)) // it may be closed already
	s.in.release()
	for n := 0; n < lingerBytes; n += len(s.in.bytes()) {
		s.in.skip(len(s.in.bytes()))
		if s.in.fill(s.near, smallBytes) != nil {
			return
		}
	}
}
