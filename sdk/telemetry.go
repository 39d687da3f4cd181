// What an identity tells OpenTelemetry. Where the program has no providers of it,
// and has not linked merlon.dev/sdk/otel, that is nothing, and costs next to that.

package sdk

import (
	"context"
	"errors"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk/internal/telemetry"
)

// tell counts a decision and puts it on the span of the call.
func (id *Identity) tell(ctx context.Context, in *policy.Input, d policy.Decision) {
	t := telemetry.Current()
	if t == nil {
		return
	}
	source := ""
	if id.tellSource && in != nil {
		source = in.Source
	}
	t.Decision(ctx, d, source)
}

// refusal marks the errors of handshakes that failed because of who the peer is.
type refusal struct{ error }

// Unwrap gives the reason.
func (r *refusal) Unwrap() error { return r.error }

// tellHandshake counts what came of judging a peer, and gives err marked.
func tellHandshake(ctx context.Context, role telemetry.Role, err error) error {
	if err == nil {
		telemetry.Current().Handshake(ctx, role, telemetry.Accepted)
		return nil
	}
	telemetry.Current().Handshake(ctx, role, telemetry.Refused)
	return &refusal{err}
}

// tellFailed counts a handshake that ended with err before the peer was judged.
func tellFailed(ctx context.Context, role telemetry.Role, err error) {
	if _, judged := errors.AsType[*refusal](err); !judged {
		telemetry.Current().Handshake(ctx, role, telemetry.Failed)
	}
}

// gauges is the state that the gauges show.
func (id *Identity) gauges() telemetry.State {
	now := time.Now()
	s := telemetry.State{Connections: id.conns.size.Load(), Calls: int64(id.calls.len())}
	if own := id.current.Load(); own.svid != nil {
		s.HasSVID, s.SVIDTimeLeft = true, own.notAfter.Sub(now)
	}
	if at := id.news.asOf.Load(); at > 0 {
		s.HasPolicy, s.PolicyAge = true, steady(now).Sub(time.Unix(0, at))
	}
	if at := id.revocationsAsOf.Load(); at > 0 {
		s.HasRevocations, s.RevocationsAge = true, steady(now).Sub(time.Unix(0, at))
	}
	return s
}
