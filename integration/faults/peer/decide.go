// Decisions at a steady rate, whose answers are known beforehand: whatever becomes of
// the policy meanwhile, none may be another.

package main

import (
	"context"
	"fmt"
	"time"

	"merlon.dev/integration/faults/history"
	"merlon.dev/policy"
)

// decide decides rate times a second, from the first decision on that allows may, and
// says every second how many it were. It is behind only as long as it is not run.
func (p *peer) decide(ctx context.Context, rate int, may string, mayNot []string) {
	ask := func(source string) policy.Decision {
		return p.id.Authorize(ctx, &policy.Input{Source: source, Protocol: policy.HTTP, Method: "POST", Path: "/"})
	}
	pace := time.NewTicker(time.Second / 100)
	defer pace.Stop()
	for begun := false; !begun; begun = ask(may).Allow {
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
	}
	start, done := history.Now(), 0
	op := history.Op{Client: p.own, Kind: history.Decide, Key: p.own, Begin: start, Outcome: history.OK}
	for ctx.Err() == nil {
		for due := int((history.Now() - start) * int64(rate) / int64(time.Second)); done < due && ctx.Err() == nil; done++ {
			source, want := may, true
			if done%10 == 9 {
				source, want = mayNot[done/10%len(mayNot)], false
			}
			if d := ask(source); d.Allow != want && ctx.Err() == nil {
				op.Outcome, op.Detail = history.Failed, fmt.Sprintf("%s: allowed %v, for %s", source, d.Allow, d.Reason)
			}
			op.Number++
		}
		if now := history.Now(); now-op.Begin >= int64(time.Second) {
			op.End = now
			p.say(op)
			op = history.Op{Client: p.own, Kind: history.Decide, Key: p.own, Begin: now, Outcome: history.OK}
		}
		select {
		case <-ctx.Done():
		case <-pace.C:
		}
	}
}
