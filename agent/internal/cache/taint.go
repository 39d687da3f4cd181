// Tainted authorities: what they signed is replaced while it still holds, spread
// over a while, so that nobody is without an SVID when their keys leave the trust
// bundle.

package cache

import (
	mathrand "math/rand/v2"
	"time"
)

// againSpread is over how long a replacement is put off that was signed by a
// tainted authority, too: the replica has no other yet.
const againSpread = 10 * time.Second

// Within is a moment at random in the next spread.
func Within(now time.Time, spread time.Duration) time.Time {
	if spread <= 0 {
		return now.Round(0)
	}
	return now.Add(mathrand.N(spread)).Round(0) //nolint:gosec // jitter
}

// replaceTainted plans the replacement of what t taints. c.mu is held.
func (c *Cache) replaceTainted(t *Trust) {
	if len(t.Tainted) == 0 {
		return
	}
	now := time.Now()
	for _, sl := range c.slots {
		if sl.svid == nil || !t.Taints(sl.svid.Peer.AuthorityIDs) {
			continue
		}
		if len(sl.users) == 0 {
			sl.withdraw() // the next who asks gets another
		} else {
			sl.svid = sl.svid.renewedBy(Within(now, t.RenewSpread))
		}
		c.turn(sl)
	}
}

// renewedBy returns a copy that is renewed at t, if not before.
func (s *SVID) renewedBy(t time.Time) *SVID {
	if s.renewAt.Before(t) {
		return s
	}
	sooner := *s
	sooner.renewAt = t
	return &sooner
}

// hurry plans the replacement of what has just been made, if a tainted
// authority signed it all the same. c.mu is held.
func (c *Cache) hurry(made *SVID) *SVID {
	t := c.trust.Load()
	if !t.Taints(made.Peer.AuthorityIDs) {
		return made
	}
	return made.renewedBy(Within(time.Now().Add(againSpread/2), max(againSpread/2, t.RenewSpread)))
}

// servesTainted says whether anything is held that t taints. c.mu is held, or
// held shared.
func (c *Cache) servesTainted(t *Trust) bool {
	if len(t.Tainted) == 0 {
		return false
	}
	for _, sl := range c.slots {
		if sl.svid != nil && t.Taints(sl.svid.Peer.AuthorityIDs) {
			return true
		}
	}
	return false
}
