// Package telemetry is what the SDK tells OpenTelemetry: the instruments and
// attributes, by name, and whether anybody listens. It speaks to the global
// providers of OpenTelemetry's API, which are those of the program, or those
// that merlon.dev/sdk/otel has set. Where there are none it costs two loads a
// call.
package telemetry

import (
	"context"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

// Scope is the instrumentation scope of all that the SDK tells.
const Scope = "merlon.dev/sdk"

// Telemetry is where to tell, for one pair of global providers.
type Telemetry struct {
	tracers trace.TracerProvider
	meters  metric.MeterProvider
	off     bool // nobody listens
	traces  bool // somebody listens to traces
	odd     bool // a provider cannot be compared, but for its type

	tracer      trace.Tracer
	instruments instruments
}

var (
	latest     atomic.Pointer[Telemetry]
	rebuilding sync.Mutex
)

// Current is where to tell; nil where nobody listens. It follows a program that
// sets its providers late.
func Current() *Telemetry {
	t := latest.Load()
	if !t.current() {
		t = renew()
	}
	if t.off {
		return nil
	}
	return t
}

// Traces says whether spans are wanted, and not metrics alone.
func (t *Telemetry) Traces() bool { return t.traces }

// Span begins a span of something that is counted by other means than a [Call].
func (t *Telemetry) Span(ctx context.Context, kind trace.SpanKind, name string, begun time.Time, attrs []attribute.KeyValue) (context.Context, trace.Span) {
	return t.tracer.Start(ctx, name, trace.WithSpanKind(kind), trace.WithTimestamp(begun), trace.WithAttributes(attrs...))
}

// current says whether t is of the providers of now.
func (t *Telemetry) current() bool {
	if t == nil {
		return false
	}
	tracers, meters := otel.GetTracerProvider(), otel.GetMeterProvider()
	if t.odd {
		return reflect.TypeOf(t.tracers) == reflect.TypeOf(tracers) && reflect.TypeOf(t.meters) == reflect.TypeOf(meters)
	}
	return t.tracers == tracers && t.meters == meters
}

// renew takes up the providers of now.
func renew() *Telemetry {
	rebuilding.Lock()
	defer rebuilding.Unlock()
	tracers, meters := otel.GetTracerProvider(), otel.GetMeterProvider()
	old := latest.Load()
	if old.current() {
		return old // somebody else was faster
	}
	t := &Telemetry{
		tracers: tracers, meters: meters, off: TracesOff() && MetricsOff(), traces: !TracesOff(),
		odd: !reflect.TypeOf(tracers).Comparable() || !reflect.TypeOf(meters).Comparable(),
	}
	if !t.off {
		if TracesOff() {
			tracers = tracenoop.NewTracerProvider() // cheaper than the one that waits for a provider
		}
		t.tracer = tracers.Tracer(Scope)
		t.instruments.make(meters.Meter(Scope))
	}
	if old != nil {
		old.instruments.stop()
	}
	latest.Store(t)
	return t
}

// TracesOff says whether the program has no provider for traces.
func TracesOff() bool {
	p := otel.GetTracerProvider()
	_, none := p.(tracenoop.TracerProvider)
	return none || isDefault(p)
}

// MetricsOff says whether the program has no provider for metrics.
func MetricsOff() bool {
	p := otel.GetMeterProvider()
	_, none := p.(metricnoop.MeterProvider)
	return none || isDefault(p)
}

// isDefault says whether v is what OpenTelemetry's API has before a program sets
// something of its own. The API has no question for that.
func isDefault(v any) bool {
	t := reflect.TypeOf(v)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return strings.HasSuffix(t.PkgPath(), "/otel/internal/global")
}

// Propagator carries the trace from process to process: the program's own, or
// W3C Trace Context where it has chosen none.
func Propagator() propagation.TextMapPropagator {
	if p := otel.GetTextMapPropagator(); !isDefault(p) {
		return p
	}
	return propagation.TraceContext{}
}

// PropagatorSet says whether the program has chosen how traces travel.
func PropagatorSet() bool { return !isDefault(otel.GetTextMapPropagator()) }

// TracedAbove says whether somebody of this process, as otelhttp or otelgrpc, has
// begun the span of the call that arrives with ctx already.
func TracedAbove(ctx context.Context) bool {
	sc := trace.SpanContextFromContext(ctx)
	return sc.IsValid() && !sc.IsRemote()
}
