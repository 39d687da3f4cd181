// Who is told, and what it costs where nobody is. What is told, a collector sees in
// sdk/otel.

package telemetry_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"merlon.dev/policy"
	"merlon.dev/sdk/internal/telemetry"
)

// untold runs what the hot path of a server runs for each call.
func untold(ctx context.Context) {
	ctx, call := telemetry.Arrived(ctx, "/shop.Orders/Get")
	telemetry.Current().Decision(ctx, policy.Decision{Allow: true, Reason: policy.Allowed}, "")
	call.Answered(nil)
}

func TestNobodyListensCostsNoMemory(t *testing.T) {
	ctx := t.Context()
	if n := testing.AllocsPerRun(100, func() { untold(ctx) }); n != 0 {
		t.Errorf("%v allocations a call, of which nobody is told", n)
	}
}

func BenchmarkNobodyListens(b *testing.B) {
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		untold(ctx)
	}
}

// The providers of the program count whenever it sets them, and no longer when it
// takes them away.
func TestProvidersAreFollowed(t *testing.T) {
	quiet(t)
	if telemetry.Current() != nil {
		t.Fatal("somebody is told at the start")
	}
	first, second := sdkmetric.NewManualReader(), sdkmetric.NewManualReader()
	for _, reader := range []*sdkmetric.ManualReader{first, second} {
		otel.SetMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)))
		telemetry.Current().Decision(t.Context(), policy.Decision{Reason: policy.NoGrant}, "")
	}
	otel.SetMeterProvider(metricnoop.NewMeterProvider())
	if telemetry.Current() != nil {
		t.Error("somebody is told at the end")
	}
	for i, reader := range []*sdkmetric.ManualReader{first, second} {
		if n := decisions(t, reader); n != 1 {
			t.Errorf("provider %d knows of %d decisions; want 1", i+1, n)
		}
	}
}

// quiet leaves no provider behind.
func quiet(t *testing.T) {
	t.Cleanup(func() {
		otel.SetMeterProvider(metricnoop.NewMeterProvider())
		otel.SetTracerProvider(tracenoop.NewTracerProvider())
	})
}

func decisions(t *testing.T, reader *sdkmetric.ManualReader) (n int64) {
	t.Helper()
	var all metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &all); err != nil {
		t.Fatal(err)
	}
	for _, s := range all.ScopeMetrics {
		for _, m := range s.Metrics {
			if m.Name == "merlon.decisions" {
				for _, p := range m.Data.(metricdata.Sum[int64]).DataPoints {
					n += p.Value
				}
			}
		}
	}
	return n
}

// Several identities in one process are told as one: the least time left, the greatest
// age, and all that is open. One that has none of it says nothing.
func TestSeveralIdentitiesAreToldAsOne(t *testing.T) {
	quiet(t)
	reader := sdkmetric.NewManualReader()
	otel.SetMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)))
	telemetry.Current()
	if got := gauges(t, reader); len(got) != 0 {
		t.Errorf("without an identity: %v", got)
	}
	states := []telemetry.State{
		{HasSVID: true, SVIDTimeLeft: time.Hour, HasPolicy: true, PolicyAge: time.Second, HasRevocations: true, RevocationsAge: 3 * time.Second, Connections: 1, Calls: 2},
		{HasSVID: true, SVIDTimeLeft: time.Minute, HasPolicy: true, PolicyAge: 2 * time.Second, HasRevocations: true, RevocationsAge: time.Second, Connections: 10, Calls: 20},
		{Connections: 100, Calls: 200},
	}
	var stops []func()
	for _, s := range states {
		stops = append(stops, telemetry.Watch(func() telemetry.State { return s }))
	}
	want := map[string]float64{
		"merlon.x509_svid.time_left": 60, "merlon.policy.age": 2, "merlon.revocations.age": 3, "merlon.connections": 111, "merlon.calls": 222,
	}
	if diff := cmp.Diff(gauges(t, reader), want); diff != "" {
		t.Errorf("of three identities (-got +want):\n%s", diff)
	}
	for _, stop := range stops[:2] {
		stop()
	}
	if diff := cmp.Diff(gauges(t, reader), map[string]float64{"merlon.connections": 100, "merlon.calls": 200}); diff != "" {
		t.Errorf("of the last (-got +want):\n%s", diff)
	}
	stops[2]()
}

// gauges are the values that have no attributes.
func gauges(t *testing.T, reader *sdkmetric.ManualReader) map[string]float64 {
	t.Helper()
	var all metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &all); err != nil {
		t.Fatal(err)
	}
	found := make(map[string]float64)
	for _, s := range all.ScopeMetrics {
		for _, m := range s.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Gauge[float64]:
				found[m.Name] = data.DataPoints[0].Value
			case metricdata.Sum[int64]:
				found[m.Name] = float64(data.DataPoints[0].Value)
			}
		}
	}
	return found
}

// odd is a provider that cannot be compared.
type odd struct {
	metric.MeterProvider
	_ []int
}

func TestProvidersThatCannotBeCompared(t *testing.T) {
	quiet(t)
	otel.SetMeterProvider(odd{MeterProvider: sdkmetric.NewMeterProvider()})
	for range 3 {
		if telemetry.Current() == nil {
			t.Fatal("nobody is told")
		}
	}
}

// Where the program has not said how traces travel, they travel by W3C Trace Context;
// where it has, that counts, also if it is not at all.
func TestHowTracesTravel(t *testing.T) {
	if got := telemetry.Propagator().Fields(); len(got) == 0 || got[0] != "traceparent" {
		t.Errorf("at first by %v", got)
	}
	otel.SetTextMapPropagator(propagation.NewCompositeTextMapPropagator())
	if got := telemetry.Propagator().Fields(); len(got) != 0 {
		t.Errorf("by %v, against the program's choice", got)
	}
}

// A call that somebody in front tells of is not told of twice.
func TestACallIsToldOfOnce(t *testing.T) {
	quiet(t)
	otel.SetTracerProvider(sdktrace.NewTracerProvider())
	otel.SetTextMapPropagator(propagation.TraceContext{})
	ctx, theirs := otel.Tracer("theirs").Start(t.Context(), "theirs", trace.WithSpanKind(trace.SpanKindServer))
	defer theirs.End()
	if _, call := telemetry.Arrived(ctx, "/shop.Orders/Get"); call != nil {
		t.Error("a call that has come is told of twice")
	}
	cc, err := grpc.NewClient("dns:///orders:8443", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	sent, call := telemetry.Leaves(ctx, "/shop.Orders/Get", cc)
	if call == nil {
		t.Fatal("a call that leaves is not told of")
	}
	if _, again := telemetry.Leaves(sent, "/shop.Orders/Get", cc); again != nil {
		t.Error("a call that leaves is told of twice")
	}
	call.Over(errors.New("lost"))
}
