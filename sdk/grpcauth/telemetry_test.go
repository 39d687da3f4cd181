// Calls are what they are, also where OpenTelemetry is told of them; and what that
// costs. What it is told, a collector sees in sdk/otel.

package grpcauth_test

import (
	"testing"

	"go.opentelemetry.io/otel"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

// told has the program tell of every call until the test ends.
func told(tb testing.TB) {
	meters := metric.NewMeterProvider(metric.WithReader(metric.NewManualReader()))
	otel.SetMeterProvider(meters)
	otel.SetTracerProvider(trace.NewTracerProvider())
	tb.Cleanup(func() {
		otel.SetMeterProvider(metricnoop.NewMeterProvider())
		otel.SetTracerProvider(tracenoop.NewTracerProvider())
	})
}

func TestCallsAreTheSameWhereTheyAreToldOf(t *testing.T) {
	told(t)
	for name, test := range map[string]func(*testing.T){
		"denials":  TestDenialIsAnErrorInfoOnTheWire,
		"panics":   TestPanicsAreTheServers,
		"ended":    TestPolicyEndsCallsUnderWay,
		"adoption": TestGradualAdoption,
		"targets":  TestReuseNeverCrossesTargets,
	} {
		t.Run(name, test)
	}
}

// BenchmarkToldCall is BenchmarkCall with a span and a duration at both ends.
func BenchmarkToldCall(b *testing.B) {
	told(b)
	BenchmarkCall(b)
}
