// How far a body reaches. Its bytes go on as they came; only where it ends is looked
// for, by the letter, and trailers are read like heads.

package http1

import (
	"errors"
	"io"
	"net"
)

// body reads one body off a connection's buffer.
type body struct {
	conn net.Conn
	in   *buffer
	// limits of the trailers
	maxBytes, maxFields int
	drop                func(name string) bool // trailers that do not go on; nil: all do

	form  form
	left  int64 // of the body, or of the chunk
	state chunkState
	tail  []byte // the end of a chunked body as it goes on
}

// form is how a message says where its body ends.
type form uint8

const (
	empty form = iota
	counted
	chunked
	untilClose
)

// chunkState is where in a chunked body the reader is.
type chunkState uint8

const (
	inSize chunkState = iota
	inData
	afterData
	inTrailer
	done
)

// errChunk is for a body of which it is not clear where it ends.
var errChunk = errors.New("the body's chunks are malformed")

// bodyOf is the body of a request.
func (m *message) bodyOf() (form, int64) {
	switch {
	case m.chunked:
		return chunked, 0
	case m.length > 0:
		return counted, m.length
	}
	return empty, 0
}

// answerBody is the body of an answer to a request with method HEAD or another.
func (m *message) answerBody(head bool) (form, int64) {
	switch {
	case head, m.status < 200, m.status == 204, m.status == 304:
		return empty, 0
	case m.chunked:
		return chunked, 0
	case m.length > 0:
		return counted, m.length
	case m.length == 0:
		return empty, 0
	}
	return untilClose, 0
}

// advance says how many of the bytes that are there, have, are of the body and may go
// on. ended says that it ends with them.
func (b *body) advance(have []byte) (n int, ended bool, err error) {
	switch b.form {
	case empty:
		return 0, true, nil
	case counted:
		n = int(min(b.left, int64(len(have))))
		b.left -= int64(n)
		return n, b.left == 0, nil
	case untilClose:
		return len(have), false, nil
	}
	n, err = b.scan(have)
	return n, b.state == done, err
}

// scan goes over as much of a chunked body as is there, and leaves trailers to tail.
func (b *body) scan(have []byte) (n int, err error) {
	for {
		switch b.state {
		case inSize:
			size, length, err := chunkSize(have[n:])
			if err != nil || length == 0 {
				return n, err
			}
			if size == 0 {
				b.state = inTrailer
				continue
			}
			n += length
			b.left, b.state = size, inData
		case inData:
			step := min(b.left, int64(len(have)-n))
			n += int(step)
			if b.left -= step; b.left > 0 {
				return n, nil
			}
			b.state = afterData
		case afterData:
			if len(have)-n < 2 {
				if len(have)-n == 1 && have[n] != '\r' {
					return n, errChunk
				}
				return n, nil
			}
			if have[n] != '\r' || have[n+1] != '\n' {
				return n, errChunk
			}
			n += 2
			b.state = inSize
		case inTrailer:
			_, length, err := chunkSize(have[n:]) // the last chunk goes on with its trailers
			if err != nil {
				return n, err
			}
			whole, err := b.scanTrailer(have[n:], length)
			return n + whole, err
		case done:
			return n, nil
		}
	}
}

// maxChunkDigits bounds a chunk's size to what an int64 is sure to hold.
const maxChunkDigits = 15

// chunkSize reads the line that begins a chunk; length 0 says that it is not there
// yet. Extensions are refused: nobody needs them, and readers differ about them.
func chunkSize(have []byte) (size int64, length int, err error) {
	i := 0
	for ; i < len(have); i++ {
		c := have[i]
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		case c == '\r' && i > 0:
			if i+1 == len(have) {
				return 0, 0, nil
			}
			if have[i+1] != '\n' {
				return 0, 0, errChunk
			}
			return size, i + 2, nil
		default:
			return 0, 0, errChunk
		}
		if i == maxChunkDigits {
			return 0, 0, errChunk
		}
		size = size<<4 | int64(c)
	}
	return 0, 0, nil
}

