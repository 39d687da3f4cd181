// Connections to upstreams, kept for the next request.

package http1

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
	"syscall"
	"time"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// maxIdle bounds the connections that are kept for one upstream.
const maxIdle = 256

// far is a connection to an upstream. One request at a time uses it.
type far struct {
	net.Conn
	upstream *hop.Upstream
	pool     *pool
	in       buffer
	clock    clock

	raw    syscall.RawConn      // nil: it cannot be looked at
	state  *tls.ConnectionState // of mutual TLS
	epoch  uint64
	idleAt time.Time
	reused bool
}

// pool keeps the idle connections of one upstream. It is safe for concurrent use.
type pool struct {
	hop      *hop.Hop
	upstream *hop.Upstream

	mu     sync.Mutex // guards the rest
	idle   []*far     // the latest last
	epoch  uint64     // connections of another one are not kept
	closed bool
	reaper *time.Timer
}

func newPool(h *hop.Hop, u *hop.Upstream) *pool {
	p := &pool{hop: h, upstream: u}
	p.reaper = time.AfterFunc(time.Hour, p.reap)
	p.reaper.Stop()
	return p
}

// get gives a connection that is kept and still there; nil for none.
func (p *pool) get() *far {
	now := time.Now()
	for {
		f := p.pop()
		if f == nil || now.Sub(f.idleAt) < p.hop.Limits.IdleTimeout && !f.drains() && f.alive() {
			return f
		}
		f.discard()
	}
}

func (p *pool) pop() *far {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.idle) == 0 {
		return nil
	}
	f := p.idle[len(p.idle)-1]
	p.idle = p.idle[:len(p.idle)-1]
	return f
}

// dial makes a new connection within limit.
func (p *pool) dial(ctx context.Context, limit time.Duration) (*far, error) {
	p.mu.Lock()
	epoch := p.epoch
	p.mu.Unlock()
	conn, err := p.upstream.Connect(ctx, limit)
	if err != nil {
		return nil, err
	}
	f := &far{Conn: conn, upstream: p.upstream, pool: p, epoch: epoch}
	f.raw = rawOf(conn)
	if secured, ok := conn.(*tls.Conn); ok {
		state := secured.ConnectionState()
		f.state = &state
	}
	return f, nil
}

// rawOf gives what is below conn, and below TLS.
func rawOf(conn net.Conn) syscall.RawConn {
	for {
		if wrapped, ok := conn.(interface{ NetConn() net.Conn }); ok {
			conn = wrapped.NetConn()
			continue
		}
		if sc, ok := conn.(syscall.Conn); ok {
			if raw, err := sc.SyscallConn(); err == nil {
				return raw
			}
		}
		return nil
	}
}

// alive says whether the other end has neither closed the connection nor said
// anything that nobody has asked for.
func (f *far) alive() bool {
	if f.raw == nil {
		return true
	}
	quiet := false
	err := f.raw.Control(func(fd uintptr) {
		var one [1]byte
		_, _, err := syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		quiet = err == syscall.EAGAIN
	})
	return err == nil && quiet
}

// keep gives f back after a request that left nothing behind.
func (f *far) keep() {
	f.in.shrink()
	f.idleAt, f.reused = time.Now(), true
	if len(f.in.bytes()) > 0 || f.drains() || !f.pool.push(f) {
		f.discard()
	}
}

// drains says whether f should be used for nothing new any more.
func (f *far) drains() bool { return f.state != nil && f.pool.hop.Identity.Draining(f.state) }

func (p *pool) push(f *far) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || f.epoch != p.epoch || len(p.idle) >= maxIdle {
		return false
	}
	if p.idle = append(p.idle, f); len(p.idle) == 1 {
		p.reaper.Reset(p.hop.Limits.IdleTimeout)
	}
	return true
}

// discard ends f; once.
func (f *far) discard() {
	f.in.release()
	_ = f.Close() // nothing is expected of it any more
	f.upstream.Disconnected()
}

// reap closes what has been idle for too long.
func (p *pool) reap() {
	p.mu.Lock()
	defer p.mu.Unlock()
	now, n := time.Now(), 0
	for n < len(p.idle) && now.Sub(p.idle[n].idleAt) >= p.hop.Limits.IdleTimeout {
		p.idle[n].discard()
		n++
	}
	p.idle = append(p.idle[:0], p.idle[n:]...)
	if len(p.idle) > 0 && !p.closed {
		p.reaper.Reset(max(p.hop.Limits.IdleTimeout-now.Sub(p.idle[0].idleAt), time.Second))
	}
}

// renew closes what is idle, and has what is in use not come back: the identity that
// it was made with has a successor.
func (p *pool) renew() {
	p.mu.Lock()
	idle := p.idle
	p.idle = nil
	p.epoch++
	p.mu.Unlock()
	for _, f := range idle {
		f.discard()
	}
}

func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.reaper.Stop()
	p.mu.Unlock()
	p.renew()
}

// clock moves the deadlines of a connection on, but not at each step: that costs
// more than what it guards.
type clock struct{ read, write time.Time }

// tick makes sure that reading, or writing, ends between three quarters of limit and
// limit from now.
func (c *clock) tick(conn net.Conn, read bool, limit time.Duration) error {
	at, set := &c.write, conn.SetWriteDeadline
	if read {
		at, set = &c.read, conn.SetReadDeadline
	}
	now := time.Now()
	if left := at.Sub(now); left <= limit && left >= limit/4*3 {
		return nil
	}
	*at = now.Add(limit)
	return set(*at)
}
