// Streams under way: they end when the policy does not allow them any more.

package grpcauth

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/sdk"
)

// liveStream is a stream that the policy may end.
type liveStream struct {
	call    *sdk.Call
	over    chan struct{} // closes when the policy has ended the call
	sending sync.RWMutex  // held for reading while something is sent
}

// denied is the error that ended the stream; nil while it may go on.
func (l *liveStream) denied() error {
	if d, ended := l.call.Denied(); ended {
		return denial(d)
	}
	return nil
}

// cut ends the connection.
func (l *liveStream) cut() { l.call.Cut("the policy has ended a call that could not be ended alone") }

// sendTime is how long a message that is being sent when the call ends may take
// before the connection is cut: its peer does not read.
const sendTime = 500 * time.Millisecond

// run serves a stream in a goroutine of its own, because only the return from here
// ends a stream: one that waits for its peer would else stay open.
func (l *liveStream) run(stream grpc.ServerStream, serve func(grpc.ServerStream) error) error {
	type result struct {
		err      error
		panicked any
		stack    []byte
	}
	served := make(chan result, 1)
	go func() {
		// What the client is told if the handler ends its goroutine: runtime.Goexit is
		// not the end of a whole answer.
		r := result{err: status.Error(codes.Internal, "the handler ended without returning")}
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
	live *liveStream
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
