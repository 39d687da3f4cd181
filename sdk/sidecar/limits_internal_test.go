// What becomes of connections and requests too many: they are told so at once, counted,
// and come through again when there is room.

package sidecar

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"merlon.dev/policy/denial"
	"merlon.dev/sdk/sdktest"
)

// heldApp answers when it is told to; came gets each request's arrival.
func heldApp(t testing.TB, protocol string) (address string, came chan struct{}, release func()) {
	came = make(chan struct{}, 100)
	hold := make(chan struct{})
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		came <- struct{}{}
		select {
		case <-hold:
		case <-r.Context().Done():
		}
		io.WriteString(w, "served")
	})
	released := false
	release = func() {
		if !released {
			released = true
			close(hold)
		}
	}
	t.Cleanup(release)
	if protocol == "http" {
		address, _ = httpApp(t, handler)
		return address, came, release
	}
	var one http.Protocols
	one.SetUnencryptedHTTP2(true)
	lis := listen(t)
	srv := &http.Server{Protocols: &one, Handler: handler}
	go srv.Serve(lis)
	t.Cleanup(func() { release(); srv.Close() })
	return lis.Addr().String(), came, release
}

// isFull says that res tells of a limit.
func isFull(t testing.TB, res *http.Response, text, reason string) {
	t.Helper()
	var got struct{ Reason string }
	if err := json.Unmarshal([]byte(text), &got); err != nil || res.StatusCode != 503 || got.Reason != reason || res.Header.Get("Content-Type") != denial.ProblemContentType {
		t.Errorf("%s %q; want 503 with %s", res.Status, text, reason)
	}
}

func TestRequestsTooManyAreTurnedAway(t *testing.T) {
	for _, protocol := range []string{"http", "http2"} {
		for reason, limits := range map[string]Limits{
			"LISTENER_FULL": {MaxRequests: 1},
			"UPSTREAM_FULL": {UpstreamRequests: 1},
		} {
			app, came, release := heldApp(t, protocol)
			p := startPairWith(t, protocol, app, func(c *Config) {
				for i := range c.Inbound {
					c.Inbound[i].Limits = limits
				}
			})
			first, other := p.direct(t, protocol, true), p.direct(t, protocol, true)
			served := make(chan string, 1)
			go func() {
				res, err := first.Get("http://orders/")
				if err != nil {
					served <- err.Error()
					return
				}
				defer res.Body.Close()
				text, _ := io.ReadAll(res.Body)
				served <- string(text)
			}()
			<-came
			for range 3 { // the connection goes on, also with a body
				res, text := do(t, other, "POST", "http://orders/", strings.NewReader("body"))
				isFull(t, res, text, reason)
			}
			await(t, "operators to see one request", func() bool {
				shown := p.inbound.sidecar.listeners()[0]
				return shown.Requests == 1 && shown.Upstreams[0].Requests == 1
			})
			release()
			if got := <-served; got != "served" {
				t.Errorf("%s: the first request got %q", protocol, got)
			}
			p.inbound.logged(4)
			if n := p.inbound.metric("merlon_sidecar_failures_total", "failure", reason); n != 3 {
				t.Errorf("%s: %s was counted %v times", protocol, reason, n)
			}
			if len(came) != 0 {
				t.Errorf("%s: the app saw %d requests too many", protocol, len(came))
			}
			if res, text := do(t, other, "GET", "http://orders/", nil); text != "served" {
				t.Errorf("%s: after that: %s %q", protocol, res.Status, text)
			}
		}
	}
}

func TestGRPCCallsTooManyAreTurnedAway(t *testing.T) {
	app := newGRPCApp(t)
	p := startPairWith(t, "grpc", app.addr, func(c *Config) {
		for i := range c.Inbound {
			c.Inbound[i].Limits = Limits{MaxRequests: 1}
		}
	})
	c := grpcClient(t, p.outbound.addrs[0])
	stream, err := c.FullDuplexCall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(stream.Send(&testgrpc.StreamingOutputCallRequest{}), errOf(stream.Recv())); err != nil {
		t.Fatal(err)
	}
	_, err = c.UnaryCall(t.Context(), &testgrpc.SimpleRequest{})
	if info, _ := denial.Info(status.Convert(err)); status.Code(err) != codes.ResourceExhausted || info.GetReason() != "LISTENER_FULL" {
		t.Errorf("a call too many: %v", err)
	}
	if err := errors.Join(stream.CloseSend(), errOf(stream.Recv())); !errors.Is(err, io.EOF) {
		t.Errorf("the stream that was there: %v", err)
	}
	p.inbound.logged(2)
	if _, err := c.UnaryCall(t.Context(), &testgrpc.SimpleRequest{}); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func errOf[T any](_ T, err error) error { return err }

// A request that one replica may not take goes to another.
func TestFullUpstreamsArePassedOver(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	for name, limits := range map[string]Limits{"requests": {UpstreamRequests: 1}, "connections": {UpstreamConnections: 1}} {
		app, came, release := heldApp(t, "http")
		var replicas []string
		for range 2 {
			replicas = append(replicas, start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: "http"}}}).addrs...)
		}
		out := start(t, td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: replicas, Protocol: "http", Limits: limits}}})
		served := make(chan error, 2)
		for range 2 {
			go func() {
				res, err := client(t).Get("http://" + out.addrs[0] + "/")
				if err == nil {
					err = res.Body.Close()
				}
				served <- err
			}()
			<-came
		}
		await(t, "operators to see one of each at each upstream", func() bool {
			return !slices.ContainsFunc(out.sidecar.listeners()[0].Upstreams, func(u shownUpstream) bool { return u.Requests != 1 || u.Conns != 1 })
		})
		res, text := do(t, client(t), "GET", "http://"+out.addrs[0]+"/", nil)
		isFull(t, res, text, "UPSTREAM_FULL")
		release()
		if err := errors.Join(<-served, <-served); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestConnectionsTooManyAreReset(t *testing.T) {
	app, came := echoApp(t)
	td := sdktest.New(t)
	td.Allow("web", "orders")
	in := start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: "tcp", Limits: Limits{UpstreamConnections: 2}}}})
	var log logText
	out := start(t, td, "web", Config{Logger: log.logger(), Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: in.addrs, Protocol: "tcp", Limits: Limits{MaxConnections: 2}}}})
	var kept []net.Conn
	for range 2 {
		conn := dial(t, out.addrs[0])
		if err := say(conn); err != nil {
			t.Fatal(err)
		}
		kept = append(kept, conn)
	}
	isReset := func() { // at once: while connecting, or after
		t.Helper()
		conn, err := net.Dial("tcp", out.addrs[0])
		if err == nil {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(30 * time.Second))
			_, err = conn.Read(make([]byte, 1))
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) {
			t.Errorf("a connection too many: %v; want its end", err)
		}
	}
	isReset()
	if n := out.metric("merlon_sidecar_failures_total", "failure", "LISTENER_FULL"); n != 1 || log.count("connections are refused", "max_connections=2") != 1 {
		t.Errorf("counted %v times, log lines %d", n, log.count("connections are refused"))
	}
	cfg := out.sidecar.config()
	cfg.Outbound[0].Limits.MaxConnections = 3
	if err := out.sidecar.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	isReset() // of the app's sidecar now, for it is full
	if n := came.Load(); n != 2 {
		t.Errorf("the app saw %d connections", n)
	}
	if line := in.logged(1)[0]; line["failure"] != "UPSTREAM_FULL" {
		t.Errorf("the access log has %v", line)
	}
	kept[0].Close()
	await(t, "room for one more", func() bool { return sayAt(out.addrs[0]) == nil })
}
