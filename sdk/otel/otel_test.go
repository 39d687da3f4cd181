// What a collector sees of services with the SDK: the names, units and attributes
// of OpenTelemetry's conventions and of Merlon, and one trace from caller to callee,
// with the denial in it.

package otel_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	api "go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/semconv/v1.43.0/httpconv"
	"go.opentelemetry.io/otel/semconv/v1.43.0/rpcconv"
	"go.opentelemetry.io/otel/trace"
	metrics "go.opentelemetry.io/proto/otlp/metrics/v1"
	traces "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	"merlon.dev/sdk/httpauth"
	_ "merlon.dev/sdk/otel"
	"merlon.dev/sdk/sdktest"
)

func TestMain(m *testing.M) {
	for _, v := range os.Environ() { // what the machine has set is not for us
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "OTEL_") {
			os.Unsetenv(name)
		}
	}
	goleak.VerifyTestMain(m)
}

// world is two services that call each other over HTTP and gRPC. A call with "denied"
// in its path, and of the method EmptyCall, is denied.
type world struct {
	td          *sdktest.TD
	orders, web *sdk.Identity
	url         string
	http        *http.Client
	grpc        testgrpc.TestServiceClient
	stop        func() // ends both services, which sends what is left
}

func open(t *testing.T, opts ...sdk.Option) *world {
	t.Helper()
	w := &world{td: sdktest.New(t)}
	w.td.Decide(func(in *policy.Input) policy.Decision {
		if in.Source != w.td.ID("web").String() || strings.Contains(in.Path, "denied") || strings.HasSuffix(in.Path, "/EmptyCall") {
			return policy.Decision{Reason: policy.PathNotGranted}
		}
		return policy.Decision{Allow: true, Reason: policy.Allowed}
	})
	w.orders, w.web = w.td.Workload("orders", opts...), w.td.Workload("web", opts...)
	var stops []func()
	w.url = serveHTTP(t, w.orders, &stops)
	w.http = httpauth.Client(w.web, sdk.Service("orders"))
	address := serveGRPC(t, w.orders, &stops)
	cc, err := grpc.NewClient("dns:///"+address, grpcauth.DialOptions(w.web, sdk.Service("orders"))...)
	if err != nil {
		t.Fatal(err)
	}
	w.grpc = testgrpc.NewTestServiceClient(cc)
	stopped := false
	w.stop = func() {
		if stopped {
			return
		}
		stopped = true
		w.http.CloseIdleConnections()
		cc.Close()
		for _, stop := range stops {
			stop()
		}
		w.web.Close()
		w.orders.Close()
	}
	t.Cleanup(w.stop)
	return w
}

func serveHTTP(t *testing.T, id *sdk.Identity, stops *[]func()) string {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		_, span := api.Tracer("orders").Start(r.Context(), "look up the order")
		span.End()
		io.WriteString(w, "order")
	})
	mux.HandleFunc("GET /broken", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	mux.HandleFunc("GET /panic", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	mux.HandleFunc("GET /silent", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	mux.HandleFunc("GET /endless", func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	srv := &http.Server{Handler: httpauth.Handler(id, mux), TLSConfig: id.ServerTLS(), ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.ServeTLS(lis, "", "") }()
	*stops = append(*stops, func() { srv.Close(); <-done })
	return "https://" + lis.Addr().String()
}

func serveGRPC(t *testing.T, id *sdk.Identity, stops *[]func()) string {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpcauth.ServerOptions(id)...)
	testgrpc.RegisterTestServiceServer(srv, &service{})
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(lis) }()
	*stops = append(*stops, func() { srv.Stop(); <-done })
	return lis.Addr().String()
}

type service struct {
	testgrpc.UnimplementedTestServiceServer
}

func (*service) UnaryCall(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	return &testgrpc.SimpleResponse{}, nil
}

func (*service) FullDuplexCall(stream testgrpc.TestService_FullDuplexCallServer) error {
	for {
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := stream.Send(&testgrpc.StreamingOutputCallResponse{}); err != nil {
			return err
		}
	}
}

func (w *world) get(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.url+path, nil)
	if err != nil {
		return err
	}
	res, err := w.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, err = io.Copy(io.Discard, res.Body)
	return err
}

