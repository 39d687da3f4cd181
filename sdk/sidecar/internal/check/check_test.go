// Checks of real servers that are well, ill, slow, or something else altogether.

package check

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"

	"merlon.dev/sdk/sidecar/internal/hop"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func listen(t testing.TB) net.Listener {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lis.Close() })
	return lis
}

func at(address string) *hop.Upstream {
	return &hop.Upstream{Address: address, Dial: func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	}}
}

// web serves both forms of HTTP in the plain.
func web(t testing.TB, handle http.HandlerFunc) string {
	lis := listen(t)
	var both http.Protocols
	both.SetHTTP1(true)
	both.SetUnencryptedHTTP2(true)
	srv := &http.Server{Protocols: &both, ReadHeaderTimeout: time.Minute, Handler: handle}
	go srv.Serve(lis)
	t.Cleanup(func() { srv.Close() })
	return lis.Addr().String()
}

// saying is a server that answers anything with these bytes.
func saying(t testing.TB, answer string) string {
	lis := listen(t)
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(30 * time.Second))
				conn.Read(make([]byte, 1<<10))
				io.WriteString(conn, answer)
				io.Copy(io.Discard, conn)
			}()
		}
	}()
	return lis.Addr().String()
}

func nobody(t testing.TB) string {
	lis := listen(t)
	defer lis.Close()
	return lis.Addr().String()
}

