// Connections that drain. gRPC has no way to end a single connection in order, on
// either side; so between two of its frames a GOAWAY is put in that says so: a server's
// client gets it from there, and a client from its own end, whatever the server does.
// Calls that are under way go on, and new ones go over another connection.

package grpcauth

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// goAway says that no further stream should be opened, and that every one which was
// will be served (RFC 9113 §6.8): the last stream is 2^31-1, the error NO_ERROR.
var goAway = []byte{0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0}

const frameHeaderBytes = 9

// frames follows what a server sends. The zero value is before the first frame.
type frames struct {
	header [frameHeaderBytes]byte
	have   int  // of the header
	left   int  // of the payload
	any    bool // a frame has passed: the settings, which come first
	open   bool // a list of header fields goes on in the next frame
}

// between says whether another frame may be put in here.
func (f *frames) between() bool { return f.any && !f.open && f.have == 0 }

// rest is how many bytes there are at least until between can say something else.
func (f *frames) rest() int {
	if f.have < frameHeaderBytes {
		return frameHeaderBytes - f.have
	}
	return f.left
}

// pass is after p was sent.
func (f *frames) pass(p []byte) {
	for len(p) > 0 {
		if f.have < frameHeaderBytes {
			n := copy(f.header[f.have:], p)
			p = p[n:]
			if f.have += n; f.have < frameHeaderBytes {
				return
			}
			f.left = int(f.header[0])<<16 | int(f.header[1])<<8 | int(f.header[2])
		}
		n := min(f.left, len(p))
		p = p[n:]
		if f.left -= n; f.left == 0 {
			f.end()
		}
	}
}

// end is after a whole frame.
func (f *frames) end() {
	const headers, pushPromise, continuation, endHeaders = 1, 5, 9, 4
	switch f.header[3] {
	case headers, pushPromise, continuation:
		f.open = f.header[4]&endHeaders == 0
	}
	f.have, f.any = 0, true
}

// serverConn is a server's end.
type serverConn struct {
	net.Conn

	mu sync.Mutex // guards the rest, and is held while something is sent
	// leaving: a GOAWAY is to be sent; said: it was.
	leaving, said bool
	out           frames
}

// Write implements net.Conn.
func (c *serverConn) Write(p []byte) (written int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.leaving && !c.said && len(p) > 0 {
		n, err := c.send(p[:min(c.out.rest(), len(p))])
		if written += n; err != nil {
			return written, err
		}
		p = p[n:]
		if err := c.sayGoodbye(); err != nil {
			return written, err
		}
	}
	if len(p) == 0 && written > 0 {
		return written, nil
	}
	n, err := c.send(p)
	return written + n, err
}

// send sends p as it is. c.mu is held.
func (c *serverConn) send(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.out.pass(p[:n])
	return n, err
}

// sayGoodbye sends the GOAWAY, if this is the place. c.mu is held.
func (c *serverConn) sayGoodbye() error {
	if c.said || !c.out.between() {
		return nil
	}
	c.said = true
	_, err := c.Conn.Write(goAway)
	return err
}

// leave has the client make another connection.
func (c *serverConn) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leaving = true
	_ = c.sayGoodbye() // who writes or reads next sees the end of the connection
}

// clientConn is a client's end. One goroutine reads it, as gRPC's does.
type clientConn struct {
	net.Conn
	leaving atomic.Bool
	// Of who reads: said says that the GOAWAY was put in, of which unread is left, and
	// woken that leave has ended a Read.
	said, woken bool
	unread      []byte
	in          frames
}

// Read implements net.Conn.
func (c *clientConn) Read(p []byte) (int, error) {
	for len(p) > 0 {
		if c.leaving.Load() && !c.said {
			if c.in.between() {
				c.said, c.unread = true, goAway
			} else {
				p = p[:min(c.in.rest(), len(p))]
			}
		}
		if len(c.unread) > 0 {
			n := copy(p, c.unread)
			c.unread = c.unread[n:]
			return n, nil
		}
		n, err := c.Conn.Read(p)
		c.in.pass(p[:n])
		if n > 0 || c.woken || !c.leaving.Load() || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		c.woken = true
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			return 0, err
		}
	}
	return 0, nil
}

// leave has gRPC make another connection.
func (c *clientConn) leave() {
	if !c.leaving.Swap(true) {
		_ = c.SetReadDeadline(time.Unix(1, 0)) // a connection that is closed ends by itself
	}
}
