// What the sidecar itself answers: denials in the form of the SDK, and what went wrong
// between it and the upstream.

package http2

import (
	"encoding/base64"
	"strconv"
	"strings"

	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// deny answers with the denial d, or ends an answer that has begun.
func (k *call) deny(d policy.Decision, b *batch) {
	if k.isGRPC() {
		fields := grpcFields(denial.By(d).GRPCStatus())
		var first []hpack.HeaderField
		if d.Response != nil {
			first = fieldsOf(d.Response.Headers)
		}
		k.answerGRPC(first, fields, b)
		return
	}
	k.answerHTTP(denial.HTTP(d), b)
}

// fail answers that no upstream took the request, and ends the call.
func (k *call) fail(f *hop.Failure, err error, b *batch) {
	k.failed(f, err, b)
	k.endUp(codec.ErrCodeCancel, b)
}

// failed answers that the upstream did not.
func (k *call) failed(f *hop.Failure, err error, b *batch) {
	k.note(func(e *hop.Entry) { e.Failed, e.Failure, e.Err = true, f, err.Error() })
	if k.isGRPC() {
		k.answerGRPC(nil, grpcFields(k.eng.hop.GRPC(f, err)), b)
		return
	}
	k.answerHTTP(k.eng.hop.Problem(f, err), b)
}

// answerHTTP answers, or resets the stream where the answer has begun: what was sent
// must not pass for a whole one.
func (k *call) answerHTTP(a denial.Answer, b *batch) {
	body := a.Body
	if k.head.method == "HEAD" || a.Status == 204 || a.Status == 304 {
		body = ""
	}
	s := &k.down
	c := s.conn
	c.mu.Lock()
	defer c.unlock(b)
	if s.gone || s.sentEnd || s.stopped {
		return
	}
	if s.begun {
		c.reset(s, codec.ErrCodeInternal)
		c.written(b)
		return
	}
	c.stop(s)
	k.status.Store(int32(a.Status))
	c.field(hpack.HeaderField{Name: ":status", Value: strconv.Itoa(a.Status)})
	for _, f := range a.Fields {
		c.field(hpack.HeaderField{Name: f.Name, Value: f.Value})
	}
	c.endFields(s.id, body == "")
	if body == "" {
		c.ended(s)
	} else {
		s.queue.push([]byte(body))
		s.ending = withData
		c.block(s)
		c.pump()
	}
	c.written(b)
}

// answerGRPC ends the call with a status, in trailers where its answer has begun.
func (k *call) answerGRPC(first, status []hpack.HeaderField, b *batch) {
	s := &k.down
	c := s.conn
	c.mu.Lock()
	defer c.unlock(b)
	if s.gone || s.sentEnd || s.stopped {
		return
	}
	begun := s.begun
	c.stop(s)
	if !begun {
		k.status.Store(200)
		c.field(hpack.HeaderField{Name: ":status", Value: "200"})
		c.field(hpack.HeaderField{Name: "content-type", Value: "application/grpc"})
		for _, f := range first {
			if f.Name != "content-type" {
				c.field(f)
			}
		}
	}
	for _, f := range status {
		c.field(f)
	}
	k.grpcStatus.Store(&status[0].Value)
	c.endFields(s.id, true)
	c.ended(s)
	c.written(b)
}

// stop has nothing more passed on from the other side, and the caller told to end his
// body. c.mu is held.
func (c *conn) stop(s *stream) {
	c.dropQueue(s)
	s.ending = notYet
	s.stopped, s.resetAfter, s.begun = true, true, true
}

// stopAfterEnd has the caller told to end his body when the answer has been sent.
func (s *stream) stopAfterEnd(b *batch) {
	c := s.conn
	c.mu.Lock()
	defer c.unlock(b)
	s.resetAfter = true
	if s.sentEnd && !s.gone {
		c.reset(s, codec.ErrCodeNo)
	}
	c.written(b)
}

// end resets the stream, unless it has gone.
func (s *stream) end(code codec.ErrCode, b *batch) {
	c := s.conn
	c.mu.Lock()
	defer c.unlock(b)
	c.reset(s, code)
	c.written(b)
}

// grpcFields are the fields of a status; grpc-status is the first.
func grpcFields(st *status.Status) []hpack.HeaderField {
	fields := []hpack.HeaderField{
		{Name: "grpc-status", Value: strconv.Itoa(int(st.Code()))},
		{Name: "grpc-message", Value: percentEncoded(st.Message())},
	}
	if p := st.Proto(); len(p.GetDetails()) > 0 {
		if data, err := proto.Marshal(p); err == nil {
			fields = append(fields, hpack.HeaderField{Name: "grpc-status-details-bin", Value: base64.RawStdEncoding.EncodeToString(data)})
		}
	}
	return fields
}

// percentEncoded is s as grpc-message carries it.
func percentEncoded(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			const digits = "0123456789ABCDEF"
			b.Write([]byte{'%', digits[c>>4], digits[c&15]})
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

func fieldsOf(fields []policy.HeaderField) []hpack.HeaderField {
	out := make([]hpack.HeaderField, 0, len(fields))
	for _, f := range fields {
		out = append(out, hpack.HeaderField{Name: f.Name, Value: f.Value})
	}
	return out
}

func hasField(fields []hpack.HeaderField, name string) bool {
	for _, f := range fields {
		if f.Name == name {
			return true
		}
	}
	return false
}
