// A listener and what becomes of its connections: handshake, engine, end. What serves
// them can be replaced while it listens.

package sidecar

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"merlon.dev/sdk/sidecar/internal/hop"
	"merlon.dev/sdk/sidecar/internal/sock"
	"merlon.dev/sdk/unixsock"
)

// door accepts the connections of one address.
type door struct {
	address string // as configured
	lis     net.Listener
	log     *slog.Logger
	open    atomic.Int64 // connections
	lastLog atomic.Int64 // of a refusal, in seconds: whoever connects can cause a line
	serving atomic.Pointer[serving]
	ctx     context.Context // ends with close, and with Run
	close   context.CancelFunc
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

// run accepts until the door is closed.
func (d *door) run() {
	ctx := d.ctx
	stop := context.AfterFunc(ctx, func() { _ = d.lis.Close() }) // Accept ends, which is all that is wanted
	defer stop()
	pause := firstPause
	for {
		conn, err := d.lis.Accept()
		if err == nil {
			pause = firstPause
			d.begin(sock.New(conn))
			continue
		}
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		d.log.LogAttrs(ctx, slog.LevelWarn, "connections are not accepted", slog.String("listener", d.address), slog.Any("err", err))
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, maxPause)
	}
}

// begin hands a connection to what serves at the moment; after the end nothing does.
func (d *door) begin(conn net.Conn) {
	over := func() { d.open.Add(-1) }
	n := d.open.Add(1)
	for {
		now := d.serving.Load()
		if n > int64(now.hop.Limits.Connections) {
			d.refuse(now.hop, conn)
			over()
			return
		}
		if now.begin(conn, over) {
			return
		}
		if d.serving.Load() == now { // it was not replaced, it is over
			_ = conn.Close() // nobody serves it
			over()
			return
		}
	}
}

// refuse ends a connection too many by a reset, so that the caller learns at once that
// he has to go elsewhere: any other answer would cost the handshake that there is no
// room for.
func (d *door) refuse(h *hop.Hop, conn net.Conn) {
	h.Count(hop.ListenerFull)
	if now := time.Now().Unix(); d.lastLog.Swap(now) != now {
		d.log.LogAttrs(d.ctx, slog.LevelWarn, "connections are refused: there are as many as max_connections",
			slog.String("listener", d.address), slog.Int("max_connections", h.Limits.Connections))
	}
	reset(conn)
}

// reset ends a connection so that the other end learns that nobody has taken it.
func reset(conn net.Conn) {
	if tcp, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		_ = tcp.SetLinger(0) // it is closed all the same
	}
	_ = conn.Close()
}

// serving is a hop and the connections on it.
type serving struct {
	hop    *hop.Hop
	engine hop.Engine
	alpn   []string
	ctx    context.Context // ends with retire
	cancel context.CancelFunc

	mu      sync.Mutex // guards the rest, and that none begins once retired
	retired bool
	conns   map[net.Conn]struct{}
	going   sync.WaitGroup
}

func newServing(h *hop.Hop, e engine) *serving {
	s := &serving{hop: h, engine: e.make(h), alpn: e.alpn, conns: make(map[net.Conn]struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// begin takes a connection, unless s has been replaced. over is called at its end.
func (s *serving) begin(conn net.Conn, over func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired {
		return false
	}
	s.conns[conn] = struct{}{}
	s.going.Go(func() { s.greet(conn, over) })
	return true
}

// greet does the handshake of an inbound connection.
func (s *serving) greet(conn net.Conn, over func()) {
	if s.hop.Direction == hop.Outbound {
		s.serve(conn, conn, over)
		return
	}
	// Not s.ctx: who has begun may finish, and a handshake is bounded anyway.
	secured, err := s.hop.Identity.ServerHandshake(context.Background(), conn, s.alpn...)
	if err != nil { // closed and logged where the peer was refused
		s.release(conn, over)
		return
	}
	// On a goroutine of its own: a handshake leaves a large stack behind, which the
	// connection would keep.
	s.going.Go(func() { s.serve(conn, secured, over) })
}

// serve serves a connection to its end.
func (s *serving) serve(raw, conn net.Conn, over func()) {
	defer s.release(raw, over)
	s.engine.Serve(s.ctx, conn)
}

func (s *serving) release(conn net.Conn, over func()) {
	s.mu.Lock()
	delete(s.conns, conn)
	s.mu.Unlock()
	over()
}

func (s *serving) connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// retire lets requests under way finish, closes what is left after drain, and returns
// when nothing is.
func (s *serving) retire(drain time.Duration) {
	s.mu.Lock()
	s.retired = true
	s.mu.Unlock()
	s.cancel()
	deadline := time.AfterFunc(drain, s.closeAll)
	defer deadline.Stop()
	s.going.Wait()
	s.engine.Close()
}

// closeAll ends every connection, whatever it is at.
func (s *serving) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn := range s.conns {
		_ = conn.Close() // its engine sees to the rest
	}
}
