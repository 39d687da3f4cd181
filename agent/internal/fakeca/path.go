// The network between agent and CA: a path that can swallow everything.

package fakeca

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
)

// Path is a TCP port that leads to another one. It is safe for concurrent use.
type Path struct {
	Address string

	to  string
	lis net.Listener

	mu sync.Mutex
	// guarded by mu
	conns   []net.Conn
	swallow bool
	closed  bool
	busy    sync.WaitGroup
}

// NewPath opens a path to an address. It ends with the test.
func NewPath(tb testing.TB, to string) *Path {
	tb.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	p := &Path{Address: lis.Addr().String(), to: to, lis: lis}
	p.busy.Go(p.accept)
	tb.Cleanup(p.close)
	return p
}

// Swallow makes the path take everything and deliver nothing, without a word,
// also on the connections that it has.
func (p *Path) Swallow() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.swallow = true
}

func (p *Path) accept() {
	for {
		in, err := p.lis.Accept()
		if err != nil {
			return
		}
		if !p.keep(in) {
			continue
		}
		out, err := net.Dial("tcp", p.to)
		if err != nil {
			in.Close()
			continue
		}
		if p.keep(out) {
			p.busy.Go(func() { p.carry(in, out) })
			p.busy.Go(func() { p.carry(out, in) })
		}
	}
}

// keep has c closed at the end.
func (p *Path) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		c.Close()
		return false
	}
	p.conns = append(p.conns, c)
	return true
}

// carry ends both sides with one, unless nothing gets through: then neither
// side hears of the other's end.
func (p *Path) carry(from, to net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		p.mu.Lock()
		swallow := p.swallow
		p.mu.Unlock()
		if swallow {
			if err != nil {
				return
			}
			continue
		}
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				err = werr
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				to.Close()
			}
			from.Close()
			return
		}
	}
}

func (p *Path) close() {
	p.lis.Close()
	p.mu.Lock()
	p.closed = true
	for _, c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
	p.busy.Wait()
}
