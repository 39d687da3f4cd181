// Connections to an upstream: few, each for many requests.

package http2

import (
	"context"
	"crypto/tls"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"merlon.dev/sdk/sidecar/internal/hop"
)

const (
	// busy is how many requests a connection has before another one is made beside it,
	// up to one for each processor. Fewer connections have more to send at once.
	busy = 64
	// maxConns is how many there are at most, where each is full.
	maxConns = 64
)

// errFull is for a request that no connection has room for.
var errFull = fmt.Errorf("every connection: %w", hop.ErrUpstreamFull)

// pool has the connections to one upstream. It is safe for concurrent use. Its lock is
// taken before a connection's.
type pool struct {
	eng      *engine
	upstream *hop.Upstream

	mu      sync.Mutex
	conns   []*conn // guarded by mu: those that take requests
	all     int     // guarded by mu: also those that end
	dialing *dialing
	closed  bool
}

// dialing is a connection that is being made.
type dialing struct {
	conn *conn // once TCP and TLS are through
	done chan struct{}
	err  error // when done is closed
}

// pick gives the connection with the fewest requests that takes one more; nil for none.
func (p *pool) pick() *conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	var best *conn
	for _, c := range p.conns {
		if c.load.Load() < c.room.Load() && (best == nil || c.load.Load() < best.load.Load()) {
			best = c
		}
	}
	if best != nil && best.load.Load() >= busy && len(p.conns) < runtime.GOMAXPROCS(0) {
		p.dial()
	}
	return best
}

// get is pick, and waits for a connection where there is none.
func (p *pool) get(ctx context.Context) (*conn, error) {
	for {
		if c := p.pick(); c != nil {
			return c, nil
		}
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return nil, context.Canceled
		}
		if p.all >= p.most() && p.dialing == nil {
			p.mu.Unlock()
			return nil, errFull
		}
		p.dial()
		d := p.dialing
		p.mu.Unlock()
		select {
		case <-d.done:
			if d.err != nil {
				return nil, d.err
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// dial begins to make a connection, unless that is under way. p.mu is held.
func (p *pool) dial() {
	if p.dialing != nil || p.closed || p.all >= p.most() {
		return
	}
	d := &dialing{done: make(chan struct{})}
	p.dialing = d
	p.all++
	p.eng.goroutines.Go(func() { p.make(d) })
}

// most is how many connections there may be.
func (p *pool) most() int {
	if n := p.upstream.MaxConnections; n > 0 {
		return min(n, maxConns)
	}
	return maxConns
}

// make connects and serves the connection to its end.
func (p *pool) make(d *dialing) {
	nc, err := p.upstream.Connect(p.eng.life, p.eng.hop.Limits.HandshakeTimeout)
	if t, ok := nc.(*tls.Conn); err == nil && ok && t.ConnectionState().NegotiatedProtocol != "h2" {
		err = fmt.Errorf("upstream %s does not speak HTTP/2 (no ALPN h2)", p.upstream.Address)
		_ = nc.Close() // the refusal is what counts
		p.upstream.Disconnected()
	}
	if err != nil {
		p.ready(d, nil, err)
		return
	}
	defer p.upstream.Disconnected()
	c := p.eng.newConn(nc, p)
	p.mu.Lock()
	d.conn = c
	closed := p.closed
	p.mu.Unlock()
	if closed {
		_ = nc.Close() // serve sees it
	}
	c.serve()
}

// isReady is after the settings of c have come.
func (p *pool) isReady(c *conn) {
	p.mu.Lock()
	d := p.dialing
	p.mu.Unlock()
	if d != nil && d.conn == c {
		p.ready(d, c, nil)
	}
}

// ready ends d.
func (p *pool) ready(d *dialing, c *conn, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dialing = nil
	if d.err = err; err != nil {
		p.all--
	} else {
		p.conns = append(p.conns, c)
	}
	close(d.done)
}

// leave has c take no further requests.
func (p *pool) leave(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = slices.DeleteFunc(p.conns, func(have *conn) bool { return have == c })
}

// remove is after c has ended because of err.
func (p *pool) remove(c *conn, err error) {
	p.leave(c)
	p.mu.Lock()
	d := p.dialing
	if d == nil || d.conn != c {
		d = nil
		p.all--
	}
	p.mu.Unlock()
	if d != nil {
		p.ready(d, nil, fmt.Errorf("begin HTTP/2 with upstream %s: %w", p.upstream.Address, err))
	}
}

// close ends every connection.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	conns := slices.Clone(p.conns)
	if d := p.dialing; d != nil && d.conn != nil {
		conns = append(conns, d.conn)
	}
	p.mu.Unlock()
	for _, c := range conns {
		c.hangUp()
	}
}

// takes says whether c takes another request. c.mu is held.
func (c *conn) takes() bool {
	return c.goodbye == staying && !c.closing && !c.broken && len(c.streams) < int(c.room.Load()) &&
		c.lastID < maxWindow-2 && c.waiting() < maxControl
}
