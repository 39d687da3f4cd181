// How long what is held lasts, if nothing new came.

package cache

import (
	"slices"
	"time"
)

// Outlook is what ends when.
type Outlook struct {
	// X509 are the X509-SVIDs that are served, or kept for who asks; First and
	// Median the ends of two of them, zero where there is none.
	X509          int
	First, Median time.Time
	// JWTs are the JWT-SVIDs that are kept.
	JWTs              int
	FirstJWT, LastJWT time.Time
	// Waiting are the IDs of entries of which a workload waits for an SVID.
	Waiting []string
}

// Outlook looks at everything that is held.
func (c *Cache) Outlook() Outlook {
	now := time.Now()
	ends, waiting := c.ends(now)
	slices.SortFunc(ends, time.Time.Compare)
	slices.Sort(waiting)
	waiting = slices.Compact(waiting)
	o := Outlook{X509: len(ends), Waiting: waiting}
	if len(ends) > 0 {
		o.First, o.Median = ends[0], ends[(len(ends)-1)/2]
	}
	for _, end := range c.jwts.ends(now) {
		o.JWTs++
		if o.FirstJWT.IsZero() || end.Before(o.FirstJWT) {
			o.FirstJWT = end
		}
		if end.After(o.LastJWT) {
			o.LastJWT = end
		}
	}
	return o
}

func (c *Cache) ends(now time.Time) (ends []time.Time, waiting []string) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for _, sl := range c.slots {
		switch {
		case sl.svid != nil && now.Before(sl.svid.Peer.NotAfter):
			ends = append(ends, sl.svid.Peer.NotAfter)
		case len(sl.users) > 0:
			waiting = append(waiting, sl.entry.ID)
		}
	}
	for _, kept := range c.kept {
		if now.Before(kept.NotAfter) {
			ends = append(ends, kept.NotAfter)
		}
	}
	return ends, waiting
}

// ends are those of the tokens that hold.
func (t *tokens) ends(now time.Time) (ends []time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for el := t.order.Front(); el != nil; el = el.Next() {
		if held := el.Value.(*token); now.Before(held.notAfter) {
			ends = append(ends, held.notAfter)
		}
	}
	return ends
}
