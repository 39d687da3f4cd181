// What is told of decisions and handshakes.

package telemetry

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"merlon.dev/policy"
)

// verdicts are the values of merlon.decision: what was done about a call.
var verdicts = [3]string{"allow", "deny", "would_deny"}

// verdict is the place in verdicts. A call that is let through for another reason
// than that it is allowed is one of audit mode.
func verdict(d policy.Decision) int {
	switch {
	case !d.Allow:
		return 1
	case d.Reason != policy.Allowed:
		return 2
	}
	return 0
}

// otherReason stands for a reason that this version does not know.
const otherReason = "_OTHER"

// Decision counts a decision, and puts it on the span of the call. source is empty
// but where the program wants callers told apart.
func (t *Telemetry) Decision(ctx context.Context, d policy.Decision, source string) {
	if t == nil {
		return
	}
	v := verdict(d)
	if known := t.instruments.decided[d.Reason]; known != nil && source == "" {
		t.instruments.decisions.Add(ctx, 1, known[v])
	} else {
		reason := string(d.Reason)
		if known == nil {
			reason = otherReason
		}
		attrs := []attribute.KeyValue{DecisionKey.String(verdicts[v]), ReasonKey.String(reason)}
		if source != "" {
			attrs = append(attrs, SourceKey.String(source))
		}
		t.instruments.decisions.Add(ctx, 1, metric.WithAttributes(attrs...))
	}
	OnSpan(ctx, d)
	if source != "" {
		trace.SpanFromContext(ctx).SetAttributes(SourceKey.String(source))
	}
}

// OnSpan puts a decision on the span of the call.
func OnSpan(ctx context.Context, d policy.Decision) {
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		span.SetAttributes(DecisionKey.String(verdicts[verdict(d)]), ReasonKey.String(string(d.Reason)), DecisionIDKey.String(d.DecisionID.String()))
	}
}

// Denied makes a denial that the other side has told visible in the trace of the
// caller: on the span of the call, which ends with an error.
func Denied(ctx context.Context, reason policy.Reason, decisionID, text string) {
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		span.SetAttributes(DecisionKey.String(verdicts[1]), ReasonKey.String(string(reason)), DecisionIDKey.String(decisionID))
		span.SetStatus(codes.Error, text)
	}
}

// Handshake counts a handshake.
func (t *Telemetry) Handshake(ctx context.Context, r Role, o Outcome) {
	if t != nil {
		t.instruments.handshakes.Add(ctx, 1, t.instruments.shaken[r][o])
	}
}
