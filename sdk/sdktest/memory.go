// A network in memory, for trust domains of NewInMemory: who listens at which
// address, and who connects.

package sdktest

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
)

// backlog is how many connections wait for Accept.
const backlog = 128

// address is any text; the network says what it is for.
type address struct{ network, text string }

// Network implements net.Addr.
func (a address) Network() string { return a.network }

// String implements net.Addr.
func (a address) String() string { return a.text }

// memory is safe for concurrent use.
type memory struct {
	dialed atomic.Int64 // numbers the connections' far ends

	mu        sync.Mutex
	listeners map[address]*listener // guarded by mu
}

func (m *memory) listen(a address) (net.Listener, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.listeners[a] != nil {
		return nil, &net.OpError{Op: "listen", Net: a.network, Addr: a, Err: syscall.EADDRINUSE}
	}
	l := &listener{memory: m, addr: a, conns: make(chan *conn, backlog), done: make(chan struct{})}
	m.listeners[a] = l
	return l, nil
}

// dial connects from, which is a name, to whoever listens at a.
func (m *memory) dial(ctx context.Context, from string, a address) (net.Conn, error) {
	m.mu.Lock()
	l := m.listeners[a]
	m.mu.Unlock()
	refused := &net.OpError{Op: "dial", Net: a.network, Addr: a, Err: syscall.ECONNREFUSED}
	if l == nil {
		return nil, refused
	}
	near, far := pipe(address{a.network, fmt.Sprintf("%s:%d", from, m.dialed.Add(1))}, a)
	select {
	case l.conns <- far:
		select {
		case <-l.done: // perhaps nobody has looked for it any more
			_ = far.Close()
			return nil, refused
		default:
			return near, nil
		}
	case <-l.done:
		return nil, refused
	case <-ctx.Done():
		return nil, &net.OpError{Op: "dial", Net: a.network, Addr: a, Err: ctx.Err()}
	}
}

type listener struct {
	memory *memory
	addr   address
	conns  chan *conn
	done   chan struct{} // closed by Close
	once   sync.Once
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. Connections that nobody has accepted end.
func (l *listener) Close() error {
	l.once.Do(func() {
		l.memory.mu.Lock()
		delete(l.memory.listeners, l.addr)
		l.memory.mu.Unlock()
		close(l.done)
		for {
			select {
			case c := <-l.conns:
				_ = c.Close() // nobody else has it
			default:
				return
			}
		}
	})
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return l.addr }
