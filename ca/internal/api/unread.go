// What callers have not read yet. gRPC keeps an answer in memory until the other
// side takes it, also when its call has ended, and whoever gives it no room in the
// HTTP/2 window, on connection after connection, could have the CA keep any amount
// (SECURITY.md T38). So what is on the way to each agent is counted over all its
// connections: in when gRPC takes an answer over, out when its DATA frames
// go to the network. Too much of it ends all of them.

package api

import (
	"context"
	"net"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/sdk/svid"
)

const (
	// maxUnreadBytes is several times what an agent has on the way when it is slow:
	// a message of a listing and some batches of SVIDs, of 1 MiB each.
	maxUnreadBytes = 32 << 20
	// roomBytes on the way leave room for more: gRPC keeps a sender waiting from 64 KiB
	// of a stream on.
	roomBytes = 32 << 10
	// maxConnections of one agent, which has one, and some that end.
	maxConnections = 32
)

// unread knows the connections of agents. It is safe for
// concurrent use.
type unread struct {
	mu sync.Mutex
	// guarded by mu
	owners map[string]*owner // by SPIFFE ID
}

// owner is guarded by unread.mu.
type owner struct {
	bytes int
	conns map[*countedConn]struct{}
}

func newUnread() *unread { return &unread{owners: make(map[string]*owner)} }

// open takes a connection over; nil: its owner has too many.
func (u *unread) open(raw net.Conn, name string) *countedConn {
	u.mu.Lock()
	defer u.mu.Unlock()
	o := u.owners[name]
	if o == nil {
		o = &owner{conns: make(map[*countedConn]struct{})}
		u.owners[name] = o
	}
	if len(o.conns) >= maxConnections {
		return nil
	}
	c := &countedConn{Conn: raw, unread: u, name: name, owner: o}
	o.conns[c] = struct{}{}
	return c
}

// countedConn counts the DATA frames that are written to it. Its Write is for one
// goroutine at a time, as gRPC has it.
type countedConn struct {
	net.Conn
	unread *unread
	name   string
	frames dataFrames

	owner *owner // guarded by unread.mu
	bytes int    // taken over and not written; guarded by unread.mu
	over  bool   // guarded by unread.mu
}

// queued notes n more bytes on the way, and says whether that is too much.
func (c *countedConn) queued(n int) (tooMuch bool) {
	c.unread.mu.Lock()
	defer c.unread.mu.Unlock()
	if c.over {
		return false
	}
	c.bytes += n
	c.owner.bytes += n
	return c.owner.bytes > maxUnreadBytes
}

// roomy says whether less than limit is on the way. Nobody knows of nil.
func (c *countedConn) roomy(limit int) bool {
	if c == nil {
		return false
	}
	c.unread.mu.Lock()
	defer c.unread.mu.Unlock()
	return c.bytes < limit
}

// Write implements net.Conn.
func (c *countedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if data := c.frames.count(b[:n]); data > 0 {
		c.unread.mu.Lock()
		if !c.over { // below zero: gRPC says that it took an answer over after it did
			c.bytes -= data
			c.owner.bytes -= data
		}
		c.unread.mu.Unlock()
	}
	return n, err
}

// Close implements net.Conn.
func (c *countedConn) Close() error {
	c.unread.mu.Lock()
	if !c.over {
		c.over = true
		c.owner.bytes -= c.bytes
		delete(c.owner.conns, c)
		if len(c.owner.conns) == 0 {
			delete(c.unread.owners, c.name)
		}
	}
	c.unread.mu.Unlock()
	return c.Conn.Close()
}

// closeAll ends every connection of c's owner, and says how many.
func (c *countedConn) closeAll() int {
	c.unread.mu.Lock()
	var all []*countedConn
	for other := range c.owner.conns {
		all = append(all, other)
	}
	c.unread.mu.Unlock()
	for _, other := range all {
		_ = other.Close() // whoever uses it learns of it
	}
	return len(all)
}

// dataFrames finds the DATA frames in what a server writes (RFC 9113 §4.1), in
// pieces of any size.
type dataFrames struct {
	header [9]byte
	have   int // bytes of header
	left   int // of the frame's payload
}

// count returns how many bytes of DATA are in b.
func (f *dataFrames) count(b []byte) (data int) {
	const typeData = 0
	for len(b) > 0 {
		if f.left == 0 {
			n := copy(f.header[f.have:], b)
			f.have += n
			b = b[n:]
			if f.have < len(f.header) {
				return data
			}
			f.left = int(f.header[0])<<16 | int(f.header[1])<<8 | int(f.header[2])
			if f.left == 0 {
				f.have = 0
			}
			continue
		}
		n := min(f.left, len(b))
		if f.header[3] == typeData {
			data += n
		}
		b = b[n:]
		if f.left -= n; f.left == 0 {
			f.have = 0
		}
	}
	return data
}

// admitConn lets an agent have one more connection, or not.
func (s *Service) admitConn(raw net.Conn, p *svid.Peer) (*countedConn, error) {
	if c := s.unread.open(raw, p.ID.String()); c != nil {
		return c, nil
	}
	err := status.Errorf(codes.ResourceExhausted, "%s has %d connections open, which is all it may have", p.ID, maxConnections)
	return nil, s.refuse(context.Background(), s.PeerCaller(p), audit.Record{Detail: "connect"}, err)
}

// queued notes an answer on its way to the caller of ctx.
func (s *Service) queued(ctx context.Context, n int) {
	c := connOf(ctx)
	if c == nil || !c.queued(n) {
		return
	}
	if closed := c.closeAll(); closed > 0 {
		caller := s.callerOf(ctx)
		_ = s.refuse(context.WithoutCancel(ctx), caller, audit.Record{Detail: "connect"}, // returns its last argument
			status.Errorf(codes.ResourceExhausted, "%s leaves more than %d MiB of answers unread: its %d connections are closed", caller.Name, maxUnreadBytes>>20, closed))
	}
}
