// A way on which everything is written down: what an app was sent, byte by byte,
// whatever it made of it.

package stage

import (
	"bytes"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// Tap hands TCP connections on. It is safe for concurrent use.
type Tap struct {
	// Address is where it listens.
	Address string

	to string
	wg sync.WaitGroup

	mu    sync.Mutex
	open  map[net.Conn]struct{} // guarded by mu; nil: the test has ended
	heard []*Buffer             // guarded by mu: of each connection, what its caller sent
}

// NewTap opens a way to host:port or unix:///PATH, until the test ends.
func NewTap(tb testing.TB, to string) *Tap {
	tb.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	p := &Tap{Address: lis.Addr().String(), to: to, open: map[net.Conn]struct{}{}}
	p.wg.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.carry(conn) })
		}
	})
	tb.Cleanup(func() {
		lis.Close()
		p.mu.Lock()
		for conn := range p.open {
			conn.Close()
		}
		p.open = nil
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

// DialApp connects to host:port or unix:///PATH.
func DialApp(address string) (net.Conn, error) {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		return net.Dial("unix", path)
	}
	return net.Dial("tcp", address)
}

// holds says whether conn may be used; it is closed with the test.
func (p *Tap) holds(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open != nil {
		p.open[conn] = struct{}{}
	}
	return p.open != nil
}

// carry is one connection.
func (p *Tap) carry(from net.Conn) {
	defer from.Close()
	to, err := DialApp(p.to)
	if err != nil {
		return
	}
	defer to.Close()
	if !p.holds(from) || !p.holds(to) {
		return
	}
	heard := new(Buffer)
	p.mu.Lock()
	p.heard = append(p.heard, heard)
	p.mu.Unlock()
	p.wg.Go(func() {
		io.Copy(from, to)
		from.Close()
	})
	io.Copy(io.MultiWriter(heard, to), from)
	if half, ok := to.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
}

// Heard is what each connection has brought to the app so far.
func (p *Tap) Heard() (conns [][]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.heard {
		b.mu.Lock()
		conns = append(conns, bytes.Clone(b.buf.Bytes()))
		b.mu.Unlock()
	}
	return conns
}
