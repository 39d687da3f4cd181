// Traces go through both sidecars, each of which adds a span of its own; where nobody
// wants traces, their fields go through as they are.

package sidecar

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

const (
	callersTrace = "4bf92f3577b34da6a3ce929d0e0e4736"
	callersSpan  = "00f067aa0ba902b7"
	callers      = "00-" + callersTrace + "-" + callersSpan + "-01"
)

// traced has this process listen to traces until the test ends.
func traced(t *testing.T) *tracetest.InMemoryExporter {
	t.Helper()
	spans := tracetest.NewInMemoryExporter()
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans)))
	t.Cleanup(func() { otel.SetTracerProvider(tracenoop.NewTracerProvider()) })
	return spans
}

// traceApp is an app that speaks HTTP/1.1 or HTTP/2 and keeps the trace fields of the
// last request.
type traceApp struct {
	mu     sync.Mutex
	parent []string
	state  []string
}

func (a *traceApp) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.parent, a.state = r.Header.Values("Traceparent"), r.Header.Values("Tracestate")
	a.mu.Unlock()
	if r.URL.Path == "/broken" {
		w.WriteHeader(http.StatusInternalServerError)
	}
}

func (a *traceApp) last() (parent, state string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return strings.Join(a.parent, "|"), strings.Join(a.state, "|")
}

// throughHTTP starts a pair before a traceApp that speaks protocol.
func throughHTTP(t *testing.T, protocol string) (p *pair, a *traceApp, c *http.Client) {
	t.Helper()
	a, c = &traceApp{}, client(t)
	var versions http.Protocols
	versions.SetUnencryptedHTTP2(protocol == "http2")
	versions.SetHTTP1(protocol == "http")
	lis := listen(t)
	srv := &http.Server{Handler: a, Protocols: &versions}
	go srv.Serve(lis)
	t.Cleanup(func() { srv.Close() })
	c.Transport.(*http.Transport).Protocols = &versions
	return startPair(t, protocol, lis.Addr().String()), a, c
}

// spansOf waits for the spans of both hops.
func spansOf(t *testing.T, all *tracetest.InMemoryExporter) (out, in tracetest.SpanStub) {
	t.Helper()
	await(t, "the spans of both hops", func() bool { return len(all.GetSpans()) >= 2 })
	for _, s := range all.GetSpans() {
		if s.SpanKind == trace.SpanKindClient {
			out = s
		} else {
			in = s
		}
	}
	if n := len(all.GetSpans()); n != 2 || out.Name == "" || in.Name == "" {
		t.Fatalf("%d spans: %+v", n, all.GetSpans())
	}
	all.Reset()
	return out, in
}

func value(s tracetest.SpanStub, key attribute.Key) string {
	for _, a := range s.Attributes {
		if a.Key == key {
			return a.Value.String()
		}
	}
	return ""
}

// inOrder checks that the spans follow each other in the trace that came, and that the
// app got the last.
func inOrder(t *testing.T, out, in tracetest.SpanStub, parent string) {
	t.Helper()
	if got := out.Parent.TraceID().String() + " " + out.Parent.SpanID().String(); got != callersTrace+" "+callersSpan {
		t.Errorf("the caller's hop follows %s", got)
	}
	if in.Parent.SpanID() != out.SpanContext.SpanID() || in.SpanContext.TraceID() != out.SpanContext.TraceID() {
		t.Error("the app's hop does not follow the caller's")
	}
	if want := fmt.Sprintf("00-%s-%s-01", callersTrace, in.SpanContext.SpanID()); parent != want {
		t.Errorf("the app got %q; want %q", parent, want)
	}
}

