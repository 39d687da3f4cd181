// Package http2 carries HTTP/2 and gRPC through the sidecar frame by frame. A request
// is read as far as its header fields, which the policy decides about and which are
// encoded anew for the other side; bodies and gRPC messages are bytes that are passed
// on as flow control allows, and are never decoded.
//
// A connection has one goroutine, which reads. What it reads it writes into buffers of
// the connections on the other side, and before it waits for more, those are sent: by
// a goroutine that lives as long as there is something to send, so that nobody who
// reads slowly holds up anybody else. A request has no goroutine at all, unless it has
// to wait for the agent's decision or for a connection to an upstream.
package http2

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// New is the engine of protocols http and grpc where the app speaks HTTP/2.
func New(h *hop.Hop) hop.Engine {
	e := &engine{hop: h, pools: make(map[*hop.Upstream]*pool), conns: make(map[*conn]struct{}), done: make(chan struct{})}
	e.life, e.cancel = context.WithCancel(context.Background())
	for _, u := range h.Upstreams.All() {
		e.pools[u] = &pool{eng: e, upstream: u}
	}
	e.clock.Store(time.Now().Unix())
	e.goroutines.Go(e.keep)
	return e
}

// engine is one hop's HTTP/2.
type engine struct {
	hop   *hop.Hop
	pools map[*hop.Upstream]*pool // never changes
	clock atomic.Int64            // Unix time as of the keeper's last round

	life       context.Context // of connections to upstreams, and of what waits for one
	cancel     context.CancelFunc
	done       chan struct{}
	goroutines sync.WaitGroup

	mu    sync.Mutex
	conns map[*conn]struct{} // guarded by mu: those of both sides
}

// Serve implements hop.Engine.
func (e *engine) Serve(ctx context.Context, nc net.Conn) {
	c := e.newConn(nc, nil)
	c.caller = e.hop.CallerOf(nc)
	stop := context.AfterFunc(ctx, func() { c.drain() })
	defer stop()
	c.serve()
}

// Close implements hop.Engine.
func (e *engine) Close() {
	e.cancel()
	for _, p := range e.pools {
		p.close()
	}
	for _, c := range e.all() {
		c.hangUp()
	}
	close(e.done)
	e.goroutines.Wait()
}

func (e *engine) add(c *conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.conns[c] = struct{}{}
}

func (e *engine) remove(c *conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.conns, c)
}

func (e *engine) all() []*conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]*conn, 0, len(e.conns))
	for c := range e.conns {
		all = append(all, c)
	}
	return all
}
