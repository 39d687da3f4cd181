// Whose turn it is to compute in a handshake. When ten thousand agents come at once, a
// server that begins every handshake ends none: each gets its part of the processor,
// until all have lasted too long and are begun anew. So few compute at a time; a
// handshake that has begun comes before one that has not, and one that has waited
// long is sent away while its client still has time to come again. Nobody has a turn
// while he waits for the other end, which may be slow on purpose.

package api

import (
	"errors"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"merlon.dev/sdk/svid"
)

// freshPatience is how long a handshake may wait for its first turn. One that began
// later than that would hardly end before the client gives up.
const freshPatience = svid.HandshakeTimeout / 2

var errNoTurn = errors.New("refuse a handshake: others are before it, and the CA has no time for it; come again")

// turns is safe for concurrent use.
type turns struct {
	mu sync.Mutex
	// guarded by mu
	free         int
	begun, fresh []*waiter // each in the order in which they came
}

// waiter is guarded by turns.mu, but called.
type waiter struct {
	called chan struct{} // closed when it is its turn
	gone   bool
}

func newTurns() *turns { return &turns{free: 2 * runtime.GOMAXPROCS(0)} }

// take waits for a turn, which has to be given back; false: there was none in time.
func (t *turns) take(begun bool) bool {
	t.mu.Lock()
	if t.free > 0 { // so nobody waits
		t.free--
		t.mu.Unlock()
		return true
	}
	w := &waiter{called: make(chan struct{})}
	if begun {
		t.begun = append(t.begun, w)
		t.mu.Unlock()
		<-w.called // soon: they are as many as have begun, and each turn is short
		return true
	}
	t.fresh = append(t.fresh, w)
	t.mu.Unlock()
	patience := time.NewTimer(freshPatience)
	defer patience.Stop()
	select {
	case <-w.called:
		return true
	case <-patience.C:
		return !t.forget(w)
	}
}

// forget takes w out, unless it was called.
func (t *turns) forget(w *waiter) (out bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-w.called:
	default:
		w.gone = true
	}
	return w.gone
}

// give hands a turn to who is next.
func (t *turns) give() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, queue := range []*[]*waiter{&t.begun, &t.fresh} {
		for len(*queue) > 0 {
			w := (*queue)[0]
			(*queue)[0], *queue = nil, (*queue)[1:]
			if !w.gone {
				close(w.called)
				return
			}
		}
	}
	t.free++
}

// inTurn is a connection on which a handshake takes its turns: whoever reads gives
// its own away until something has come.
type inTurn struct {
	net.Conn
	turns  *turns
	begun  bool // has had a turn
	holds  bool
	passed atomic.Bool // the handshake is over
}

// Read implements net.Conn.
func (c *inTurn) Read(b []byte) (int, error) {
	if c.passed.Load() {
		return c.Conn.Read(b)
	}
	c.yield()
	n, err := c.Conn.Read(b)
	if err != nil {
		return n, err
	}
	if !c.turns.take(c.begun) {
		return 0, errNoTurn
	}
	c.begun, c.holds = true, true
	return n, nil
}

func (c *inTurn) yield() {
	if c.holds {
		c.holds = false
		c.turns.give()
	}
}

// pass ends the handshake.
func (c *inTurn) pass() {
	c.yield()
	c.passed.Store(true)
}