// export sets the variables with which a program exports to address.
func export(t *testing.T, protocol, address string) {
	t.Helper()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
	t.Setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
	t.Setenv("OTEL_SERVICE_NAME", "shop")
}

// calls makes one call of each kind, below a span of the program's own, and gives
// that.
func (w *world) calls(t *testing.T) trace.SpanContext {
	t.Helper()
	ctx, root := api.Tracer("web").Start(t.Context(), "check out")
	defer root.End()
	if err := errors.Join(w.get(ctx, "/orders/1?secret=1"), w.get(ctx, "/broken")); err != nil {
		t.Fatal(err)
	}
	if _, err := w.grpc.UnaryCall(ctx, &testgrpc.SimpleRequest{}); err != nil {
		t.Fatal(err)
	}
	stream, err := w.grpc.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(stream.Send(&testgrpc.StreamingOutputCallRequest{}), stream.CloseSend()); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return root.SpanContext()
}

func TestACollectorSeesWhatHappens(t *testing.T) {
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		t.Run(protocol, func(t *testing.T) {
			c, address := collect(t, protocol)
			export(t, protocol, address)
			w := open(t)
			root := w.calls(t)
			deniedHTTP, deniedGRPC := w.denials(t)
			stranger(t, w)
			seesState(t, c)
			w.stop()
			seesMetrics(t, c)
			seesOneTrace(t, c, root)
			seesDenials(t, c, deniedHTTP, deniedGRPC)
			if all := c.received(); strings.Contains(all, "spiffe://") || strings.Contains(all, "secret") {
				t.Errorf("a SPIFFE ID or a query has been exported:\n%s", all)
			}
			if c.service != "shop" {
				t.Errorf("service.name is %q", c.service)
			}
		})
	}
}

// denials makes two calls that are denied, and gives what the caller hears.
func (w *world) denials(t *testing.T) (overHTTP, overGRPC *sdk.DeniedError) {
	t.Helper()
	err := w.get(t.Context(), "/denied")
	overHTTP, ok := errors.AsType[*sdk.DeniedError](err)
	if !ok {
		t.Fatal(err)
	}
	_, err = w.grpc.EmptyCall(t.Context(), &testgrpc.Empty{})
	if overGRPC, ok = errors.AsType[*sdk.DeniedError](err); !ok {
		t.Fatal(err)
	}
	return overHTTP, overGRPC
}

// stranger connects as somebody of another trust domain, and as nobody.
func stranger(t *testing.T, w *world) {
	t.Helper()
	other := sdktest.New(t).Workload("web")
	address := strings.TrimPrefix(w.url, "https://")
	if _, err := other.DialTLS(sdk.ID(w.td.ID("orders").String()))(t.Context(), "tcp", address); err == nil {
		t.Fatal("a stranger got a connection")
	}
	other.Close()
}

// seesState waits for the gauges of services that are open.
func seesState(t *testing.T, c *collector) {
	t.Helper()
	for name, unit := range map[string]string{
		"merlon.x509_svid.time_left": "s", "merlon.policy.age": "s", "merlon.revocations.age": "s",
		"merlon.connections": "{connection}", "merlon.calls": "{call}",
	} {
		eventually(t, name, func() bool { return c.metric(name) != nil })
		m := c.metric(name)
		if m.GetUnit() != unit || m.GetDescription() == "" {
			t.Errorf("%s: unit %q, want %q", name, m.GetUnit(), unit)
		}
		points := append(m.GetGauge().GetDataPoints(), m.GetSum().GetDataPoints()...)
		if len(points) != 1 || len(points[0].GetAttributes()) != 0 {
			t.Fatalf("%s: %v", name, m)
		}
	}
	left := c.metric("merlon.x509_svid.time_left").GetGauge().GetDataPoints()[0].GetAsDouble()
	if left < 1800 || left > 3600 {
		t.Errorf("an X509-SVID of one hour has %v s left", left)
	}
	eventually(t, "two connections, of both ends", func() bool {
		return c.metric("merlon.connections").GetSum().GetDataPoints()[0].GetAsInt() == 4
	})
}

