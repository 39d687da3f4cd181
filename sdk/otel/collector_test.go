// A collector: it receives OTLP over gRPC and over HTTP, and keeps what came.

package otel_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	metrics "go.opentelemetry.io/proto/otlp/metrics/v1"
	traces "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

type collector struct {
	collectormetrics.UnimplementedMetricsServiceServer
	traces tracesService

	mu      sync.Mutex
	metrics map[string]*metrics.Metric // guarded by mu; the last of each name
	service string                     // guarded by mu
	spans   []*traces.Span             // guarded by mu
	text    strings.Builder            // guarded by mu; all that came, for searches
}

type tracesService struct {
	collectortrace.UnimplementedTraceServiceServer
	c *collector
}

// collect starts a collector and gives its address, by protocol.
func collect(t *testing.T, protocol string) (*collector, string) {
	t.Helper()
	c := &collector{metrics: make(map[string]*metrics.Metric)}
	c.traces.c = c
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	if protocol == "grpc" {
		srv := grpc.NewServer()
		collectormetrics.RegisterMetricsServiceServer(srv, c)
		collectortrace.RegisterTraceServiceServer(srv, &c.traces)
		go func() { defer close(done); _ = srv.Serve(lis) }()
		t.Cleanup(func() { srv.Stop(); <-done })
	} else {
		srv := &http.Server{Handler: c, ReadHeaderTimeout: 10 * time.Second}
		go func() { defer close(done); _ = srv.Serve(lis) }()
		t.Cleanup(func() { srv.Close(); <-done })
	}
	return c, "http://" + lis.Addr().String()
}

// Export receives metrics.
func (c *collector) Export(_ context.Context, req *collectormetrics.ExportMetricsServiceRequest) (*collectormetrics.ExportMetricsServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text.WriteString(req.String())
	for _, r := range req.GetResourceMetrics() {
		c.service = textOf(r.GetResource().GetAttributes(), "service.name")
		for _, s := range r.GetScopeMetrics() {
			for _, m := range s.GetMetrics() {
				c.metrics[m.GetName()] = m
			}
		}
	}
	return &collectormetrics.ExportMetricsServiceResponse{}, nil
}

// Export receives traces.
func (s *tracesService) Export(_ context.Context, req *collectortrace.ExportTraceServiceRequest) (*collectortrace.ExportTraceServiceResponse, error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.c.text.WriteString(req.String())
	for _, r := range req.GetResourceSpans() {
		for _, scope := range r.GetScopeSpans() {
			s.c.spans = append(s.c.spans, scope.GetSpans()...)
		}
	}
	return &collectortrace.ExportTraceServiceResponse{}, nil
}

// ServeHTTP receives both.
func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil || r.Header.Get("Content-Type") != "application/x-protobuf" {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	var answer proto.Message
	switch r.URL.Path {
	case "/v1/metrics":
		req := new(collectormetrics.ExportMetricsServiceRequest)
		if err = proto.Unmarshal(body, req); err == nil {
			answer, err = c.Export(r.Context(), req)
		}
	case "/v1/traces":
		req := new(collectortrace.ExportTraceServiceRequest)
		if err = proto.Unmarshal(body, req); err == nil {
			answer, err = c.traces.Export(r.Context(), req)
		}
	default:
		w.WriteHeader(http.StatusNotFound)
		return
	}
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	out, _ := proto.Marshal(answer)
	w.Header().Set("Content-Type", "application/x-protobuf")
	_, _ = w.Write(out)
}

// received is all that came, as text.
func (c *collector) received() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// metric is the last metric of this name; nil if none has come.
func (c *collector) metric(name string) *metrics.Metric {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.metrics[name]
}

// find gives the spans of this name and kind.
func (c *collector) find(name string, kind traces.Span_SpanKind) (found []*traces.Span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if s.GetName() == name && s.GetKind() == kind {
			found = append(found, s)
		}
	}
	return found
}

// textOf is an attribute as text; "" if there is none.
func textOf(attrs []*common.KeyValue, key string) string {
	for _, a := range attrs {
		if a.GetKey() != key {
			continue
		}
		if v, ok := a.GetValue().GetValue().(*common.AnyValue_IntValue); ok {
			return strconv.FormatInt(v.IntValue, 10)
		}
		return a.GetValue().GetStringValue()
	}
	return ""
}

// describe is a set of attributes as text, in the order of keys.
func describe(attrs []*common.KeyValue, keys ...string) string {
	var b strings.Builder
	for i, key := range keys {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(key[strings.LastIndexByte(key, '.')+1:] + "=" + textOf(attrs, key))
	}
	return b.String()
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}
