// The table of live connections, on which revocation, expiry and the loss of
// trust act. TLS checks a peer once; a connection then lives as long as both
// ends like, and no TLS stack closes it when the certificate ends. Here one
// goroutine per identity does, for all connections.

package sdk

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"merlon.dev/sdk/svid"
)

const (
	// sweepInterval is how often entries of connections that somebody else
	// closed are removed.
	sweepInterval = 10 * time.Second
	// A connection drains from a quarter of its life on, as gRPC's do: peers come back
	// anew while there is time, and not all of them at once (jitter, either way).
	drainAfter  = 0.25
	drainJitter = 0.1
	// drainRound is how far apart looks are at connections that begin to drain.
	drainRound = 250 * time.Millisecond
)

// closedByOwner is the reason of the cuts that Close makes.
const closedByOwner = "the identity was closed"

// connKey tells connections apart. TLS states of one connection share the
// backing array of PeerCertificates, and no two connections do (the
// certificates themselves are shared: crypto/tls keeps one copy of each).
type connKey = **x509.Certificate

// liveConn is one connection whose peer was verified.
type liveConn struct {
	raw  net.Conn // below TLS; nil: cannot be cut from here
	peer *svid.Peer
	// remote and local are the addresses of both ends, as calls tell them.
	remote, local string
	end           time.Time // when it is cut at the latest, by the wall clock
	last          time.Time // the same by the clock that only runs, which nobody sets back
	authorities   []string  // that vouch for what this side has presented; as in svid.Peer
	trust         uint64    // the generation of trust bundles by which the peer was verified
	cut           atomic.Bool
	cleared       atomic.Pointer[svid.Revocations] // the last set that does not concern peer
	// drain is from when on the peer is asked to come back anew, by the steady clock in
	// Unix nanoseconds, and onDrain who is told of it on this side; nil: nobody, any more.
	drain   atomic.Int64
	onDrain atomic.Pointer[func()]
}

// drainsIn is when c begins to drain, from now on; it is not positive once it does.
func (c *liveConn) drainsIn(now time.Time) time.Duration {
	return time.Duration(c.drain.Load() - steady(now).UnixNano())
}

// drainBy has c begin to drain at a time, if not before.
func (c *liveConn) drainBy(at time.Time) {
	for at := steady(at).UnixNano(); ; {
		if before := c.drain.Load(); before <= at || c.drain.CompareAndSwap(before, at) {
			return
		}
	}
}

// connTable is safe for concurrent use. Looking up takes no lock.
type connTable struct {
	log   *slog.Logger
	conns sync.Map // connKey → *liveConn
	size  atomic.Int64
	next  atomic.Int64  // UnixNano of the planned sweep
	poke  chan struct{} // a connection ends before the planned sweep
	blind sync.Once     // warn once about connections that hide their end

	telling sync.WaitGroup // those who are told that a connection drains
}

func newConnTable(log *slog.Logger) *connTable {
	return &connTable{log: log, poke: make(chan struct{}, 1)}
}

// add enters a connection that ends at end.
func (t *connTable) add(key connKey, c *liveConn, now time.Time) {
	c.last = now.Add(c.end.Sub(now))
	share := drainAfter * (1 + drainJitter*(2*rand.Float64()-1)) //nolint:gosec // no secret
	c.drain.Store(steady(now.Add(time.Duration(share * float64(c.end.Sub(now))))).UnixNano())
	if _, loaded := t.conns.Swap(key, c); !loaded {
		t.size.Add(1)
	}
	if c.raw != nil && !observable(c.raw) {
		t.blind.Do(func() {
			t.log.LogAttrs(context.Background(), slog.LevelWarn, "connections of this type hide when they are closed, so they stay in the table until they expire: use Identity.Listener",
				slog.String("type", fmt.Sprintf("%T", c.raw)))
		})
	}
	t.lookBy(c.end)
}

// lookBy has the table swept at a time, if not before.
func (t *connTable) lookBy(at time.Time) {
	if at.UnixNano() < t.next.Load() {
		select {
		case t.poke <- struct{}{}:
		default:
		}
	}
}

// remove forgets a connection that its owner closed.
func (t *connTable) remove(key connKey) {
	if _, loaded := t.conns.LoadAndDelete(key); loaded {
		t.size.Add(-1)
	}
}

// find gives the live connection that a TLS state belongs to, nil for none.
func (t *connTable) find(cs *tls.ConnectionState) (c *liveConn, key connKey) {
	if cs == nil || !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return nil, nil
	}
	key = &cs.PeerCertificates[0]
	return t.at(key), key
}

// at gives the live connection of this key; nil for none.
func (t *connTable) at(key connKey) *liveConn {
	v, ok := t.conns.Load(key)
	if !ok {
		return nil
	}
	c := v.(*liveConn)
	if c.cut.Load() {
		return nil
	}
	return c
}

// cutWhere cuts every connection for which why gives a reason, and returns
// their number.
func (t *connTable) cutWhere(why func(*liveConn) (reason string)) (n int) {
	t.conns.Range(func(key, v any) bool {
		c := v.(*liveConn)
		if reason := why(c); reason != "" {
			t.cut(key.(connKey), c, reason)
			n++
		}
		return true
	})
	return n
}