// counts is a metric by its attributes, as text.
func counts(m *metrics.Metric, keys ...string) map[string]uint64 {
	found := make(map[string]uint64)
	for _, p := range m.GetHistogram().GetDataPoints() {
		found[describe(p.GetAttributes(), keys...)] += p.GetCount()
	}
	for _, p := range m.GetSum().GetDataPoints() {
		found[describe(p.GetAttributes(), keys...)] += uint64(p.GetAsInt())
	}
	return found
}

func seesMetrics(t *testing.T, c *collector) {
	t.Helper()
	http := []string{"http.request.method", "url.scheme", "http.response.status_code", "http.route", "network.protocol.version", "error.type"}
	rpc := []string{"rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type"}
	for _, tt := range []struct {
		name, unit string
		keys       []string
		want       map[string]uint64
	}{
		{httpconv.ServerRequestDuration{}.Name(), httpconv.ServerRequestDuration{}.Unit(), http, map[string]uint64{
			"method=GET scheme=https status_code=200 route=/orders/{id} version=2 type=": 1,
			"method=GET scheme=https status_code=502 route=/broken version=2 type=502":   1,
			"method=GET scheme=https status_code=403 route= version=2 type=":             1,
		}},
		{httpconv.ClientRequestDuration{}.Name(), httpconv.ClientRequestDuration{}.Unit(), http, map[string]uint64{
			"method=GET scheme= status_code=200 route= version=2 type=":    1,
			"method=GET scheme= status_code=502 route= version=2 type=502": 1,
			"method=GET scheme= status_code=403 route= version=2 type=403": 1,
		}},
		{rpcconv.ServerCallDuration{}.Name(), rpcconv.ServerCallDuration{}.Unit(), rpc, map[string]uint64{
			"name=grpc method=grpc.testing.TestService/UnaryCall status_code=OK type=":                1,
			"name=grpc method=grpc.testing.TestService/FullDuplexCall status_code=OK type=":           1,
			"name=grpc method=grpc.testing.TestService/EmptyCall status_code=PERMISSION_DENIED type=": 1,
		}},
		{rpcconv.ClientCallDuration{}.Name(), rpcconv.ClientCallDuration{}.Unit(), rpc, map[string]uint64{
			"name=grpc method=grpc.testing.TestService/UnaryCall status_code=OK type=":                                 1,
			"name=grpc method=grpc.testing.TestService/FullDuplexCall status_code=OK type=":                            1,
			"name=grpc method=grpc.testing.TestService/EmptyCall status_code=PERMISSION_DENIED type=PERMISSION_DENIED": 1,
		}},
		{"merlon.decisions", "{decision}", []string{"merlon.decision", "merlon.reason"}, map[string]uint64{
			"decision=allow reason=ALLOWED": 4, "decision=deny reason=PATH": 2,
		}},
		{"merlon.handshakes", "{handshake}", []string{"merlon.handshake.role", "merlon.handshake.outcome"}, map[string]uint64{
			"role=server outcome=accepted": 2, "role=client outcome=accepted": 2, "role=client outcome=refused": 1,
		}},
	} {
		m := c.metric(tt.name)
		if m.GetUnit() != tt.unit || tt.unit == "" {
			t.Errorf("%s: unit %q, want %q", tt.name, m.GetUnit(), tt.unit)
		}
		got := counts(m, tt.keys...)
		for attrs, n := range tt.want {
			if got[attrs] < n {
				t.Errorf("%s: %v; want %d × %s", tt.name, got, n, attrs)
			}
		}
		if len(got) > len(tt.want)+1 { // the stranger's handshake fails at the other side, too
			t.Errorf("%s: %v; want %v", tt.name, got, tt.want)
		}
		for _, p := range m.GetHistogram().GetDataPoints() {
			if p.GetSum() <= 0 || p.GetSum() > 60 || !slices.Equal(p.GetExplicitBounds(), bounds) {
				t.Errorf("%s: %v is not in seconds, or has other buckets", tt.name, p)
			}
			if client := strings.Contains(tt.name, ".client."); client != (textOf(p.GetAttributes(), "server.address") == "127.0.0.1") {
				t.Errorf("%s: server.address in %v", tt.name, p.GetAttributes())
			}
		}
	}
}

