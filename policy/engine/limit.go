package engine

// This file ends what takes too long. OPA looks whether it was told to stop between
// its steps, and a step can be long: two values whose parts are the same ones over and
// over are compared in full (attack T31). While an evaluation does not stop, the
// engine begins no other: those calls are denied at once. The one call waits for it;
// the agent's clients do so for two seconds.

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/open-policy-agent/opa/v1/topdown"
)

// Why there is no answer.
var (
	errStopped = errors.New("stopped")
	errStuck   = errors.New("an earlier evaluation of this policy does not stop")
)

// grace is how long an evaluation may take to stop.
const grace = 500 * time.Millisecond

// watched is one evaluation: what tells it to stop, after its limit or when nobody
// waits for it any more. One that has not stopped after the grace counts as stuck until
// it is over. All of it is one value, and the context is asked instead of told to call
// back: an evaluation takes some twenty microseconds, and pays for each part.
type watched struct {
	engine *Engine
	ctx    context.Context
	timer  *time.Timer
	told   atomic.Bool // to stop
	known  atomic.Bool // that it is over, or stuck
}

// Cancel and Cancelled are what OPA asks between its steps.
func (w *watched) Cancel()         { w.told.Store(true) }
func (w *watched) Cancelled() bool { return w.told.Load() || w.ctx.Err() != nil }

// watch begins an evaluation, which may take as long as limit.
func (e *Engine) watch(ctx context.Context, limit time.Duration) (*watched, error) {
	if e.stuck.Load() > 0 {
		return nil, errStuck
	}
	w := &watched{engine: e, ctx: ctx}
	w.timer = time.AfterFunc(limit, w.late)
	return w, nil
}

func (w *watched) late() {
	w.Cancel()
	time.AfterFunc(grace, func() {
		if w.known.CompareAndSwap(false, true) {
			w.engine.stuck.Add(1)
		}
	})
}

// over is to be called when the evaluation has stopped.
func (w *watched) over() {
	w.timer.Stop()
	if !w.known.CompareAndSwap(false, true) {
		w.engine.stuck.Add(-1)
	}
}

// inTime runs f, which evaluates without a call, and leaves it alone when it does not
// stop: those who wait for a program must not wait for that. What f writes is there
// when inTime returns nil; errors are errStopped, errStuck, and panics of f.
func (e *Engine) inTime(ctx context.Context, limit time.Duration, f func(topdown.Cancel)) error {
	w, err := e.watch(ctx, limit)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		defer w.over()
		defer func() {
			if r := recover(); r != nil { // a bug in OPA, as in evaluate
				ended <- fmt.Errorf("panic: %v", r)
			}
		}()
		f(w)
		ended <- nil
	}()
	patience := time.NewTimer(limit + 2*grace)
	defer patience.Stop()
	select {
	case err := <-ended:
		return err
	case <-patience.C:
		return fmt.Errorf("%w after %v, and goes on", errStopped, limit)
	}
}

// compiling bounds how many policies are put into programs at a time, so that those
// for which it takes long leave room for calls.
var compiling = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2))