// drainWhere has connections begin to drain at the time that when gives, if not before.
func (t *connTable) drainWhere(now time.Time, when func(*liveConn) (time.Time, bool)) {
	some := false
	t.conns.Range(func(_, v any) bool {
		c := v.(*liveConn)
		if at, ok := when(c); ok {
			c.drainBy(at)
			some = true
		}
		return true
	})
	if some {
		t.lookBy(now)
	}
}

// cut ends a connection at once: nothing that is still buffered is sent.
func (t *connTable) cut(key connKey, c *liveConn, reason string) {
	t.remove(key)
	if c.cut.Swap(true) || c.raw == nil {
		return
	}
	hangUp(c.raw)
	level := slog.LevelInfo
	if reason == closedByOwner {
		level = slog.LevelDebug // what the program asked for is no news
	}
	t.log.LogAttrs(context.Background(), level, "connection cut",
		slog.String("reason", reason),
		slog.String("spiffe_id", c.peer.ID.String()),
		slog.String("serial", c.peer.SerialHex),
		slog.String("remote", addrString(c.raw.RemoteAddr())))
}

// hangUp closes with a reset where the transport knows one, so that bytes in
// the kernel's buffer do not reach a peer that has lost its right to them.
func hangUp(conn net.Conn) {
	if tracked, ok := conn.(*trackedConn); ok {
		conn = tracked.Conn
	}
	if l, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		_ = l.SetLinger(0) // closing still works
	}
	_ = conn.Close() // it may be closed already
}

// run sweeps until done closes, and then cuts what is left.
func (t *connTable) run(done <-chan struct{}) {
	timer := time.NewTimer(sweepInterval)
	defer timer.Stop()
	t.next.Store(time.Now().Add(sweepInterval).UnixNano())
	for {
		select {
		case <-done:
			t.cutWhere(func(*liveConn) string { return closedByOwner })
			t.telling.Wait()
			return
		case <-t.poke:
		case <-timer.C:
		}
		timer.Reset(t.sweep(time.Now()))
	}
}

// sweep cuts what has expired, forgets what is closed, tells of what drains, and says
// how long the next sweep may wait.
func (t *connTable) sweep(now time.Time) time.Duration {
	// Published first: a connection that is added meanwhile pokes if it ends
	// earlier than planned, and else is seen by the next sweep.
	next := now.Add(sweepInterval)
	t.next.Store(next.UnixNano())
	t.conns.Range(func(key, v any) bool {
		c := v.(*liveConn)
		left := min(c.end.Sub(now), c.last.Sub(now))
		switch {
		case left <= 0:
			t.cut(key.(connKey), c, "an X509-SVID of the connection has expired")
		case c.raw != nil && closed(c.raw):
			t.remove(key.(connKey))
		default:
			left = min(left, t.tell(c, now))
			if left < next.Sub(now) {
				next = now.Add(left)
			}
		}
		return true
	})
	t.next.Store(next.UnixNano())
	return next.Sub(now)
}

// tell tells whom it concerns that c drains, or says how long that can wait.
func (t *connTable) tell(c *liveConn, now time.Time) time.Duration {
	switch {
	case c.onDrain.Load() == nil:
		return sweepInterval
	case c.drainsIn(now) > 0:
		return max(c.drainsIn(now), drainRound)
	}
	if f := c.onDrain.Swap(nil); f != nil {
		t.telling.Go(*f)
	}
	return sweepInterval
}

// observable says whether closed can tell.
func observable(conn net.Conn) bool {
	switch conn.(type) {
	case *trackedConn, syscall.Conn:
		return true
	}
	return false
}

// closed says whether the owner has closed conn, without touching the socket.
func closed(conn net.Conn) bool {
	if tracked, ok := conn.(*trackedConn); ok {
		return tracked.closed.Load()
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err == nil {
		err = raw.Control(func(uintptr) {})
	}
	return errors.Is(err, net.ErrClosed)
}

// trackedConn leaves the table the moment it is closed, and limits the time
// that its handshake may take.
type trackedConn struct {
	net.Conn
	table  *connTable
	key    atomic.Pointer[*x509.Certificate] // set once the peer is verified
	closed atomic.Bool

	limit     *time.Timer
	handshake atomic.Pointer[context.Context] // ends with the handshake; nil: no hello yet
}

// track wraps conn. A handshake that is not done after svid.HandshakeTimeout
// ends with the connection.
func (t *connTable) track(conn net.Conn) *trackedConn {
	c := &trackedConn{Conn: conn, table: t}
	c.limit = time.AfterFunc(svid.HandshakeTimeout, func() {
		if ctx := c.handshake.Load(); ctx == nil || (*ctx).Err() == nil {
			hangUp(conn)
		}
	})
	return c
}

// over is the context of every handshake that is done.
var over = func() *context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return &ctx
}()

// shaken is after the handshake, whose own context holds more than it is worth.
func (c *trackedConn) shaken() {
	c.handshake.Store(over)
	c.limit.Stop()
}

// Close implements net.Conn.
func (c *trackedConn) Close() error {
	c.closed.Store(true) // before the key is read: see enter
	c.limit.Stop()
	if key := c.key.Load(); key != nil {
		c.table.remove(key)
	}
	return c.Conn.Close()
}

// NetConn gives the connection below, as tls.Conn's does.
func (c *trackedConn) NetConn() net.Conn { return c.Conn }

func addrString(a net.Addr) string {
	if a == nil {
		return ""
	}
	return a.String()
}