func TestChecks(t *testing.T) {
	app := web(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.RequestURI() == "/slow":
			<-r.Context().Done()
		case r.URL.RequestURI() == "/moved":
			http.Redirect(w, r, "/well", http.StatusFound)
		case r.URL.RequestURI() == "/host" && r.Host == "app.test", r.URL.RequestURI() == "/well?deep=1":
		default:
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	service := grpc.NewServer()
	status := health.NewServer()
	healthgrpc.RegisterHealthServer(service, status)
	status.SetServingStatus("shop.Orders", healthgrpc.HealthCheckResponse_SERVING)
	status.SetServingStatus("shop.Stock", healthgrpc.HealthCheckResponse_NOT_SERVING)
	lis := listen(t)
	go service.Serve(lis)
	t.Cleanup(service.Stop)
	rpc := lis.Addr().String()

	ok := []int{200, 204}
	for name, tc := range map[string]struct {
		check   Check
		address string
		want    string // of the error; empty: it passes
	}{
		"tcp":                        {Check{Kind: TCP}, app, ""},
		"tcp, nobody":                {Check{Kind: TCP}, nobody(t), "connection refused"},
		"http":                       {Check{Kind: HTTP, Path: "/well?deep=1", Statuses: ok}, app, ""},
		"http2":                      {Check{Kind: HTTP, HTTP2: true, Path: "/well?deep=1", Statuses: ok}, app, ""},
		"http, host":                 {Check{Kind: HTTP, Path: "/host", Host: "app.test", Statuses: ok}, app, ""},
		"http2, host":                {Check{Kind: HTTP, HTTP2: true, Path: "/host", Host: "app.test", Statuses: ok}, app, ""},
		"http, another status":       {Check{Kind: HTTP, Path: "/ill", Statuses: ok}, app, "GET /ill: status 503, and not one of [200 204]"},
		"http2, another status":      {Check{Kind: HTTP, HTTP2: true, Path: "/ill", Statuses: ok}, app, "GET /ill: status 503, and not one of [200 204]"},
		"http, expected":             {Check{Kind: HTTP, Path: "/ill", Statuses: []int{503}}, app, ""},
		"http, not followed":         {Check{Kind: HTTP, Path: "/moved", Statuses: ok}, app, "status 302"},
		"http2, not followed":        {Check{Kind: HTTP, HTTP2: true, Path: "/moved", Statuses: ok}, app, "status 302"},
		"http, slow":                 {Check{Kind: HTTP, Path: "/slow", Statuses: ok, Timeout: 100 * time.Millisecond}, app, "GET /slow: no answer in 100ms"},
		"http2, slow":                {Check{Kind: HTTP, HTTP2: true, Path: "/slow", Statuses: ok, Timeout: 100 * time.Millisecond}, app, "GET /slow: no answer in 100ms"},
		"http, no HTTP":              {Check{Kind: HTTP, Path: "/", Statuses: ok}, saying(t, "SSH-2.0\r\n\r\n"), "malformed HTTP"},
		"http2, no HTTP":             {Check{Kind: HTTP, HTTP2: true, Path: "/", Statuses: ok}, saying(t, "HTTP/1.1 200 OK\r\n\r\n"), "GET /: "},
		"http, hints before":         {Check{Kind: HTTP, Path: "/", Statuses: ok}, saying(t, "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"), ""},
		"http, a head without end":   {Check{Kind: HTTP, Path: "/", Statuses: ok}, saying(t, "HTTP/1.1 200 OK\r\nX: "+strings.Repeat("a", 2*maxHead)), "GET /: "},
		"http, hints without end":    {Check{Kind: HTTP, Path: "/", Statuses: ok}, saying(t, strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", maxHead)), "GET /: "},
		"grpc":                       {Check{Kind: GRPC}, rpc, ""},
		"grpc, of a service":         {Check{Kind: GRPC, Service: "shop.Orders"}, rpc, ""},
		"grpc, not serving":          {Check{Kind: GRPC, Service: "shop.Stock"}, rpc, "the service is NOT_SERVING"},
		"grpc, no such service":      {Check{Kind: GRPC, Service: "shop.Else"}, rpc, `gRPC status "5": "unknown service"`},
		"grpc, no health protocol":   {Check{Kind: GRPC}, app, "status 503"},
		"grpc, nobody":               {Check{Kind: GRPC}, nobody(t), "connection refused"},
		"grpc, a server of HTTP/1.1": {Check{Kind: GRPC}, saying(t, "HTTP/1.1 200 OK\r\n\r\n"), "Check of"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.check.Timeout == 0 {
				tc.check.Timeout = 30 * time.Second
			}
			err := tc.check.Once(t.Context(), at(tc.address))
			if err == nil && tc.want != "" || err != nil && (tc.want == "" || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error %v; want %q", err, tc.want)
			}
		})
	}
}

// Run goes on asking until it is told to stop, and speaks of changes alone.
func TestRunSaysWhatChanges(t *testing.T) {
	var ill atomic.Bool
	var asked atomic.Int64
	app := web(t, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		if ill.Load() {
			w.WriteHeader(http.StatusInternalServerError)
		}
	})
	c := Check{Kind: HTTP, Path: "/", Statuses: []int{200}, Interval: 10 * time.Millisecond, Timeout: 30 * time.Second, Thresholds: hop.Thresholds{Healthy: 2, Unhealthy: 3}}
	u := at(app)
	ctx, cancel := context.WithCancel(t.Context())
	changes, ended := make(chan error, 100), make(chan struct{})
	go func() {
		defer close(ended)
		c.Run(ctx, u, func(err error) { changes <- err })
	}()
	for n := asked.Load() + 10; asked.Load() < n; {
		time.Sleep(time.Millisecond)
	}
	for _, want := range []bool{true, false, true, false} {
		ill.Store(want)
		select {
		case err := <-changes:
			if (err != nil) != want || (u.State(time.Now()) == hop.Unhealthy) != want {
				t.Fatalf("%v, and the upstream is %s; want unhealthy: %t", err, u.State(time.Now()), want)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("nothing changes")
		}
	}
	cancel()
	<-ended
	if n := len(changes); n != 0 {
		t.Errorf("%d further changes", n)
	}
	if got := u.Checked(); got.Passed < 2 || got.Failed < 3 || got.Since.IsZero() {
		t.Errorf("%+v", got)
	}
}

// A check that hangs ends with its upstream's checks.
func TestRunEndsAtOnce(t *testing.T) {
	asked := make(chan struct{}, 10)
	app := web(t, func(_ http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		<-r.Context().Done()
	})
	c := Check{Kind: HTTP, Path: "/", Statuses: []int{200}, Interval: time.Millisecond, Timeout: time.Hour}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	u := at(app)
	go func() {
		defer close(ended)
		c.Run(ctx, u, func(err error) { t.Errorf("changed: %v", err) })
	}()
	<-asked
	cancel()
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Fatal("the check goes on")
	}
}

// FuzzServing: whatever a server answers, nothing but a whole message that says SERVING
// counts as well.
func FuzzServing(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 2, 8, 1}, "0")
	f.Add([]byte{0, 0, 0, 0, 2, 8, 2}, "0")
	f.Add([]byte{1, 0, 0, 0, 2, 8, 1}, "0")
	f.Add([]byte{0, 0, 0, 0, 0}, "0")
	f.Add([]byte{0, 255, 255, 255, 255, 8}, "0")
	f.Add([]byte{}, "14")
	f.Fuzz(func(t *testing.T, body []byte, code string) {
		err := serving(&http.Response{StatusCode: 200, Trailer: http.Header{"Grpc-Status": {code}}}, body)
		if err != nil {
			return
		}
		if code != "0" || len(body) < 7 || body[0] != 0 || !contains(body[5:], 8) {
			t.Errorf("status %q and % x pass for well", code, body)
		}
		if serving(&http.Response{StatusCode: 503, Trailer: http.Header{"Grpc-Status": {code}}}, body) == nil {
			t.Error("status 503 passes for well")
		}
	})
}

func contains(b []byte, c byte) bool { return strings.IndexByte(string(b), c) >= 0 }

func TestErrorsCanBeTold(t *testing.T) {
	c := Check{Kind: TCP, Timeout: 30 * time.Second}
	var op *net.OpError
	if err := c.Once(t.Context(), at(nobody(t))); !errors.As(err, &op) {
		t.Errorf("%v is no network error", err)
	}
}
