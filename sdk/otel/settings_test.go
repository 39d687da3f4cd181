// What starts, and what does not: no variables, variables that make no sense, a
// program with providers of its own, and collectors that are not there.

package otel_test

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	api "go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	traces "go.opentelemetry.io/proto/otlp/trace/v1"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/internal/telemetry"
)

// lines is a log that is read while it grows.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *lines) option() sdk.Option { return sdk.WithLogger(slog.New(slog.NewTextHandler(l, nil))) }

// Without variables, or with those that switch it off, nothing is started.
func TestNothingStartsUnasked(t *testing.T) {
	for name, env := range map[string][]string{
		"no variables":     nil,
		"a name alone":     {"OTEL_SERVICE_NAME", "shop", "OTEL_RESOURCE_ATTRIBUTES", "a=b"},
		"none":             {"OTEL_TRACES_EXPORTER", "none", "OTEL_METRICS_EXPORTER", "none", "OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"},
		"disabled":         {"OTEL_SDK_DISABLED", "true", "OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"},
		"empty variables":  {"OTEL_TRACES_EXPORTER", "", "OTEL_EXPORTER_OTLP_ENDPOINT", ""},
		"headers, no host": {"OTEL_EXPORTER_OTLP_HEADERS", "api-key=secret"},
	} {
		t.Run(name, func(t *testing.T) {
			for i := 0; i < len(env); i += 2 {
				t.Setenv(env[i], env[i+1])
			}
			log := new(lines)
			w := open(t, log.option())
			w.calls(t)
			if telemetry.Current() != nil {
				t.Error("somebody is told")
			}
			if strings.Contains(log.String(), "OTEL_") {
				t.Errorf("the log complains:\n%s", log)
			}
		})
	}
}

// One signal can be exported without the other.
func TestOneSignalAlone(t *testing.T) {
	for signal, endpoint := range map[string]string{"traces": "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "metrics": "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"} {
		t.Run(signal, func(t *testing.T) {
			c, address := collect(t, "http/protobuf")
			t.Setenv(endpoint, address+"/v1/"+signal)
			w := open(t)
			w.calls(t)
			w.stop()
			spans, decisions := len(c.find("check out", internalSpan)), c.metric("merlon.decisions")
			if (spans > 0) != (signal == "traces") || (decisions != nil) != (signal == "metrics") {
				t.Errorf("%d spans, metrics %v", spans, decisions)
			}
		})
	}
}

