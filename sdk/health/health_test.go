// What probes see of a process: live while it serves, ready when every check
// passes, and the same over gRPC.

package health_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"merlon.dev/sdk/health"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start serves s on loopback and returns its base URL and a function that
// stops it and returns what Serve returned.
func start(t *testing.T, s *health.Server) (url string, stop func() error) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, lis) }()
	stop = func() error { cancel(); return <-done }
	return "http://" + lis.Addr().String(), stop
}

func get(t *testing.T, url string) (code int, body string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	res, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

func TestReadyFollowsEveryCheck(t *testing.T) {
	s := health.New(slog.New(slog.DiscardHandler))
	var broken atomic.Bool
	s.Check("store", func() error { return nil })
	s.Check("keys", func() error {
		if broken.Load() {
			return errors.New("the intermediate has expired")
		}
		return nil
	})
	url, stop := start(t, s)

	for _, step := range []struct {
		broken bool
		code   int
		want   health.Report
	}{
		{false, 200, health.Report{Ready: true, Checks: map[string]health.Result{"store": {OK: true}, "keys": {OK: true}}}},
		{true, 503, health.Report{Checks: map[string]health.Result{"store": {OK: true}, "keys": {Error: "the intermediate has expired"}}}},
		{false, 200, health.Report{Ready: true, Checks: map[string]health.Result{"store": {OK: true}, "keys": {OK: true}}}},
	} {
		broken.Store(step.broken)
		code, body := get(t, url+"/ready")
		var got health.Report
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatalf("body %q: %v", body, err)
		}
		if code != step.code || !cmp.Equal(got, step.want) {
			t.Errorf("broken=%v: /ready = %d %s; want %d %+v", step.broken, code, body, step.code, step.want)
		}
		if code, _ := get(t, url+"/live"); code != 200 {
			t.Errorf("broken=%v: /live = %d; want 200", step.broken, code)
		}
	}
	if err := stop(); err != nil {
		t.Errorf("Serve after its context ended = %v; want nil", err)
	}
	if s.Report().Ready {
		t.Error("a stopped server reports ready")
	}
}

func TestCheckReplacesTheCheckOfItsName(t *testing.T) {
	s := health.New(slog.New(slog.DiscardHandler))
	s.Check("sync", func() error { return errors.New("first") })
	s.Check("sync", func() error { return errors.New("second") })
	want := health.Report{Checks: map[string]health.Result{"sync": {Error: "second"}}}
	if got := s.Report(); !cmp.Equal(got, want) {
		t.Errorf("Report() = %+v; want %+v", got, want)
	}
}

// What is amiss and no reason to go elsewhere is said, and changes nothing.
func TestNotesLeaveTheServerReady(t *testing.T) {
	s := health.New(slog.New(slog.DiscardHandler))
	text := ""
	s.Note("upstream", func() string { return text })
	if got, want := s.Report(), (health.Report{Ready: true, Checks: map[string]health.Result{}}); !cmp.Equal(got, want) {
		t.Errorf("Report() without anything to note = %+v; want %+v", got, want)
	}
	text = "away"
	if got := s.Report(); !got.Ready || got.Notes["upstream"] != "away" {
		t.Errorf("Report() = %+v; want it ready, with the note", got)
	}
}

func TestMetricsSayWhichBuildRuns(t *testing.T) {
	s := health.New(slog.New(slog.DiscardHandler))
	url, stop := start(t, s)
	code, body := get(t, url+"/metrics")
	for _, want := range []string{"merlon_build_info{", "go_goroutines ", "process_open_fds "} {
		if code != 200 || !strings.Contains(body, want) {
			t.Errorf("/metrics = %d without %q", code, want)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestOnlyProbesAreServed(t *testing.T) {
	s := health.New(slog.New(slog.DiscardHandler))
	url, stop := start(t, s)
	defer func() { _ = stop() }()
	for path, want := range map[string]int{"/": 404, "/debug/pprof/": 404, "/ready/": 404} {
		if code, _ := get(t, url+path); code != want {
			t.Errorf("GET %s = %d; want %d", path, code, want)
		}
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Post(url+"/ready", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST /ready = %d; want 405", res.StatusCode)
	}
}

// countingListener counts the connections that were accepted.
type countingListener struct {
	net.Listener
	accepted atomic.Int64
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.accepted.Add(1)
	}
	return c, err
}

// The process may open so many files only, and others wait for some.
func TestConnectionsAreBounded(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lis := &countingListener{Listener: inner}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- health.New(slog.New(slog.DiscardHandler)).Serve(ctx, lis) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for range 1100 {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	time.Sleep(200 * time.Millisecond) // for what must not happen
	if n := lis.accepted.Load(); n > 1000 {
		t.Errorf("%d connections at the same time; want at most 1000", n)
	}
}

// startGRPC serves the health service and returns a client of it.
func startGRPC(t *testing.T, s *health.Server) healthgrpc.HealthClient {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	healthgrpc.RegisterHealthServer(srv, s.GRPC())
	go func() { _ = srv.Serve(lis) }()
	cc, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close(); srv.Stop() })
	return healthgrpc.NewHealthClient(cc)
}

func TestGRPCAnswersFromTheSameChecks(t *testing.T) {
	s := health.New(slog.New(slog.DiscardHandler))
	s.Check("good", func() error { return nil })
	s.Check("bad", func() error { return errors.New("no") })
	client := startGRPC(t, s)
	for service, want := range map[string]healthgrpc.HealthCheckResponse_ServingStatus{
		"":     healthgrpc.HealthCheckResponse_NOT_SERVING,
		"good": healthgrpc.HealthCheckResponse_SERVING,
		"bad":  healthgrpc.HealthCheckResponse_NOT_SERVING,
	} {
		got, err := client.Check(t.Context(), &healthgrpc.HealthCheckRequest{Service: service})
		if err != nil || got.GetStatus() != want {
			t.Errorf("Check(%q) = %v, %v; want %v", service, got.GetStatus(), err, want)
		}
	}
	if _, err := client.Check(t.Context(), &healthgrpc.HealthCheckRequest{Service: "unheard"}); status.Code(err) != codes.NotFound {
		t.Errorf("Check of an unknown name: %v; want NotFound", err)
	}
	list, err := client.List(t.Context(), &healthgrpc.HealthListRequest{})
	if err != nil || len(list.GetStatuses()) != 3 {
		t.Errorf("List = %v, %v; want 3 statuses", list, err)
	}
}

func TestWatchTellsEachChangeAndEndsWhenTheServerStops(t *testing.T) {
	s := health.New(slog.New(slog.DiscardHandler))
	var broken atomic.Bool
	s.Check("part", func() error {
		if broken.Load() {
			return errors.New("broken")
		}
		return nil
	})
	client := startGRPC(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := client.Watch(ctx, &healthgrpc.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(want healthgrpc.HealthCheckResponse_ServingStatus) {
		t.Helper()
		got, err := stream.Recv()
		if err != nil || got.GetStatus() != want {
			t.Fatalf("Recv = %v, %v; want %v", got.GetStatus(), err, want)
		}
	}
	expect(healthgrpc.HealthCheckResponse_SERVING)
	broken.Store(true)
	expect(healthgrpc.HealthCheckResponse_NOT_SERVING)
	broken.Store(false)
	expect(healthgrpc.HealthCheckResponse_SERVING)
	s.Stop()
	expect(healthgrpc.HealthCheckResponse_NOT_SERVING)
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("after Stop: %v; want Unavailable", err)
	}
}
