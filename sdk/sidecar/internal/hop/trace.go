// Traces: a span for each request on each hop, and the trace that goes on with it by
// W3C Trace Context. What is counted of requests is counted elsewhere, once.

package hop

import (
	"context"
	"net"
	"slices"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	grpccodes "google.golang.org/grpc/codes"

	"merlon.dev/policy"
	"merlon.dev/sdk/internal/telemetry"
)

// The fields of W3C Trace Context.
const (
	traceparent = "traceparent"
	tracestate  = "tracestate"
)

// Trace is the span of a request under way. A nil Trace is one of which nobody wants
// to know: its fields go on as they came.
type Trace struct {
	ctx    context.Context
	span   trace.Span
	fields []policy.HeaderField
}

// Trace begins the span of the request e, of which method, path and host are known, as
// the next one of the trace that came with it: field gives the values of one of its
// header fields.
func (h *Hop) Trace(ctx context.Context, e *Entry, field func(name string) []string) *Trace {
	t := telemetry.Current()
	if t == nil || !t.Traces() {
		return nil
	}
	came := propagation.MapCarrier{}
	if parents := field(traceparent); len(parents) == 1 { // of two none counts
		came[traceparent], came[tracestate] = parents[0], strings.Join(field(tracestate), ",")
	}
	ctx = propagation.TraceContext{}.Extract(ctx, came)
	kind := trace.SpanKindServer
	if h.Direction == Outbound {
		kind = trace.SpanKindClient
	}
	name, attrs := h.about(e)
	c := &Trace{}
	c.ctx, c.span = t.Span(ctx, kind, name, e.Begun, attrs)
	if slices.Contains(telemetry.Propagator().Fields(), traceparent) { // or the program's owner wants none to travel
		goes := propagation.MapCarrier{}
		propagation.TraceContext{}.Inject(c.ctx, goes)
		for _, name := range []string{traceparent, tracestate} {
			if v := goes[name]; v != "" {
				c.fields = append(c.fields, policy.HeaderField{Name: name, Value: v})
			}
		}
	}
	return c
}

// about gives the span's name and what is known of the request at its beginning.
func (h *Hop) about(e *Entry) (name string, attrs []attribute.KeyValue) {
	attrs = append(make([]attribute.KeyValue, 0, 10),
		attribute.String("merlon.sidecar.direction", string(h.Direction)), attribute.String("merlon.sidecar.listener", h.Name), attribute.String("merlon.destination", h.To))
	if e.Source != "" {
		attrs = append(attrs, telemetry.SourceKey.String(e.Source))
	}
	if host, port, err := net.SplitHostPort(e.Remote); err == nil {
		attrs = append(attrs, attribute.String("network.peer.address", host))
		if n, err := strconv.Atoi(port); err == nil {
			attrs = append(attrs, attribute.Int("network.peer.port", n))
		}
	}
	if h.Protocol == policy.GRPC {
		name = strings.TrimPrefix(e.Path, "/")
		return name, append(attrs, attribute.String("rpc.system.name", "grpc"), attribute.String("rpc.method", name))
	}
	method := e.Method
	if !slices.Contains(methods, method) { // a caller can invent as many as he likes
		name, method = "HTTP", "_OTHER"
	} else {
		name = method
	}
	return name, append(attrs, attribute.String("http.request.method", method), attribute.String("url.path", e.Path), attribute.String("server.address", e.Host))
}

var methods = []string{"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}

// Context has the span; without one it is ctx.
func (t *Trace) Context(ctx context.Context) context.Context {
	if t == nil {
		return ctx
	}
	return t.ctx
}

// Replaces says whether a header field of that name, in lower case, stays behind.
func (t *Trace) Replaces(name string) bool {
	return t != nil && (name == traceparent || name == tracestate)
}

// Fields go on in the place of those.
func (t *Trace) Fields() []policy.HeaderField {
	if t == nil {
		return nil
	}
	return t.fields
}

// End ends the span of a request that is over.
func (t *Trace) End(h *Hop, e *Entry) {
	if t == nil {
		return
	}
	var attrs []attribute.KeyValue
	kind := ""
	if e.Upstream != "" {
		attrs = append(attrs, attribute.String("merlon.sidecar.upstream", e.Upstream))
	}
	if e.Status != 0 {
		attrs = append(attrs, attribute.Int("http.response.status_code", e.Status))
		if e.Status >= 500 || e.Status >= 400 && h.Direction == Outbound {
			kind = strconv.Itoa(e.Status)
		}
	}
	if e.GRPCStatus != "" {
		code := grpccodes.Unknown // of what is no number
		if n, err := strconv.ParseUint(e.GRPCStatus, 10, 32); err == nil {
			code = grpccodes.Code(n)
		}
		attrs = append(attrs, attribute.String("rpc.response.status_code", telemetry.CodeName(code)))
		if code != grpccodes.OK && (h.Direction == Outbound || telemetry.IsServers(code)) {
			kind = telemetry.CodeName(code)
		}
	}
	switch {
	case e.Failure != nil:
		kind = e.Failure.Reason
	case e.Failed && kind == "", e.Status == 0 && e.Err != "" && !e.Denied:
		kind = "_OTHER"
	}
	if kind != "" {
		attrs = append(attrs, attribute.String("error.type", kind))
		t.span.SetStatus(codes.Error, e.Err)
	}
	t.span.SetAttributes(attrs...)
	t.span.End(trace.WithTimestamp(e.Begun.Add(e.Took)))
}
