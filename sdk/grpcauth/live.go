// Calls under way: they end when the policy does not allow them any more.

package grpcauth

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"google.golang.org/grpc"

	"merlon.dev/policy"
	"merlon.dev/sdk/internal/telemetry"
)

// liveCall is a call that the policy may end.
type liveCall struct {
	stop func() // stops watching
	cut  func() // ends the connection
	over chan struct{}

	mu  sync.Mutex
	err error // guarded by mu: why it was ended; closes over

	sending sync.RWMutex // held for reading while something is sent
}

// follow watches over a call. The context that it returns ends when the call is
// denied, with the denial as its cause.
func (s *server) follow(ctx context.Context, call decided) (context.Context, *liveCall) {
	ctx, cancel := context.WithCancelCause(ctx)
	live := &liveCall{over: make(chan struct{}), cut: func() { s.id.Cut(call.state, "the policy has ended a call that could not be ended alone") }}
	unfollow := s.id.Follow(call.in, call.decision, func(d policy.Decision) {
		err := denial(d)
		telemetry.OnSpan(ctx, d)
		live.mu.Lock()
		live.err = err
		live.mu.Unlock()
		close(live.over)
		cancel(err)
	})
	live.stop = func() {
		unfollow()
		cancel(nil)
	}
	return ctx, live
}

// denied is the error that ended the call; nil while it may go on.
func (l *liveCall) denied() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// sendTime is how long a message that is being sent when the call ends may take
// before the connection is cut: its peer does not read.
const sendTime = 500 * time.Millisecond

// run serves a stream in a goroutine of its own, because only the return from here
// ends a stream: one that waits for its peer would else stay open.
func (l *liveCall) run(stream grpc.ServerStream, serve func(grpc.ServerStream) error) error {
	type result struct {
		err      error
		panicked any
		stack    []byte
	}
	served := make(chan result, 1)
	go func() {
		var r result
		defer func() {
			if r.panicked = recover(); r.panicked != nil {
				r.stack = debug.Stack()
			}
			served <- r
		}()
		r.err = serve(stream)
	}()
	select {
	case r := <-served:
		if r.panicked != nil { // as if it had been called here
			panic(fmt.Sprintf("%v\n\n%s", r.panicked, r.stack))
		}
		if err := l.denied(); err != nil {
			return err
		}
		return r.err
	case <-l.over:
		patience := time.AfterFunc(sendTime, l.cut)
		l.sending.Lock() // nothing is sent any more: see decidedStream
		patience.Stop()
		l.sending.Unlock()
		return l.denied()
	}
}

// decidedStream carries peer and decision in its context, and sends nothing once
// the call is denied.
type decidedStream struct {
	grpc.ServerStream
	ctx  context.Context
	live *liveCall
}

// Context implements grpc.ServerStream.
func (s *decidedStream) Context() context.Context { return s.ctx }

// SendMsg implements grpc.ServerStream.
func (s *decidedStream) SendMsg(m any) error {
	s.live.sending.RLock()
	defer s.live.sending.RUnlock()
	if err := s.live.denied(); err != nil {
		return err
	}
	return s.ServerStream.SendMsg(m)
}

// RecvMsg implements grpc.ServerStream.
func (s *decidedStream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if denied := s.live.denied(); denied != nil {
		return denied
	}
	return err
}
