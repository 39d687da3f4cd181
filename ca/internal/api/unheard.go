// Refusals that no RPC sees: a request that is too large or no message at all, and
// the calls of somebody who has too many open. They are refused below the door;
// here they get their record.

package api

import (
	"context"
	"fmt"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/internal/audit"
)

// watcher sees what gRPC does below the door: calls that end before it has judged
// them, and answers that are on their way. It implements stats.Handler.
type watcher struct{ *Service }

type attempt struct {
	method string
	judged atomic.Bool
}

type attemptKey struct{}

// judged notes that the call of ctx has reached the door.
func judged(ctx context.Context) {
	if a, ok := ctx.Value(attemptKey{}).(*attempt); ok {
		a.judged.Store(true)
	}
}

// TagRPC implements stats.Handler.
func (watcher) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, attemptKey{}, &attempt{method: info.FullMethodName})
}

// HandleRPC implements stats.Handler. A call that its caller ended is no refusal.
func (w watcher) HandleRPC(ctx context.Context, s stats.RPCStats) {
	switch s := s.(type) {
	case *stats.OutPayload:
		w.queued(ctx, s.WireLength)
	case *stats.End:
		w.unheard(ctx, s)
	}
}

func (w watcher) unheard(ctx context.Context, end *stats.End) {
	if end.Error == nil {
		return
	}
	a, ok := ctx.Value(attemptKey{}).(*attempt)
	if !ok || a.judged.Load() {
		return
	}
	switch status.Code(end.Error) {
	case codes.Canceled, codes.DeadlineExceeded, codes.Unknown, codes.Unavailable:
		return
	}
	_ = w.refuse(ctx, w.callerOf(ctx), audit.Record{Detail: a.method}, end.Error) // returns its last argument
}

// TagConn implements stats.Handler.
func (watcher) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (watcher) HandleConn(context.Context, stats.ConnStats) {}

// tooMany is the refusal of one more call.
func tooMany(name string) error {
	return status.Errorf(codes.ResourceExhausted, "%s has %d calls open, which is all it may have", name, maxCalls)
}

// ended gives the place of a call back, and records the calls that there was no
// place for since.
func (s *Service) ended(ctx context.Context, name string) {
	turnedAway := s.calls.give(name)
	if turnedAway == 0 {
		return
	}
	caller := s.callerOf(ctx)
	caller.Name = name
	_ = s.refuse(context.WithoutCancel(ctx), caller, audit.Record{Detail: fmt.Sprintf("%d calls", turnedAway)}, tooMany(name)) // returns its last argument
}
