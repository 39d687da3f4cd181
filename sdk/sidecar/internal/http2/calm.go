// Floods: frames that cost us something and bring the sender nothing. Each has its
// place in the protocol, so what is bounded is how many of them come beside those that
// are of use.

package http2

import "sync/atomic"

const (
	// patience is how many idle frames a connection may send in a row.
	patience = 1000
	// calmPerSecond is how much of both bounds comes back each second.
	calmPerSecond = 100
	// resetPatience is how many requests may be cancelled that were not answered,
	// beyond those that were answered.
	resetPatience = 500
)

// calm is what is left of one connection's bounds. It is safe for concurrent use.
type calm struct{ frames, resets atomic.Int32 }

func (c *calm) start() {
	c.frames.Store(patience)
	c.resets.Store(resetPatience)
}

// idle counts a frame that costs; it says whether that was too much.
func (c *calm) idle(cost int32) (flood bool) { return c.frames.Add(-cost) < 0 }

// useful counts a frame of a body: acknowledgements and probes go with those.
func (c *calm) useful() { give(&c.frames, 3, patience) }

// cancelled counts a request that was reset before it was answered, or was none.
func (c *calm) cancelled() (flood bool) { return c.resets.Add(-1) < 0 }

// answered counts a request that was not.
func (c *calm) answered() {
	c.useful()
	give(&c.resets, 1, resetPatience)
}

// tick is once a second.
func (c *calm) tick() {
	give(&c.frames, calmPerSecond, patience)
	give(&c.resets, calmPerSecond, resetPatience)
}

// give adds n up to about limit.
func give(to *atomic.Int32, n, limit int32) {
	if to.Load() < limit {
		to.Add(n)
	}
}
