// The spans and durations of calls, for httpauth and grpcauth.

package telemetry

import (
	"context"
	"net"
	"slices"
	"strconv"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// Kind is a protocol and a side of it.
type Kind int

// The kinds of calls.
const (
	HTTPServer Kind = iota
	HTTPClient
	RPCServer
	RPCClient
)

func (k Kind) span() trace.SpanKind {
	if k == HTTPServer || k == RPCServer {
		return trace.SpanKindServer
	}
	return trace.SpanKindClient
}

func (t *Telemetry) histogram(k Kind) metric.Float64Histogram {
	return [...]metric.Float64Histogram{t.instruments.httpServer, t.instruments.httpClient, t.instruments.rpcServer, t.instruments.rpcClient}[k]
}

// Call is one call under way. A nil Call tells nobody.
type Call struct {
	t     *Telemetry
	kind  Kind
	ctx   context.Context
	span  trace.Span
	begun time.Time
	attrs []attribute.KeyValue // of span and duration
}

// Begin begins a call: shared are the attributes of its span and of its duration,
// which have few values, and more those of its span alone. The context that it
// returns has the span.
func (t *Telemetry) Begin(ctx context.Context, k Kind, name string, shared, more []attribute.KeyValue) (context.Context, *Call) {
	c := &Call{t: t, kind: k, begun: time.Now(), attrs: shared}
	c.ctx, c.span = t.tracer.Start(ctx, name, trace.WithSpanKind(k.span()), trace.WithTimestamp(c.begun),
		trace.WithAttributes(shared...), trace.WithAttributes(more...))
	return c.ctx, c
}

// Context has the span of the call.
func (c *Call) Context() context.Context { return c.ctx }

// Rename gives the span a better name, where there is one only later.
func (c *Call) Rename(name string) { c.span.SetName(name) }

// Answer tells of an answer: its attributes, and the kind of error, if it is one,
// with a text for the span.
func (c *Call) Answer(errorType, text string, attrs ...attribute.KeyValue) {
	if errorType != "" {
		attrs = append(attrs, attribute.String("error.type", errorType))
		c.span.SetStatus(codes.Error, text)
	}
	c.span.SetAttributes(attrs...)
	all := append(slices.Clip(c.attrs), attrs...)
	c.t.histogram(c.kind).Record(c.ctx, time.Since(c.begun).Seconds(), metric.WithAttributeSet(attribute.NewSet(all...)))
}

// Broken tells that the call ended with an error after its answer had begun.
func (c *Call) Broken(errorType, text string) {
	c.span.SetAttributes(attribute.String("error.type", errorType))
	c.span.SetStatus(codes.Error, text)
}

// End ends the span.
func (c *Call) End() { c.span.End() }

// ServerAddress are the attributes that say where a client connects to. port is
// used where address has none; 0 for none.
func ServerAddress(address string, port int) []attribute.KeyValue {
	host := address
	if h, p, err := net.SplitHostPort(address); err == nil {
		host = h
		if n, err := strconv.ParseUint(p, 10, 16); err == nil {
			port = int(n)
		}
	}
	attrs := []attribute.KeyValue{attribute.String("server.address", host)}
	if port > 0 {
		attrs = append(attrs, attribute.Int("server.port", port))
	}
	return attrs
}