func TestTracesGoOnOverHTTP(t *testing.T) {
	for _, protocol := range []string{"http", "http2"} {
		t.Run(protocol, func(t *testing.T) {
			spans := traced(t)
			p, a, c := throughHTTP(t, protocol)
			url := "http://" + p.outbound.addrs[0]
			do(t, c, "GET", url+"/x", nil, "Traceparent", callers, "Tracestate", "a=1", "Tracestate", "b=2")
			out, in := spansOf(t, spans)
			parent, state := a.last()
			inOrder(t, out, in, parent)
			if state != "a=1,b=2" {
				t.Errorf("tracestate is %q", state)
			}
			for key, want := range map[attribute.Key]string{
				"http.request.method": "GET", "url.path": "/x", "http.response.status_code": "200", "error.type": "",
				"merlon.decision": "allow", "merlon.reason": string(policy.Allowed), "merlon.source": p.td.ID("web").String(), "merlon.destination": p.td.ID("orders").String(),
			} {
				if got := value(in, key); got != want {
					t.Errorf("the app's hop: %s = %q; want %q", key, got, want)
				}
			}
			if in.Name != "GET" || value(out, "merlon.destination") != "orders" || value(out, "merlon.sidecar.upstream") != p.inbound.addrs[0] {
				t.Errorf("spans %+v %+v", out, in)
			}

			do(t, c, "WHATEVER", url+"/broken", nil)
			out, in = spansOf(t, spans)
			if in.Name != "HTTP" || in.Status.Code != codes.Error || value(in, "error.type") != "500" || out.Parent.IsValid() {
				t.Errorf("a request that fails: %+v %+v", out, in)
			}

			p.td.Deny("web", "orders")
			do(t, c, "GET", url+"/x", nil, "Traceparent", callers, "Traceparent", callers)
			out, in = spansOf(t, spans)
			if value(in, "merlon.decision") != "deny" || value(in, "merlon.decision_id") == "" || in.Status.Code == codes.Error || value(out, "error.type") != "403" {
				t.Errorf("a denied request: %+v %+v", out, in)
			}
			if out.Parent.IsValid() {
				t.Error("one of two traces is gone on with")
			}
		})
	}
}

func TestTracesGoOnOverGRPC(t *testing.T) {
	spans := traced(t)
	app := newGRPCApp(t)
	p := startPair(t, "grpc", app.addr)
	c := grpcClient(t, p.outbound.addrs[0])
	ctx := metadata.AppendToOutgoingContext(within(t), "traceparent", callers)
	if _, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{}); err != nil {
		t.Fatal(err)
	}
	out, in := spansOf(t, spans)
	inOrder(t, out, in, strings.Join(app.last.Load().Get("traceparent"), "|"))
	if in.Name != "grpc.testing.TestService/UnaryCall" || value(in, "rpc.response.status_code") != "OK" || value(in, "merlon.decision") != "allow" {
		t.Errorf("span %+v", in)
	}
	if _, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{ResponseStatus: &testgrpc.EchoStatus{Code: 5, Message: "no"}}); err == nil {
		t.Fatal("no error")
	}
	out, in = spansOf(t, spans)
	if value(in, "error.type") != "" || value(out, "error.type") != "NOT_FOUND" || value(in, "rpc.response.status_code") != "NOT_FOUND" {
		t.Errorf("an error of the caller's: %+v %+v", out, in)
	}
}

func TestWithoutTracesTheirFieldsGoThrough(t *testing.T) {
	for _, protocol := range []string{"http", "http2"} {
		t.Run(protocol, func(t *testing.T) {
			p, a, c := throughHTTP(t, protocol)
			do(t, c, "GET", "http://"+p.outbound.addrs[0]+"/x", nil, "Traceparent", "odd", "Traceparent", callers, "Tracestate", "x")
			if parent, state := a.last(); parent != "odd|"+callers || state != "x" {
				t.Errorf("the app got %q and %q", parent, state)
			}
		})
	}
}

func TestNobodyWantsTracesCostsNoMemory(t *testing.T) {
	h, e := &hop.Hop{}, &hop.Entry{}
	field := func(string) []string { t.Error("asked for a field"); return nil }
	if n := testing.AllocsPerRun(100, func() {
		tr := h.Trace(t.Context(), e, field)
		tr.End(h, e)
	}); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}
