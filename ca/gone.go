// Peers that are gone without a word: a machine that lost its power, a path that was
// cut. The kernel sees what nobody acknowledges while nothing runs here, so it ends such
// connections, and gRPC asks so seldom that ten thousand agents at rest cost little
// (internal/api).

package ca

import (
	"net"
	"time"
)

// goneAfter is how long the machine of a peer may acknowledge nothing that was sent to
// it, be it a heartbeat or a probe of the kernel's.
const goneAfter = 40 * time.Second

// noticing ends the connections whose peers are gone.
type noticing struct{ net.Listener }

// Accept implements net.Listener.
func (l noticing) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok && err == nil {
		endWhenGone(tcp)
	}
	return conn, err
}
