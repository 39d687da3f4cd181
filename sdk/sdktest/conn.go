// Connections in memory that behave as those of TCP do: what was sent before a close
// is still read, a close without lingering is a reset, and a peer that does not read
// is waited for once there is much to read. All of it is made of what a
// testing/synctest bubble sees through, so time goes on while everybody waits.

package sdktest

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// maxUnread is how many bytes wait for a reader.
const maxUnread = 256 << 10

// conn is one end of a connection. It is safe for concurrent use.
type conn struct {
	in, out       *stream
	local, remote address
	reset         atomic.Bool // Close does not linger
	closed        atomic.Bool
}

// pipe makes both ends of a connection.
func pipe(a, b address) (*conn, *conn) {
	there, back := newStream(), newStream()
	return &conn{in: back, out: there, local: a, remote: b}, &conn{in: there, out: back, local: b, remote: a}
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) { return c.in.read(b) }

// Write implements net.Conn.
func (c *conn) Write(b []byte) (int, error) { return c.out.write(b) }

// Close implements net.Conn.
func (c *conn) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	c.out.endOfWriting(c.reset.Load())
	c.in.endOfReading()
	return nil
}

// SetLinger has Close reset the connection if sec is 0, as with a net.TCPConn.
func (c *conn) SetLinger(sec int) error {
	c.reset.Store(sec == 0)
	return nil
}

// LocalAddr implements net.Conn.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error { return c.setDeadline(c.in, &c.in.reading, t) }

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(c.out, &c.out.writing, t) }

func (c *conn) setDeadline(s *stream, side *side, t time.Time) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	side.setDeadline(s, t)
	return nil
}

// SyscallConn implements syscall.Conn, by which the table of live connections sees
// that a connection was closed.
func (c *conn) SyscallConn() (syscall.RawConn, error) { return rawConn{c}, nil }

type rawConn struct{ conn *conn }

// Control implements syscall.RawConn; there is no file descriptor to call f with.
func (r rawConn) Control(func(uintptr)) error {
	if r.conn.closed.Load() {
		return net.ErrClosed
	}
	return nil
}

// Read implements syscall.RawConn.
func (rawConn) Read(func(uintptr) bool) error { return errors.ErrUnsupported }

// Write implements syscall.RawConn.
func (rawConn) Write(func(uintptr) bool) error { return errors.ErrUnsupported }

// stream is what goes one way.
type stream struct {
	mu sync.Mutex
	// guarded by mu
	changed sync.Cond // also when a deadline passes
	unread  []byte
	ended   error // what a reader gets after unread
	reading side
	writing side
}

// side is one of the two ends of a stream.
type side struct {
	closed bool
	late   bool // the deadline has passed
	timer  *time.Timer
}

func newStream() *stream {
	s := new(stream)
	s.changed.L = &s.mu
	return s
}

func (s *stream) read(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.reading.closed:
			return 0, net.ErrClosed
		case s.reading.late:
			return 0, os.ErrDeadlineExceeded
		case len(s.unread) > 0 || len(b) == 0:
			n := copy(b, s.unread)
			s.unread = s.unread[n:]
			s.changed.Broadcast()
			return n, nil
		case s.ended != nil:
			return 0, s.ended
		}
		s.changed.Wait()
	}
}

func (s *stream) write(b []byte) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.writing.closed:
			return n, net.ErrClosed
		case s.writing.late:
			return n, os.ErrDeadlineExceeded
		case s.reading.closed:
			return n, syscall.ECONNRESET
		}
		if room := min(maxUnread-len(s.unread), len(b)); room > 0 {
			s.unread = append(s.unread, b[:room]...)
			n, b = n+room, b[room:]
			s.changed.Broadcast()
		}
		if len(b) == 0 {
			return n, nil
		}
		s.changed.Wait()
	}
}

func (s *stream) endOfWriting(reset bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = io.EOF
	if reset {
		s.unread, s.ended = nil, syscall.ECONNRESET
	}
	s.writing.close(s)
}

func (s *stream) endOfReading() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unread = nil
	s.reading.close(s)
}

// close ends a side; s.mu is held.
func (d *side) close(s *stream) {
	d.closed = true
	d.setDeadline(s, time.Time{})
}

// setDeadline has those who wait on this side go on at t; s.mu is held.
func (d *side) setDeadline(s *stream, t time.Time) {
	if d.timer != nil {
		d.timer.Stop()
	}
	d.timer, d.late = nil, !t.IsZero() && !time.Now().Before(t)
	if !t.IsZero() && !d.late {
		var timer *time.Timer
		timer = time.AfterFunc(time.Until(t), func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if d.timer == timer { // else there is another deadline by now
				d.late = true
				s.changed.Broadcast()
			}
		})
		d.timer = timer
	}
	s.changed.Broadcast()
}
