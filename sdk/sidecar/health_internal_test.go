// Checks of upstreams as operators see them: who gets requests, and what log, metrics
// and admin socket say of it.

package sidecar

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"

	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// logText is a log that a test reads.
type logText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// count is how many lines have all of words.
func (l *logText) count(words ...string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			n++
		}
	}
	return n
}

func (l *logText) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// often is a check that finds out soon, on a loaded machine too.
func often(kind string) HealthCheck {
	h := HealthCheck{Kind: kind, Interval: minInterval, Timeout: 30 * time.Second, HealthyAfter: 1, UnhealthyAfter: 1}
	if kind == "http" {
		h.Path = "/healthz"
	}
	return h
}

// upstream is that of the first listener.
func (r *running) upstream(address string) *hop.Upstream {
	r.t.Helper()
	r.sidecar.mu.Lock()
	defer r.sidecar.mu.Unlock()
	for _, u := range r.sidecar.doors[0].serving.Load().hop.Upstreams.All() {
		if u.Address == address {
			return u
		}
	}
	r.t.Fatalf("there is no upstream %s", address)
	return nil
}

func (r *running) awaitState(address string, want hop.State) {
	r.t.Helper()
	u := r.upstream(address)
	await(r.t, fmt.Sprintf("%s to be %s", address, want), func() bool { return u.State(time.Now()) == want && !u.Checked().Since.IsZero() })
}

// metric is the sum of the series of name that have all of labels.
func (r *running) metric(name string, labels ...string) (sum float64) {
	r.t.Helper()
	families, err := r.sidecar.health.Registry().Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if has(m, labels) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func has(m *dto.Metric, labels []string) bool {
	for i := 0; i < len(labels); i += 2 {
		if !slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName() == labels[i] && l.GetValue() == labels[i+1] }) {
			return false
		}
	}
	return true
}

// replica is an app that says its name, and whether it is well.
func replica(t testing.TB, name string) (address string, ill *atomic.Bool) {
	ill = new(atomic.Bool)
	address, _ = httpApp(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/healthz" && ill.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		io.WriteString(w, name)
	})
	return address, ill
}

// Requests go round a replica that fails its checks, which go the way of requests: by
// mutual TLS, and as the policy allows. Where all fail, requests are tried all the same.
func TestUnhealthyUpstreamsGetNoRequests(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	first, firstIll := replica(t, "first")
	second, secondIll := replica(t, "second")
	var replicas []string
	for _, app := range []string{first, second} {
		replicas = append(replicas, start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: "http"}}}).addrs...)
	}
	var log logText
	out := start(t, td, "web", Config{Logger: log.logger(), Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: replicas, Protocol: "http", HealthCheck: often("http")}}})
	c := client(t)
	answers := func() map[string]int {
		got := map[string]int{}
		for range 40 {
			_, text := do(t, c, "GET", "http://"+out.addrs[0]+"/", nil)
			got[text]++
		}
		return got
	}
	out.awaitState(replicas[0], hop.Healthy)
	out.awaitState(replicas[1], hop.Healthy)
	if got := answers(); got["first"] == 0 || got["second"] == 0 {
		t.Errorf("both are healthy, and the answers are from %v", got)
	}
	firstIll.Store(true)
	out.awaitState(replicas[0], hop.Unhealthy)
	if got := answers(); got["first"] != 0 || got["second"] != 40 {
		t.Errorf("the first is unhealthy, and the answers are from %v", got)
	}
	label := []string{"direction", "outbound", "destination", "orders", "upstream", replicas[0]}
	if got := out.metric("merlon_sidecar_upstream_healthy", label...); got != 0 {
		t.Errorf("merlon_sidecar_upstream_healthy is %v", got)
	}
	for _, result := range []string{"passed", "failed"} {
		if got := out.metric("merlon_sidecar_health_checks_total", append(label, "result", result)...); got == 0 {
			t.Errorf("no check has %s", result)
		}
	}
	if shown := out.sidecar.listeners()[0].Upstreams[0]; shown.State != hop.Unhealthy || shown.ChecksFailed == 0 || !strings.Contains(shown.CheckErr, "status 503") {
		t.Errorf("operators see %+v", shown)
	}
	secondIll.Store(true)
	out.awaitState(replicas[1], hop.Unhealthy)
	if got := answers(); got["first"] == 0 || got["second"] == 0 {
		t.Errorf("none is healthy, and the answers are from %v", got)
	}
	firstIll.Store(false)
	out.awaitState(replicas[0], hop.Healthy)
	if got := answers(); got["first"] != 40 {
		t.Errorf("the first is healthy again, and the answers are from %v", got)
	}
	for _, tc := range []struct {
		n     int
		words []string
	}{
		{1, []string{"upstream is unhealthy", "level=WARN", replicas[0], "destination=orders", "status 503"}},
		{1, []string{"upstream is unhealthy", replicas[1]}},
		{1, []string{"no upstream is healthy: requests go to all of them"}},
		{1, []string{"upstream is healthy again", "level=INFO", replicas[0]}},
	} {
		if got := log.count(tc.words...); got != tc.n {
			t.Errorf("%d lines with %q; want %d", got, tc.words, tc.n)
		}
	}
}

// A replica that is somebody else, or whose policy denies the check, is not well.
func TestChecksProveWhoAnswersAndThatItMayBeCalled(t *testing.T) {
	td := sdktest.New(t)
	app, _ := replica(t, "app")
	in := start(t, td, "stock", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: "http"}}})
	for name, tc := range map[string]struct{ to, kind, want string }{
		"somebody else by TCP":  {"orders", "tcp", "spiffe://"},
		"somebody else by HTTP": {"orders", "http", "spiffe://"},
		"denied":                {"stock", "http", "status 403"},
	} {
		out := start(t, td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: tc.to, Upstreams: in.addrs, Protocol: "http", HealthCheck: often(tc.kind)}}})
		out.awaitState(in.addrs[0], hop.Unhealthy)
		if got := out.upstream(in.addrs[0]).Checked().Err; !strings.Contains(got, tc.want) {
			t.Errorf("%s: %q; want %q", name, got, tc.want)
		}
	}
}

