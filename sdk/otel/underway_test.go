// Calls that do not end as they should: by the policy while they are under way, or by
// a panic of their handler.

package otel_test

import (
	"errors"
	"io"
	"net/http"
	"slices"
	"testing"

	traces "go.opentelemetry.io/proto/otlp/trace/v1"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/policy"
	"merlon.dev/sdk"
)

// A call that the policy ends while it is under way is an error in the trace of its
// caller; over gRPC, and over HTTP before the answer has begun, with the decision.
func TestCallsThatThePolicyEndsAreErrorsToTheirCaller(t *testing.T) {
	c, address := collect(t, "grpc")
	export(t, "grpc", address)
	w := open(t)
	stream, err := w.grpc.FullDuplexCall(t.Context())
	if err == nil {
		err = stream.Send(&testgrpc.StreamingOutputCallRequest{})
	}
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.url+"/endless", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := w.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	waits := make(chan error, 1)
	go func() { waits <- w.get(t.Context(), "/silent") }()
	eventually(t, "three calls are under way", func() bool {
		m := c.metric("merlon.calls")
		return m != nil && m.GetSum().GetDataPoints()[0].GetAsInt() == 3
	})
	w.td.Decide(func(*policy.Input) policy.Decision { return policy.Decision{Reason: policy.DenyRule} })

	_, err = stream.Recv()
	overGRPC, ok := errors.AsType[*sdk.DeniedError](err)
	if !ok {
		t.Fatalf("the stream ended with %v", err)
	}
	if _, err := io.Copy(io.Discard, res.Body); err == nil {
		t.Error("the answer ended well")
	}
	res.Body.Close()
	overHTTP, ok := errors.AsType[*sdk.DeniedError](<-waits)
	if !ok {
		t.Fatal("the call that waited was not denied")
	}
	w.stop()
	for name, want := range map[string]*sdk.DeniedError{"grpc.testing.TestService/FullDuplexCall": overGRPC, "GET": overHTTP} {
		for _, kind := range []traces.Span_SpanKind{clientSpan, serverSpan} {
			spans := c.find(name, kind)
			if kind == serverSpan && name == "GET" {
				spans = c.find("GET /silent", kind)
			}
			if !slices.ContainsFunc(spans, func(s *traces.Span) bool {
				failed := s.GetStatus().GetCode() == traces.Status_STATUS_CODE_ERROR
				return textOf(s.GetAttributes(), "merlon.decision_id") == want.DecisionID && textOf(s.GetAttributes(), "merlon.reason") == "DENY_RULE" && failed == (kind == clientSpan)
			}) {
				t.Errorf("no span %s (%s) tells of decision %s: %v", name, kind, want.DecisionID, spans)
			}
		}
	}
	broken := c.find("GET", clientSpan)
	if !slices.ContainsFunc(broken, func(s *traces.Span) bool {
		return textOf(s.GetAttributes(), "http.response.status_code") == "200" && s.GetStatus().GetCode() == traces.Status_STATUS_CODE_ERROR
	}) {
		t.Errorf("the answer that broke off is no error: %v", broken)
	}
	if got := counts(c.metric("merlon.decisions"), "merlon.decision", "merlon.reason"); got["decision=deny reason=DENY_RULE"] != 3 {
		t.Errorf("decisions: %v", got)
	}
}

// A handler that panics is counted, as an error.
func TestPanicsAreCounted(t *testing.T) {
	c, address := collect(t, "grpc")
	export(t, "grpc", address)
	w := open(t)
	if err := w.get(t.Context(), "/panic"); err == nil {
		t.Error("the handler did not panic")
	}
	w.stop()
	if got := counts(c.metric("http.server.request.duration"), "http.response.status_code", "error.type"); got["status_code=500 type=panic"] != 1 {
		t.Errorf("http.server.request.duration: %v", got)
	}
}
