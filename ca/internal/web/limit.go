// How many connections the public endpoint has, for each address and in all: anybody may
// come there, and nobody keeps the others out alone.

package web

import (
	"net"
	"net/netip"
	"sync"
)

// Limits of connections at a time. Many may share an address behind a NAT; an IPv6 host
// has all addresses of a /64.
const (
	maxOfAddress   = 64
	maxConnections = 2048
)

// limited closes connections that are too many. It is safe for concurrent use.
type limited struct {
	net.Listener
	mu   sync.Mutex
	open map[netip.Prefix]int // guarded by mu
	all  int                  // guarded by mu
}

func limit(lis net.Listener) *limited {
	return &limited{Listener: lis, open: make(map[netip.Prefix]int)}
}

// Accept implements net.Listener.
func (l *limited) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := sourceOf(conn.RemoteAddr())
		if l.enter(from) {
			return &limitedConn{Conn: conn, leave: sync.OnceFunc(func() { l.leave(from) })}, nil
		}
		conn.Close()
	}
}

func (l *limited) enter(from netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all >= maxConnections || l.open[from] >= maxOfAddress {
		return false
	}
	l.all++
	l.open[from]++
	return true
}

func (l *limited) leave(from netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.open[from]--; l.open[from] == 0 {
		delete(l.open, from)
	}
}

// limitedConn leaves room when it is closed.
type limitedConn struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (c *limitedConn) Close() error {
	c.leave()
	return c.Conn.Close()
}

// sourceOf is whose address that is: the host's, or of IPv6 the network's. What is no IP
// address is one source.
func sourceOf(address net.Addr) netip.Prefix {
	at, err := netip.ParseAddrPort(address.String())
	if err != nil {
		return netip.Prefix{}
	}
	ip, bits := at.Addr().Unmap().WithZone(""), 32
	if ip.Is6() {
		bits = 64
	}
	from, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return from
}