// The sidecar of an app that is not well is not ready, so that others send elsewhere.
func TestReadinessIsTheAppsToo(t *testing.T) {
	for _, protocol := range []string{"http", "tcp"} {
		app, ill := replica(t, "app")
		td := sdktest.New(t)
		in := start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: protocol, HealthCheck: often("http")}}})
		in.awaitState(app, hop.Healthy)
		if got := in.sidecar.health.Report().Checks["app"]; !got.OK {
			t.Errorf("%s: the app is well: %+v", protocol, got)
		}
		ill.Store(true)
		in.awaitState(app, hop.Unhealthy)
		if got := in.sidecar.health.Report(); got.Ready || !strings.Contains(got.Checks["app"].Error, "status 503") {
			t.Errorf("%s: the app is not well: %+v", protocol, got)
		}
	}
}

// Readiness is that of the listeners of the moment: a reload brings the first inbound
// one, and takes it away.
func TestReadinessFollowsAReload(t *testing.T) {
	td := sdktest.New(t)
	td.SetPolicyMaxAge(time.Millisecond)
	app, ill := replica(t, "app")
	ill.Store(true)
	r := start(t, td, "orders", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "web", Upstreams: []string{"127.0.0.1:1"}, Protocol: "http"}}})
	td.StopAgent("orders")
	s := r.sidecar
	await(t, "a policy that is too old", func() bool { return s.id.PolicyReady() != nil })
	if got := s.health.Report(); !got.Ready {
		t.Errorf("nothing inbound needs a policy or an app: %+v", got)
	}
	cfg := s.config()
	cfg.Inbound = []Inbound{{Listen: "[::1]:0", App: app, Protocol: "http", HealthCheck: often("http")}}
	if err := s.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	await(t, "the app to be found unhealthy", func() bool { return s.upstreams.appReady() != nil })
	got := s.health.Report()
	if got.Ready || !strings.Contains(got.Checks["policy"].Error, "older than the agent allows") || !strings.Contains(got.Checks["app"].Error, "status 503") {
		t.Errorf("with an inbound listener: %+v", got)
	}
	cfg.Inbound = nil
	if err := s.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if got := s.health.Report(); !got.Ready {
		t.Errorf("without it again: %+v", got)
	}
}

func TestGRPCServicesAreAskedByTheirOwnProtocol(t *testing.T) {
	app := newGRPCApp(t)
	status := health.NewServer()
	p := startPair(t, "grpc", app.addr)
	check := often("grpc")
	check.Service = "shop.Orders"
	out := start(t, p.td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: p.inbound.addrs, Protocol: "grpc", HealthCheck: check}}})
	out.awaitState(p.inbound.addrs[0], hop.Unhealthy)
	if got := out.upstream(p.inbound.addrs[0]).Checked().Err; !strings.Contains(got, `gRPC status "12"`) { // it has no such service
		t.Error(got)
	}
	served := newGRPCAppWith(t, func(a *grpcApp) { healthgrpc.RegisterHealthServer(a.server, status) })
	status.SetServingStatus("shop.Orders", healthgrpc.HealthCheckResponse_NOT_SERVING)
	p = startPair(t, "grpc", served.addr)
	out = start(t, p.td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: p.inbound.addrs, Protocol: "grpc", HealthCheck: check}}})
	out.awaitState(p.inbound.addrs[0], hop.Unhealthy)
	status.SetServingStatus("shop.Orders", healthgrpc.HealthCheckResponse_SERVING)
	out.awaitState(p.inbound.addrs[0], hop.Healthy)
}

// What is known of upstreams is known once, by whatever listener one goes there, and a
// reload that leaves them as they are forgets nothing.
func TestWhatIsKnownOfUpstreamsOutlivesAReload(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	app, ill := replica(t, "app")
	ill.Store(true)
	in := start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: "http"}}})
	one := Outbound{Listen: "127.0.0.1:0", To: "orders", Upstreams: in.addrs, Protocol: "http", HealthCheck: often("http")}
	two := one
	two.Listen = "[::1]:0"
	var log logText
	out := start(t, td, "web", Config{Logger: log.logger(), Outbound: []Outbound{one, two}})
	out.awaitState(in.addrs[0], hop.Unhealthy)
	s := out.sidecar
	before := out.upstream(in.addrs[0])
	if other := s.doors[1].serving.Load().hop.Upstreams.All()[0]; other != before {
		t.Error("each listener has an upstream of its own")
	}
	cfg := s.config()
	cfg.IdleTimeout = 7 * time.Second
	if err := s.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if out.upstream(in.addrs[0]) != before {
		t.Error("a reload forgets what is known of an upstream")
	}
	if got := log.count("upstream is unhealthy"); got != 1 {
		t.Errorf("%d lines say that it is unhealthy", got)
	}
	cfg.Outbound = slices.Clone(cfg.Outbound)
	for i := range cfg.Outbound {
		cfg.Outbound[i].HealthCheck = HealthCheck{}
	}
	if err := s.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if got := out.upstream(in.addrs[0]); got == before || got.State(time.Now()) != hop.Healthy {
		t.Error("an upstream without checks is not tried afresh")
	}
	if lists := s.upstreams.all(); len(lists) != 1 {
		t.Errorf("%d lists of upstreams are left", len(lists))
	}
}