// scanTrailer looks at the last chunk, which is last bytes long, and what follows it.
// When all is there and nothing is taken out it may go on as it is, and whole says how
// much that is; else tail has what goes on in the place of the next left bytes.
func (b *body) scanTrailer(have []byte, last int) (whole int, err error) {
	end, _, err := endOfHead(have[last:], 0)
	switch {
	case err != nil:
		return 0, err
	case end == 0 && len(have) > b.maxBytes, end > b.maxBytes:
		return 0, errLong
	case end == 0:
		return 0, nil
	}
	var m message
	m.reset()
	m.raw = have[last : last+end]
	if err := m.parseFields(0, b.maxFields); err != nil {
		return 0, err
	}
	dropped := false
	b.tail = append(b.tail[:0], have[:last]...)
	for i := range m.fields {
		f := &m.fields[i]
		if f.kind != other {
			return 0, errors.New("a trailer says something about the message's framing")
		}
		if b.drop != nil && b.drop(lowerName(m.name(f))) {
			dropped = true
			continue
		}
		b.tail = append(b.tail, m.line(f)...)
	}
	b.tail = append(b.tail, "\r\n"...)
	b.state = done
	if !dropped {
		b.tail = b.tail[:0]
		return last + end, nil
	}
	b.left = int64(last + end)
	return 0, nil
}

// send sends the rest of the body to w. consumed is called when all of it has been
// read, before the last of it is written. tick is called before each read and write.
func (b *body) send(w net.Conn, tick func(read bool) error, consumed func()) (n int64, err error) {
	for {
		ready, ended, err := b.advance(b.in.bytes())
		if err != nil {
			return n, err
		}
		if ended {
			consumed()
		}
		if ready > 0 {
			if err := write(w, b.in.bytes()[:ready], tick); err != nil {
				return n, err
			}
			n += int64(ready)
			b.in.skip(ready)
		}
		if ended {
			return n, b.sendTail(w, tick)
		}
		b.in.enlarge()
		if err := tick(true); err != nil {
			return n, err
		}
		switch err := b.in.fill(b.conn, largeBytes); {
		case errors.Is(err, io.EOF) && b.form == untilClose:
			consumed()
			return n, nil
		case errors.Is(err, io.EOF):
			return n, io.ErrUnexpectedEOF
		case err != nil:
			return n, err
		}
	}
}

// takeBuffered appends to out what of the body is there. ended says that this was all.
func (b *body) takeBuffered(out []byte) (_ []byte, ended bool, err error) {
	n, ended, err := b.advance(b.in.bytes())
	if err != nil {
		return out, false, err
	}
	out = append(out, b.in.bytes()[:n]...)
	b.in.skip(n)
	if ended && b.form == chunked && len(b.tail) > 0 {
		b.in.skip(int(b.left))
		out = append(out, b.tail...)
	}
	return out, ended, nil
}

// check says whether what of the body is there, have, is well-formed, and whether it is
// all of it.
func (b *body) check(have []byte) (ended bool, err error) {
	trial := *b
	trial.tail = nil
	_, ended, err = trial.advance(have)
	return ended, err
}

// sendTail sends the end of a chunked body from which trailers were taken out.
func (b *body) sendTail(w net.Conn, tick func(bool) error) error {
	if b.form != chunked || len(b.tail) == 0 {
		return nil
	}
	b.in.skip(int(b.left))
	return write(w, b.tail, tick)
}

func write(w net.Conn, p []byte, tick func(bool) error) error {
	err := tick(false)
	if err == nil {
		_, err = w.Write(p)
	}
	if err != nil {
		return &writeError{err}
	}
	return nil
}

// writeError says that it was the far end of a body's way that gave up.
type writeError struct{ err error }

// Error implements error.
func (e *writeError) Error() string { return e.err.Error() }

// Unwrap gives the cause.
func (e *writeError) Unwrap() error { return e.err }