// bounds are the buckets that the conventions advise.
var bounds = []float64{0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10}

const (
	serverSpan   = traces.Span_SPAN_KIND_SERVER
	clientSpan   = traces.Span_SPAN_KIND_CLIENT
	internalSpan = traces.Span_SPAN_KIND_INTERNAL
)

// seesOneTrace follows each call from the span of the caller to that of the callee,
// and on to the handler's own.
func seesOneTrace(t *testing.T, c *collector, root trace.SpanContext) {
	t.Helper()
	for called, serves := range map[string]string{
		"grpc.testing.TestService/UnaryCall":      "grpc.testing.TestService/UnaryCall",
		"grpc.testing.TestService/FullDuplexCall": "grpc.testing.TestService/FullDuplexCall",
		"GET": "GET /orders/{id}",
	} {
		servers := c.find(serves, serverSpan)
		if len(servers) != 1 {
			t.Fatalf("%d server spans %q", len(servers), serves)
		}
		server := servers[0]
		i := slices.IndexFunc(c.find(called, clientSpan), func(s *traces.Span) bool { return string(s.GetSpanId()) == string(server.GetParentSpanId()) })
		if i < 0 {
			t.Fatalf("%s: no client span is the parent of the server's", called)
		}
		client := c.find(called, clientSpan)[i]
		traceID, parent := root.TraceID(), root.SpanID()
		if string(client.GetParentSpanId()) != string(parent[:]) || string(client.GetTraceId()) != string(traceID[:]) || string(server.GetTraceId()) != string(traceID[:]) {
			t.Errorf("%s: client span %v and server span %v are not of trace %s", called, client, server, traceID)
		}
		if client.GetStatus().GetCode() == traces.Status_STATUS_CODE_ERROR || textOf(server.GetAttributes(), "merlon.reason") != "ALLOWED" {
			t.Errorf("%s: client span %v, server span %v", called, client, server)
		}
	}
	handler := c.find("look up the order", internalSpan)
	if len(handler) != 1 || string(handler[0].GetParentSpanId()) != string(c.find("GET /orders/{id}", serverSpan)[0].GetSpanId()) {
		t.Errorf("the handler's own span: %v", handler)
	}
}

// seesDenials finds each denial in the trace of the caller: an error, with the
// decision that the caller was told of.
func seesDenials(t *testing.T, c *collector, overHTTP, overGRPC *sdk.DeniedError) {
	t.Helper()
	for name, want := range map[string]*sdk.DeniedError{"GET": overHTTP, "grpc.testing.TestService/EmptyCall": overGRPC} {
		for _, kind := range []traces.Span_SpanKind{clientSpan, serverSpan} {
			spans := c.find(name, kind)
			i := slices.IndexFunc(spans, func(s *traces.Span) bool { return textOf(s.GetAttributes(), "merlon.decision_id") == want.DecisionID })
			if i < 0 {
				t.Errorf("no span %s (%s) tells of decision %s", name, kind, want.DecisionID)
				continue
			}
			got := spans[i]
			if textOf(got.GetAttributes(), "merlon.reason") != "PATH" || textOf(got.GetAttributes(), "merlon.decision") != "deny" {
				t.Errorf("span %s (%s): %v", name, kind, got.GetAttributes())
			}
			failed := got.GetStatus().GetCode() == traces.Status_STATUS_CODE_ERROR
			if failed != (kind == clientSpan) { // to the server a refusal is no error
				t.Errorf("span %s (%s) has status %v", name, kind, got.GetStatus())
			}
			if kind == clientSpan && !strings.Contains(got.GetStatus().GetMessage(), want.DecisionID) {
				t.Errorf("span %s: %q", name, got.GetStatus().GetMessage())
			}
		}
	}
}
