// Package relay serves connections of which nothing but their ends is known: the
// policy is asked once, about the connection, and from then on bytes go both ways
// until either end closes, the policy changes its mind, or the peer is revoked.
package relay

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// New is the engine of protocol tcp.
func New(h *hop.Hop) hop.Engine { return &engine{h} }

type engine struct{ hop *hop.Hop }

// Close implements hop.Engine. Nothing is kept.
func (e *engine) Close() {}

// Serve implements hop.Engine. A connection has no request that could be finished
// first: when ctx ends, it goes on until the door closes it.
func (e *engine) Serve(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	caller := e.hop.CallerOf(conn)
	entry := hop.Entry{Begun: time.Now(), Source: caller.ID, Remote: caller.Remote}
	defer func() {
		entry.Took = time.Since(entry.Begun)
		e.hop.Record(&entry)
	}()
	in := &policy.Input{Protocol: policy.TCP, SourceAddress: caller.Remote, DestinationAddress: caller.Local}
	var decision policy.Decision
	if e.hop.Direction == hop.Inbound {
		_, decision = e.hop.Identity.Decide(ctx, caller.State, in)
		entry.Reason, entry.DecisionID = decision.Reason, decision.DecisionID
		if entry.Denied = !decision.Allow; entry.Denied {
			return // the peer learns no more than that
		}
	}
	var tries hop.Tries
	upstream, far, err := e.connect(context.WithoutCancel(ctx), &tries)
	entry.Retries = tries.More()
	if err != nil {
		entry.Failed, entry.Failure, entry.Err = true, hop.Unconnected(err), err.Error()
		abort(conn)
		return
	}
	entry.Upstream = upstream.Address
	defer upstream.Done(false)
	defer upstream.Disconnected()
	defer far.Close()
	if e.hop.Direction == hop.Inbound {
		stop := e.hop.Identity.Follow(in, decision, func(d policy.Decision) {
			e.hop.Identity.Cut(caller.State, "the policy does not allow the connection any more")
			_ = far.Close() // the other end is what counts
		})
		defer stop()
	}
	Splice(conn, far, e.hop.Limits.QuietTimeout, &entry)
}

// abort ends a connection so that the other end learns that it leads nowhere.
func abort(conn net.Conn) {
	for {
		outer, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = outer.NetConn()
	}
	if tcp, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		_ = tcp.SetLinger(0) // it is closed all the same
	}
	_ = conn.Close()
}

// connect tries one upstream after the other, as far as the budget allows.
func (e *engine) connect(ctx context.Context, tries *hop.Tries) (u *hop.Upstream, far net.Conn, err error) {
	defer e.hop.Settle(tries) // connected or not, that is the outcome
	var tried []*hop.Upstream
	for {
		next, none := e.hop.Upstreams.Pick(tried...)
		if none != nil {
			return nil, nil, cmp.Or(err, none)
		}
		if far, err = next.Connect(ctx, e.hop.Limits.HandshakeTimeout); err == nil {
			return next, far, nil
		}
		full := errors.Is(err, hop.ErrUpstreamFull)
		next.Done(!full)
		tried = append(tried, next)
		if len(tried) == len(e.hop.Upstreams.All()) || !full && !e.hop.Again(tries) {
			return nil, nil, err
		}
	}
}

// Splice carries bytes between near and far until both directions have ended, or
// nothing has moved for stall (0: however long). An end of file goes on as one, so
// that a peer which has sent everything still gets its answer. Both connections
// have to be closed after it.
func Splice(near, far net.Conn, stall time.Duration, entry *hop.Entry) {
	s := &splice{near: near, far: far, stall: stall}
	s.moved.Store(time.Now().UnixNano())
	var back sync.WaitGroup
	var backErr error
	back.Go(func() { entry.BytesOut, backErr = s.carry(near, far) })
	n, err := s.carry(far, near)
	entry.BytesIn = n
	back.Wait()
	for _, err := range []error{err, backErr} {
		if err != nil && entry.Err == "" {
			entry.Failed, entry.Err = true, err.Error()
		}
	}
}

type splice struct {
	near, far net.Conn
	stall     time.Duration
	moved     atomic.Int64 // when a byte last did, either way
}

// carry moves one direction. An error ends both: half of a conversation is of no
// use to anybody.
func (s *splice) carry(to, from net.Conn) (n int64, err error) {
	defer func() {
		if err != nil {
			_ = s.near.Close() // the error is what counts
			_ = s.far.Close()
			return
		}
		if c, ok := to.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite() // a peer that has gone needs no end of file
		}
	}()
	var small [smallBytes]byte
	for {
		got, err := s.read(from, small[:])
		if got > 0 {
			n += int64(got)
			if err := s.write(to, small[:got]); err != nil {
				return n, err
			}
		}
		if err == nil && got == len(small) {
			var more int64
			more, err = s.bulk(to, from)
			n += more
		}
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

const (
	// smallBytes is what a direction holds while nothing moves; most messages of a
	// conversation fit.
	smallBytes = 2 << 10
	largeBytes = 32 << 10
)

var large = sync.Pool{New: func() any { return new([largeBytes]byte) }}

// bulk carries with a large buffer as long as there is much.
func (s *splice) bulk(to, from net.Conn) (n int64, err error) {
	buf := large.Get().(*[largeBytes]byte)
	defer large.Put(buf)
	for {
		got, err := s.read(from, buf[:])
		if got > 0 {
			n += int64(got)
			if err := s.write(to, buf[:got]); err != nil {
				return n, err
			}
		}
		if err != nil || got < smallBytes {
			return n, err
		}
	}
}

// read reads from one side, as long as the conversation has not stalled.
func (s *splice) read(from net.Conn, buf []byte) (int, error) {
	for {
		if s.stall > 0 {
			if err := from.SetReadDeadline(time.Now().Add(s.stall)); err != nil {
				return 0, err
			}
		}
		n, err := from.Read(buf)
		if n > 0 {
			if s.stall > 0 {
				s.moved.Store(time.Now().UnixNano())
			}
			return n, err
		}
		if s.stall > 0 && errors.Is(err, os.ErrDeadlineExceeded) && time.Since(time.Unix(0, s.moved.Load())) < s.stall {
			continue // the other direction is not idle
		}
		return n, err
	}
}

// write writes to one side, which has to take it before the conversation counts as
// stalled.
func (s *splice) write(to net.Conn, buf []byte) error {
	if s.stall > 0 {
		if err := to.SetWriteDeadline(time.Now().Add(s.stall)); err != nil {
			return err
		}
	}
	_, err := to.Write(buf)
	return err
}
