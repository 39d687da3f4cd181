// Package otel exports the metrics and traces of a program as the OTEL_*
// variables of its environment say. A service with the SDK links it by one line,
//
//	import _ "merlon.dev/sdk/otel"
//
// and then [merlon.dev/sdk.Open] starts the exporters, and the last Close of an
// Identity sends what is left and ends them. Without the variables nothing is
// started. Where the program has OpenTelemetry set up itself, it needs no line: the
// SDK tells the global providers.
//
// It is a package of its own because the exporters are three times as large as
// the SDK.
package otel

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	bridge "go.opentelemetry.io/contrib/bridges/prometheus"
	"go.opentelemetry.io/contrib/exporters/autoexport"
	"go.opentelemetry.io/otel"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"merlon.dev/sdk/internal/telemetry"
)

// stopTimeout bounds what Close waits for a collector that does not answer.
const stopTimeout = 3 * time.Second

func init() { telemetry.Register(func(log *slog.Logger) func() { return Start(log) }) }

// Start exports the metrics and traces that this process tells OpenTelemetry's
// global providers, as the OTEL_* variables say, until stop is called, which sends
// what is left within 3 s. Settings that make no sense are logged, and what they are
// about is not exported: a service does not stay down for its metrics. Nothing is
// started that the variables do not ask for, nor in the place of a provider that the
// program has set.
//
// What more gather goes with the metrics, under its own names: the registries of
// Merlon's own processes. Programs with the SDK need no call of Start; see above.
func Start(log *slog.Logger, more ...prometheus.Gatherer) (stop func()) {
	ctx := context.Background()
	env := read(log)
	traces, metrics := env.traces && telemetry.TracesOff(), env.metrics && telemetry.MetricsOff()
	if !traces && !metrics {
		return func() {}
	}
	defer withoutNonsense(log)() // what reads them does so before Start returns
	complaints := &complaints{log: log}
	otel.SetErrorHandler(complaints)
	otel.SetLogger(logr.FromSlogHandler(internal{log.Handler()}))
	about := resource.Default() // of OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
	var stops []func(context.Context) error
	if traces {
		stops = append(stops, startTraces(ctx, complaints, about))
	}
	if metrics {
		stops = append(stops, startMetrics(ctx, complaints, about, more))
	}
	if !telemetry.PropagatorSet() {
		otel.SetTextMapPropagator(env.propagator)
	}
	return func() {
		ctx, cancel := context.WithTimeout(ctx, stopTimeout)
		defer cancel()
		for _, stop := range stops {
			if err := stop(ctx); err != nil {
				complaints.Handle(fmt.Errorf("the last metrics or traces were not sent: %w", err))
			}
		}
	}
}

func startTraces(ctx context.Context, c *complaints, about *resource.Resource) (stop func(context.Context) error) {
	exporter, err := autoexport.NewSpanExporter(ctx)
	if err != nil {
		c.Handle(fmt.Errorf("no traces are exported: %w", err))
		return nothing
	}
	life, end := context.WithCancel(ctx)
	p := trace.NewTracerProvider(trace.WithBatcher(&mortal{exporter, life}), trace.WithResource(about))
	otel.SetTracerProvider(p)
	return func(ctx context.Context) error {
		defer end()
		if otel.GetTracerProvider() == p {
			otel.SetTracerProvider(tracenoop.NewTracerProvider())
		}
		return p.Shutdown(ctx)
	}
}

// mortal is an exporter that gives up when life ends. Without it, what is under way
// goes on for minutes after a Shutdown that could not wait for it.
type mortal struct {
	trace.SpanExporter
	life context.Context
}

// ExportSpans implements trace.SpanExporter.
func (m *mortal) ExportSpans(ctx context.Context, spans []trace.ReadOnlySpan) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.life, cancel)()
	return m.SpanExporter.ExportSpans(ctx, spans)
}

func startMetrics(ctx context.Context, c *complaints, about *resource.Resource, more prometheus.Gatherers) (stop func(context.Context) error) {
	if len(more) > 0 {
		autoexport.WithFallbackMetricProducer(func(context.Context) (metric.Producer, error) {
			return bridge.NewMetricProducer(bridge.WithGatherer(more)), nil
		})
		defer autoexport.WithFallbackMetricProducer(nil) // it is for the whole process
	}
	reader, err := autoexport.NewMetricReader(ctx)
	if err != nil {
		c.Handle(fmt.Errorf("no metrics are exported: %w", err))
		return nothing
	}
	p := metric.NewMeterProvider(metric.WithReader(reader), metric.WithResource(about))
	otel.SetMeterProvider(p)
	telemetry.Current() // makes the gauges
	return func(ctx context.Context) error {
		if otel.GetMeterProvider() == p {
			defer otel.SetMeterProvider(metricnoop.NewMeterProvider())
		}
		return p.Shutdown(ctx)
	}
}

func nothing(context.Context) error { return nil }
