// Connections that hang on a tainted authority. It is about to leave the trust bundle,
// and what hangs on it then is cut; so they run out before, in order, once a new
// connection would not hang on it.

package sdk

import (
	"crypto/tls"
	"math/rand/v2"
	"slices"
	"time"
)

const (
	// drainWithin is over how long connections run out that can be had better. The CA
	// leaves an authority trusted for longer than that after the last agent has replaced
	// what it signed (ca/internal/rotation).
	drainWithin = 3 * time.Second
	// A connection to a peer that still shows what a tainted authority has signed runs
	// out in turn, the later the longer the authority has been tainted.
	rarest = 5 * time.Minute
)

// taint is the authorities that are tainted; nil is none. It is immutable.
type taint struct {
	ids   []string
	since time.Time // when the latest of them was
}

// names says whether any of the authorities, by ID, is tainted.
func (t *taint) names(authorities []string) bool {
	return slices.ContainsFunc(authorities, func(id string) bool { return slices.Contains(t.ids, id) })
}

// noteTaint takes in which authorities are tainted.
func (id *Identity) noteTaint(ids []string) {
	before := id.tainted.Load()
	if len(ids) == 0 {
		id.tainted.Store(nil)
	} else if before == nil || !slices.Equal(ids, before.ids) {
		id.tainted.Store(&taint{ids, time.Now()})
		id.drainTainted()
	}
}

// drainTainted has the connections run out that hang on a tainted authority, for the
// X509-SVID or the taint of now is another than before.
func (id *Identity) drainTainted() {
	t, own := id.tainted.Load(), id.current.Load()
	if t == nil {
		return
	}
	now := time.Now()
	id.conns.drainWhere(now, func(c *liveConn) (time.Time, bool) {
		return now.Add(rand.N(drainWithin)), t.concerns(c, own) //nolint:gosec // no secret
	})
}

// drainIfTainted plans the end of a connection that is new, and hangs on a tainted
// authority all the same.
func (id *Identity) drainIfTainted(c *liveConn, now time.Time) {
	t := id.tainted.Load()
	if t.concerns(c, id.current.Load()) {
		half := min(max(drainWithin, now.Sub(t.since)), rarest) / 2
		c.drainBy(now.Add(half + rand.N(half))) //nolint:gosec // no secret
	}
}

// concerns says whether c hangs on a tainted authority, and a new connection would not:
// one that this side makes with own, at least.
func (t *taint) concerns(c *liveConn, own *current) bool {
	return t != nil && !t.names(own.authorities) && (t.names(c.peer.AuthorityIDs) || t.names(c.authorities))
}

// Draining says whether the connection is near its end, so that the peer
// should be asked to come back on a new one.
func (id *Identity) Draining(cs *tls.ConnectionState) bool {
	now := time.Now()
	if cs == nil && id.audit.letsPlaintext(now) {
		return false
	}
	c, _ := id.conns.find(cs)
	return c == nil || c.drainsIn(now) <= 0
}

// OnDrain has f called, once, when the connection with TLS state cs should be used for
// nothing new any more: a pool then makes another one, long before this one is cut.
// f runs on a goroutine of its own, and must not call Close; it is never called for a
// connection that ends before.
func (id *Identity) OnDrain(cs *tls.ConnectionState, f func()) {
	if c, _ := id.conns.find(cs); c != nil {
		c.onDrain.Store(&f)
		now := time.Now()
		id.conns.lookBy(now.Add(c.drainsIn(now)))
	}
}
