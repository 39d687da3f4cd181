// The process at the other end of a stream: the same program and user to the end,
// and what it may have now.

package local

import (
	"context"

	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/workload"
)

// caller is who opened a stream. It is for one goroutine. Close its sub.
type caller struct {
	callers *endpoint.Callers
	sub     *cache.Subscription
	first   *workload.Process
}

func (s *Server) follow() *caller {
	return &caller{callers: s.o.Callers, sub: s.cache.Subscribe()}
}

// attest looks at the process, which must be the one that opened the stream.
func (c *caller) attest(ctx context.Context) (*workload.Process, error) {
	p, err := c.callers.Attest(ctx)
	if err != nil {
		return nil, err
	}
	if c.first == nil {
		c.first = p
	}
	if !p.Same(c.first) {
		return nil, endpoint.Changed()
	}
	return p, nil
}

// awaitEntries holds the stream until there is an entry for the process, and ends
// it where there is certainly none.
func (c *caller) awaitEntries(ctx context.Context) error {
	for {
		p, err := c.attest(ctx)
		if err != nil {
			return err
		}
		view := c.sub.View(p.Proof(), false)
		switch {
		case len(view.Entries) > 0:
			return nil
		case view.Current:
			return endpoint.NoEntry(p.PID)
		}
		select {
		case <-c.sub.Woken():
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// withdrawn says whether there is certainly no entry for the process any more.
func (c *caller) withdrawn(ctx context.Context) (bool, error) {
	p, err := c.attest(ctx)
	if err != nil {
		return false, err
	}
	view := c.sub.View(p.Proof(), false)
	return len(view.Entries) == 0 && view.Current, nil
}
