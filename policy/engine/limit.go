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

// watch gives what tells an evaluation to stop, which happens after limit or when ctx
// ends; over is to be called when it has. One that has not stopped after the grace
// counts as stuck until then.
func (e *Engine) watch(ctx context.Context, limit time.Duration) (cancel topdown.Cancel, over func(), err error) {
	if e.stuck.Load() > 0 {
		return nil, nil, errStuck
	}
	cancel = topdown.NewCancel()
	var known atomic.Bool // that it is over, or stuck
	timer := time.AfterFunc(limit, func() {
		cancel.Cancel()
		time.AfterFunc(grace, func() {
			if known.CompareAndSwap(false, true) {
				e.stuck.Add(1)
			}
		})
	})
	stop := func() bool { return true }
	if ctx.Done() != nil {
		stop = context.AfterFunc(ctx, cancel.Cancel)
	}
	return cancel, func() {
		timer.Stop()
		stop()
		if !known.CompareAndSwap(false, true) {
			e.stuck.Add(-1)
		}
	}, nil
}

// inTime runs f, which evaluates without a call, and leaves it alone when it does not
// stop: those who wait for a program must not wait for that. What f writes is there
// when inTime returns nil; errors are errStopped, errStuck, and panics of f.
func (e *Engine) inTime(ctx context.Context, limit time.Duration, f func(topdown.Cancel)) error {
	cancel, over, err := e.watch(ctx, limit)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		defer over()
		defer func() {
			if r := recover(); r != nil { // a bug in OPA, as in evaluate
				ended <- fmt.Errorf("panic: %v", r)
			}
		}()
		f(cancel)
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
