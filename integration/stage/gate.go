// A way that can be slow, and be cut: what goes through it arrives, until it is shut.

package stage

import (
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Gate hands TCP connections on. It is safe for concurrent use.
type Gate struct {
	target string
	lis    net.Listener
	wg     sync.WaitGroup
	delay  atomic.Int64 // nanoseconds

	mu sync.Mutex
	// guarded by mu
	shut  bool
	conns map[net.Conn]struct{}
}

// NewGate opens a way to the host and port of an URL, until the test ends.
func NewGate(tb testing.TB, to string) *Gate {
	tb.Helper()
	u, err := url.Parse(to)
	if err != nil {
		tb.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	g := &Gate{target: u.Host, lis: lis, conns: make(map[net.Conn]struct{})}
	g.wg.Go(g.serve)
	tb.Cleanup(func() {
		lis.Close()
		g.Shut()
		g.wg.Wait()
	})
	return g
}

// URL is that of the other end, by way of the gate.
func (g *Gate) URL() string { return "https://" + g.lis.Addr().String() }

// Address is host:port of the gate.
func (g *Gate) Address() string { return g.lis.Addr().String() }

// Delay lets what goes through arrive so much later, either way.
func (g *Gate) Delay(by time.Duration) { g.delay.Store(int64(by)) }

// Shut cuts what goes through, and lets nothing in.
func (g *Gate) Shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = true
	for c := range g.conns {
		c.Close()
	}
}

// Open lets connections in again.
func (g *Gate) Open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = false
}

func (g *Gate) serve() {
	for {
		in, err := g.lis.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", g.target)
		if err != nil || !g.enter(in, out) {
			in.Close()
			if out != nil {
				out.Close()
			}
			continue
		}
		g.wg.Go(func() { g.carry(in, out) })
		g.wg.Go(func() { g.carry(out, in) })
	}
}

// enter says whether the gate is open.
func (g *Gate) enter(conns ...net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut {
		return false
	}
	for _, c := range conns {
		g.conns[c] = struct{}{}
	}
	return true
}

func (g *Gate) carry(to, from net.Conn) {
	io.Copy(&late{to, g}, from)
	to.Close()
	from.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.conns, to)
	delete(g.conns, from)
}

// late writes with the delay of its gate. What comes meanwhile waits behind it, in
// the buffers of the kernel, so the way is narrow, too.
type late struct {
	to net.Conn
	g  *Gate
}

func (l *late) Write(p []byte) (int, error) {
	if by := l.g.delay.Load(); by > 0 {
		time.Sleep(time.Duration(by))
	}
	return l.to.Write(p)
}
