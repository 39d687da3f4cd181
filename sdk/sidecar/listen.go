// A listener and what becomes of its connections: handshake, engine, end.

package sidecar

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"merlon.dev/sdk/sidecar/internal/hop"
	"merlon.dev/sdk/unixsock"
)

// door accepts the connections of one hop.
type door struct {
	hop    *hop.Hop
	engine hop.Engine
	alpn   []string
	lis    net.Listener
	log    *slog.Logger
	slots  chan struct{}

	mu    sync.Mutex // guards conns
	conns map[net.Conn]struct{}
	going sync.WaitGroup // connections
}

func newDoor(h *hop.Hop, e engine, lis net.Listener, maxConnections int, log *slog.Logger) *door {
	return &door{
		hop: h, engine: e.make(h), alpn: e.alpn, lis: lis, log: log,
		slots: make(chan struct{}, maxConnections), conns: make(map[net.Conn]struct{}),
	}
}

// listenOn opens address, host:port or unix:///path.
func listenOn(ctx context.Context, address string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		return unixsock.Listen(path, unixsock.Private)
	}
	var cfg net.ListenConfig
	return cfg.Listen(ctx, "tcp", address)
}

// Accepting goes on after errors that pass, such as too many open files, at these
// intervals.
const (
	firstPause = 5 * time.Millisecond
	maxPause   = time.Second
)

// run accepts until ctx ends or the listener is closed, and returns when no
// connection is left; those that are, after drain, it closes.
func (d *door) run(ctx context.Context, drain time.Duration) {
	stop := context.AfterFunc(ctx, func() { _ = d.lis.Close() }) // Accept ends, which is all that is wanted
	defer stop()
	d.accept(ctx)
	deadline := time.AfterFunc(drain, d.closeAll)
	defer deadline.Stop()
	d.going.Wait()
	d.engine.Close()
}

func (d *door) accept(ctx context.Context) {
	pause := firstPause
	for {
		select {
		case d.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		conn, err := d.lis.Accept()
		if err == nil {
			pause = firstPause
			d.hold(conn)
			d.going.Go(func() { d.greet(ctx, conn) })
			continue
		}
		<-d.slots
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		d.log.LogAttrs(ctx, slog.LevelWarn, "connections are not accepted", slog.String("listener", d.hop.Name), slog.Any("err", err))
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, maxPause)
	}
}

// greet does the handshake of an inbound connection.
func (d *door) greet(ctx context.Context, conn net.Conn) {
	if d.hop.Direction == hop.Outbound {
		d.serve(ctx, conn, conn)
		return
	}
	// Not ctx itself: who has begun may finish, and a handshake is bounded anyway.
	secured, err := d.hop.Identity.ServerHandshake(context.WithoutCancel(ctx), conn, d.alpn...)
	if err != nil { // closed and logged where the peer was refused
		d.release(conn)
		return
	}
	// On a goroutine of its own: a handshake leaves a large stack behind, which the
	// connection would keep.
	d.going.Go(func() { d.serve(ctx, conn, secured) })
}

// serve serves a connection to its end.
func (d *door) serve(ctx context.Context, raw, conn net.Conn) {
	defer d.release(raw)
	d.engine.Serve(ctx, conn)
}

func (d *door) hold(conn net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns[conn] = struct{}{}
}

func (d *door) release(conn net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns, conn)
	<-d.slots
}

// closeAll ends every connection, whatever it is at.
func (d *door) closeAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for conn := range d.conns {
		_ = conn.Close() // its engine sees to the rest
	}
}
