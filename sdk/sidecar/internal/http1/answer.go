// Answers of the sidecar's own: denials, and what became of a request that reached no
// upstream or got no whole answer.

package http1

import (
	"crypto/tls"
	"encoding/json"
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
		d := s.hop.Identity.Refuse(s.ctx, s.caller.State, &c.in, why)
		s.noteDecision(d)
		s.entry.Err = why.Error()
		_ = s.answerDenial(c, d, true) // the connection ends anyway
		s.over(c)
		s.linger()
		return false
	}
	return s.fail(c, http.StatusBadRequest, why)
}

// deny answers a request that d denies. The next one on the connection may be another
// matter, if it is clear where it begins.
func (s *session) deny(c *call, d policy.Decision) bool {
	closing := d.Reason == policy.BadRequest || s.req.close || !c.whole || s.isDraining() || s.hop.Identity.Draining(s.caller.State)
	if c.whole {
		out := takeOut()
		_, _, err := c.body.takeBuffered(out.b[:0])
		giveOut(out)
		closing = closing || err != nil
	}
	err := s.answerDenial(c, d, closing)
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
	return s.writeAnswer(c, a.Status, a.Fields, a.Body, closing)
}

// problem is the body of an answer that says what went wrong on the way.
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
}

const problemType = "https://merlon.dev/problems/sidecar"

// fail answers a request that went wrong for another reason than a decision, and ends
// the connection. Callers from elsewhere are not told about the inside of this
// machine; the access log is.
func (s *session) fail(c *call, status int, why error) bool {
	p := problem{Type: problemType, Title: titles[status], Status: status}
	if s.hop.Direction == hop.Outbound {
		p.Detail = why.Error()
	}
	s.entry.Status, s.entry.Failed, s.entry.Err = status, true, why.Error()
	text, err := json.Marshal(p)
	if err == nil {
		fields := []policy.HeaderField{{Name: "cache-control", Value: "no-store"}, {Name: "content-type", Value: "application/problem+json"}}
		_ = s.writeAnswer(c, status, fields, string(text), true) // the connection ends anyway
	}
	s.over(c)
	s.linger()
	return false
}

var titles = map[int]string{
	http.StatusBadRequest:         "The request is malformed",
	http.StatusBadGateway:         "The upstream did not answer as it should",
	http.StatusServiceUnavailable: "No upstream can be reached",
	http.StatusGatewayTimeout:     "The upstream did not answer in time",
}

// writeAnswer writes an answer of the sidecar's own.
func (s *session) writeAnswer(c *call, status int, fields []policy.HeaderField, text string, closing bool) error {
	out := takeOut()
	defer giveOut(out)
	b := append(out.b[:0], "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	b = append(b, http.StatusText(status)...)
	b = append(b, "\r\nDate: "...)
	b = time.Now().UTC().AppendFormat(b, http.TimeFormat)
	b = append(b, '\r', '\n')
	b = appendFields(b, fields)
	bodiless := status == http.StatusNoContent || status == http.StatusNotModified
	if !bodiless {
		b = append(b, "Content-Length: "...)
		b = strconv.AppendInt(b, int64(len(text)), 10)
		b = append(b, '\r', '\n')
	}
	if closing {
		b = append(b, "Connection: close\r\n"...)
	}
	b = append(b, '\r', '\n')
	if !bodiless && c.in.Method != http.MethodHead {
		b = append(b, text...)
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
	if f != nil {
		f.in.release()
		f.upstream.Done(denied == nil && !c.begun && uploadErr == nil)
	}
	switch {
	case denied != nil && !c.begun:
		s.noteDecision(*denied)
		_ = s.answerDenial(c, *denied, true) // the connection ends anyway
		s.over(c)
		s.linger()
		return false
	case c.begun:
		s.entry.Failed, s.entry.Err = true, err.Error()
		s.over(c)
		hangUp(s.near) // what was sent must not pass for a whole answer
		return false
	case errors.Is(uploadErr, errChunk), errors.Is(uploadErr, errLong):
		return s.fail(c, http.StatusBadRequest, uploadErr)
	case uploadErr != nil && !isWriteError(uploadErr) && !errors.Is(uploadErr, errUnwanted):
		s.entry.Failed, s.entry.Err = true, "the caller's request broke off: "+uploadErr.Error()
		s.over(c)
		return false
	}
	if _, ok := errors.AsType[*unreachableError](err); ok {
		return s.fail(c, http.StatusServiceUnavailable, err)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return s.fail(c, http.StatusGatewayTimeout, err)
	}
	return s.fail(c, http.StatusBadGateway, err)
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