// A variable that makes no sense is named in the log, and the service runs.
func TestVariablesThatMakeNoSense(t *testing.T) {
	const nobody = "http://127.0.0.1:1"
	for name, tt := range map[string]struct {
		env  []string
		says []string
	}{
		"an exporter":     {[]string{"OTEL_TRACES_EXPORTER", "carrier-pigeon"}, []string{"OTEL_TRACES_EXPORTER", "carrier-pigeon", "otlp, console, none", "traces are not exported"}},
		"two exporters":   {[]string{"OTEL_METRICS_EXPORTER", "otlp,console"}, []string{"OTEL_METRICS_EXPORTER", "metrics are not exported"}},
		"a protocol":      {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"}, []string{"OTEL_EXPORTER_OTLP_PROTOCOL", "grpc, http/protobuf"}},
		"no scheme":       {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"}, []string{"OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317", "http://HOST:PORT"}},
		"no URL":          {[]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://[::1"}, []string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "traces are not exported"}},
		"a number":        {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_BSP_MAX_QUEUE_SIZE", "many"}, []string{"OTEL_BSP_MAX_QUEUE_SIZE", "many", "the default is used"}},
		"no room":         {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_BSP_MAX_QUEUE_SIZE", "-1"}, []string{"OTEL_BSP_MAX_QUEUE_SIZE", "the default is used"}},
		"too much room":   {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_BSP_MAX_QUEUE_SIZE", "9223372036854775807"}, []string{"OTEL_BSP_MAX_QUEUE_SIZE", "the default is used"}},
		"no batch":        {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "-1"}, []string{"OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "the default is used"}},
		"no delay":        {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_BSP_SCHEDULE_DELAY", "-1"}, []string{"OTEL_BSP_SCHEDULE_DELAY", "the default is used"}},
		"overflow":        {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_METRIC_EXPORT_INTERVAL", "9223372036854776"}, []string{"OTEL_METRIC_EXPORT_INTERVAL", "the default is used"}},
		"a sampler":       {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_TRACES_SAMPLER", "sometimes"}, []string{"unsupported sampler", "sometimes"}},
		"a propagator":    {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_PROPAGATORS", "tracecontext,owl"}, []string{"OTEL_PROPAGATORS", "owl"}},
		"a header":        {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_EXPORTER_OTLP_HEADERS", "secret-without-name"}, []string{"parse headers"}},
		"a port":          {[]string{"OTEL_METRICS_EXPORTER", "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT", "-1"}, []string{"no metrics are exported", "-1"}},
		"a missing trust": {[]string{"OTEL_EXPORTER_OTLP_ENDPOINT", nobody, "OTEL_EXPORTER_OTLP_CERTIFICATE", "/nonexistent"}, []string{"/nonexistent"}},
	} {
		t.Run(name, func(t *testing.T) {
			for i := 0; i < len(tt.env); i += 2 {
				t.Setenv(tt.env[i], tt.env[i+1])
			}
			log := new(lines)
			w := open(t, log.option())
			w.calls(t)
			for i := 0; i < len(tt.env); i += 2 {
				if got := os.Getenv(tt.env[i]); got != tt.env[i+1] {
					t.Errorf("the program's own %s is %q now", tt.env[i], got)
				}
			}
			for _, word := range tt.says {
				if !strings.Contains(log.String(), word) {
					t.Errorf("the log does not say %q:\n%s", word, log)
				}
			}
			if !strings.Contains(log.String(), "level=WARN") || strings.Contains(log.String(), "secret") {
				t.Errorf("the log has no warning, or a secret:\n%s", log)
			}
		})
	}
}

// A program that has set OpenTelemetry up itself keeps its provider: the SDK tells
// that one, starts no other, and lets the trace travel where the program has not said
// how. The span of a middleware in front is not made twice.
func TestTheProgramsOwnProviderIsUsed(t *testing.T) {
	theirs, address := collect(t, "http/protobuf")
	exporter, err := otlptracehttp.New(t.Context(), otlptracehttp.WithEndpointURL(address+"/v1/traces"))
	if err != nil {
		t.Fatal(err)
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter))
	api.SetTracerProvider(provider)
	t.Cleanup(func() { api.SetTracerProvider(noop.NewTracerProvider()) })
	ours, other := collect(t, "http/protobuf")
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", other+"/v1/traces")
	w := open(t)
	root := w.calls(t)
	overHTTP, overGRPC := w.denials(t)
	fronted(t, w)
	decisionID := frontedClient(t, w)
	w.stop()
	if api.GetTracerProvider() != trace.TracerProvider(provider) {
		t.Error("the provider of the program was replaced")
	}
	if err := provider.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	seesOneTrace(t, theirs, root)
	seesDenials(t, theirs, overHTTP, overGRPC)
	if got := theirs.find("their own", serverSpan); len(got) != 1 || textOf(got[0].GetAttributes(), "merlon.reason") != "ALLOWED" {
		t.Errorf("the span of the middleware in front: %v", got)
	}
	if n := len(theirs.find("GET /fronted", serverSpan)); n != 0 {
		t.Errorf("%d spans beside that of the middleware in front", n)
	}
	if got := theirs.find("their call", clientSpan); len(got) != 1 || textOf(got[0].GetAttributes(), "merlon.decision_id") != decisionID || got[0].GetStatus().GetCode() != traces.Status_STATUS_CODE_ERROR {
		t.Errorf("the span of what stands in front of the client: %v", got)
	} else if parent := got[0].GetSpanId(); slices.ContainsFunc(theirs.find("GET", clientSpan), func(s *traces.Span) bool { return string(s.GetParentSpanId()) == string(parent) }) {
		t.Error("the client made a span of its own beside it")
	}
	if got := ours.received(); got != "" {
		t.Errorf("a second provider was started: %s", got)
	}
}

// fronted makes a call to a service of which a middleware makes the span already.
func fronted(t *testing.T, w *world) {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /fronted", func(http.ResponseWriter, *http.Request) {})
	inner := httpauth.Handler(w.orders, mux)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{TLSConfig: w.orders.ServerTLS(), ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		ctx, span := api.Tracer("theirs").Start(r.Context(), "their own", trace.WithSpanKind(trace.SpanKindServer))
		defer span.End()
		inner.ServeHTTP(rw, r.WithContext(ctx))
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.ServeTLS(lis, "", "") }()
	defer func() { srv.Close(); <-done }()
	url := w.url
	w.url = "https://" + lis.Addr().String()
	defer func() { w.url = url }()
	if err := w.get(t.Context(), "/fronted"); err != nil {
		t.Fatal(err)
	}
}

// frontedClient makes a call that is denied, of which something in front makes the span
// and sends the trace, and gives the decision ID.
func frontedClient(t *testing.T, w *world) string {
	t.Helper()
	ctx, span := api.Tracer("theirs").Start(t.Context(), "their call", trace.WithSpanKind(trace.SpanKindClient))
	defer span.End()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.url+"/denied", nil)
	if err != nil {
		t.Fatal(err)
	}
	propagation.TraceContext{}.Inject(ctx, propagation.HeaderCarrier(req.Header))
	_, err = w.http.Do(req) //nolint:bodyclose // there is no answer
	denied, ok := errors.AsType[*sdk.DeniedError](err)
	if !ok {
		t.Fatal(err)
	}
	return denied.DecisionID
}

// A collector that refuses, or takes connections and never answers, holds up no call
// and no end, and what is not sent is dropped.
func TestACollectorThatIsAway(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for protocol, endpoint := range map[string]string{"grpc": "http://127.0.0.1:1", "http/protobuf": "http://" + silent.Addr().String()} {
		t.Run(protocol, func(t *testing.T) {
			export(t, protocol, endpoint)
			log := new(lines)
			w := open(t, log.option())
			w.calls(t)
			before := heap()
			tracer := api.Tracer("web")
			for range 100_000 {
				_, span := tracer.Start(t.Context(), "a span that nobody takes")
				span.End()
			}
			if more := heap() - before; more > 16<<20 {
				t.Errorf("spans that are not sent take %d bytes", more)
			}
			w.calls(t)
			w.stop()
			if n := strings.Count(log.String(), "level=WARN"); n == 0 || n > 20 {
				t.Errorf("%d warnings:\n%s", n, log)
			}
		})
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// An Identity that is opened after the last was closed is told of, too.
func TestOpenedAgain(t *testing.T) {
	c, address := collect(t, "grpc")
	export(t, "grpc", address)
	for n := range 2 {
		w := open(t)
		w.calls(t)
		w.stop()
		if got := len(c.find("check out", internalSpan)); got != n+1 {
			t.Fatalf("%d spans after %d times", got, n+1)
		}
	}
}

// WithSourceInMetrics names callers, and without it nothing does: see
// TestACollectorSeesWhatHappens.
func TestCallersAreNamedWhereAskedFor(t *testing.T) {
	c, address := collect(t, "grpc")
	export(t, "grpc", address)
	w := open(t, sdk.WithSourceInMetrics())
	w.calls(t)
	w.stop()
	web := w.td.ID("web").String()
	if got := counts(c.metric("merlon.decisions"), "merlon.source"); got["source="+web] != 4 {
		t.Errorf("decisions by caller: %v", got)
	}
	if span := c.find("GET /orders/{id}", serverSpan); len(span) != 1 || textOf(span[0].GetAttributes(), "merlon.source") != web {
		t.Errorf("the server's span: %v", span)
	}
}

// Calls that audit mode alone lets through are told apart.
func TestAuditModeIsToldApart(t *testing.T) {
	c, address := collect(t, "grpc")
	export(t, "grpc", address)
	w := open(t, sdk.WithAuditUntil(time.Now().Add(time.Hour)))
	if err := w.get(t.Context(), "/denied"); err != nil {
		t.Fatal(err)
	}
	w.stop()
	if got := counts(c.metric("merlon.decisions"), "merlon.decision", "merlon.reason"); got["decision=would_deny reason=PATH"] != 1 {
		t.Errorf("decisions: %v", got)
	}
}
