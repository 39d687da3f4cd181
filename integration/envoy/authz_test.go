// The pair of real Envoys of examples/envoy, whose one asks the agent about each
// request (ext_authz): what passes, how a denial looks, and that the service behind
// sees nothing of what was denied.

package envoy_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"merlon.dev/integration/stage"
	"merlon.dev/policy/denial"
	"merlon.dev/sdk"
)

const envoyDir = "../../examples/envoy/"

// pair is web and its Envoy, which calls orders through that one's Envoy, which asks
// the agent.
type pair struct {
	t                     *testing.T
	d                     *stage.Domain
	web, orders           *envoy
	webEntry, ordersEntry string
	app                   *app
}

// app is the service behind. It takes plain HTTP and plain gRPC.
type app struct {
	http, grpc string // host:port
	calls      atomic.Int64
	wrong      atomic.Int64 // calls that no policy of these tests ever allows

	mu   sync.Mutex
	last http.Header // guarded by mu
}

func startApp(t *testing.T) *app {
	t.Helper()
	a := &app{}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.http = lis.Addr().String()
	srv := &http.Server{Handler: a, ReadHeaderTimeout: 10 * time.Second}
	var serving sync.WaitGroup
	serving.Go(func() { srv.Serve(lis) })
	calls, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.grpc = calls.Addr().String()
	rpc := grpc.NewServer(grpc.UnknownServiceHandler(a.rpc))
	serving.Go(func() { rpc.Serve(calls) })
	t.Cleanup(func() { srv.Close(); rpc.Stop(); serving.Wait() })
	return a
}

func (a *app) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.calls.Add(1)
	if r.Method == http.MethodPost || !strings.HasPrefix(r.RequestURI, "/orders") {
		a.wrong.Add(1)
	}
	a.mu.Lock()
	a.last = r.Header.Clone()
	a.mu.Unlock()
	if r.Header.Get("Upgrade") == "websocket" {
		a.upgrade(w)
		return
	}
	w.Header().Set("X-Own", "app")
	fmt.Fprintf(w, "%s %s for %s", r.Method, r.RequestURI, r.Header.Get("X-Spiffe-Id"))
}

// upgrade takes the connection, and sends back what it gets.
func (a *app) upgrade(w http.ResponseWriter) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	io.Copy(conn, buffered)
}

// rpc answers every call with nothing.
func (a *app) rpc(_ any, stream grpc.ServerStream) error {
	a.calls.Add(1)
	md, _ := metadata.FromIncomingContext(stream.Context())
	header := http.Header{}
	for name, values := range md {
		header[http.CanonicalHeaderKey(name)] = values
	}
	a.mu.Lock()
	a.last = header
	a.mu.Unlock()
	if err := stream.RecvMsg(&emptypb.Empty{}); err != nil {
		return err
	}
	return stream.SendMsg(&emptypb.Empty{})
}

// seen are the values of a header field that the app got last.
func (a *app) seen(name string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last[name]
}

// twin is another name for Envoy's program, so that the kernel tells two Envoys of one
// user apart.
func twin(t *testing.T, name string) string {
	t.Helper()
	binary, path := envoyBinary(t), filepath.Join(stage.Dir(t), name)
	if err := os.Link(binary, path); err == nil {
		return path
	}
	from, err := os.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o700)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// startPair starts everything, and waits until a call passes. edits are of web.yaml.
func startPair(t *testing.T, edits ...string) *pair {
	t.Helper()
	envoyBinary(t)
	p := &pair{t: t, d: stage.Separate(t, "trust_refresh_hint: 1s"), app: startApp(t)}
	p.web, p.orders = &envoy{t: t, binary: twin(t, "web")}, &envoy{t: t, binary: twin(t, "orders")}
	for _, e := range []*envoy{p.web, p.orders} {
		e.inbound, e.admin = fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	}
	p.webEntry = p.entry("/web", p.web)
	p.ordersEntry = p.entry("/orders", p.orders)
	p.push("")
	socket := []string{"/run/merlon/agent/public/api.sock", strings.TrimPrefix(p.d.WorkloadAPI, "unix://")}
	p.orders.run(envoyConfigOf(t, envoyDir+"orders.yaml", append(socket,
		"port_value: 8443}", portOf(p.orders.inbound), "port_value: 8080}", portOf(p.app.http), "port_value: 8081}", portOf(p.app.grpc), "port_value: 9901}", portOf(p.orders.admin))...))
	p.web.run(envoyConfigOf(t, envoyDir+"web.yaml", append(append(edits, socket...),
		"port_value: 8001}", portOf(p.web.inbound), "port_value: 8443}", portOf(p.orders.inbound), "port_value: 9902}", portOf(p.web.admin))...))
	stage.Eventually(t, "the pair serves", func() error {
		got, err := p.get("/orders")
		if err == nil && got.status != http.StatusOK {
			err = fmt.Errorf("%d: %s", got.status, got.body)
		}
		return err
	})
	return p
}

// entry registers an Envoy, whose SVIDs live for a minute.
func (p *pair) entry(path string, e *envoy) (entryID string) {
	p.t.Helper()
	var entry struct {
		EntryID string `json:"entry_id"`
	}
	stage.Decode(p.t, p.d.Merlon("entry", "create", "-o", "json", "--parent", p.d.AgentID(), "--ttl", "1m",
		"--spiffe-id", p.d.ID(path), "--selector", "unix:path:"+e.binary), &entry)
	return entry.EntryID
}

// push makes the example's policy the one in force, with rego beside its grants, and
// edits, as of a configuration, in them.
func (p *pair) push(rego string, edits ...string) {
	p.t.Helper()
	dir := p.t.TempDir()
	grants, err := os.ReadFile(envoyConfigOf(p.t, envoyDir+"policy/grants.yaml", edits...))
	if err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), grants, 0o600); err != nil {
		p.t.Fatal(err)
	}
	if rego != "" {
		if err := os.WriteFile(filepath.Join(dir, "own.rego"), []byte(rego), 0o600); err != nil {
			p.t.Fatal(err)
		}
	}
	p.d.Merlon("policy", "push", dir)
}

// answered is what web gets.
type answered struct {
	status int
	header http.Header
	body   string
}

func (a *answered) problem(t *testing.T) (problem denial.Problem) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), &problem); err != nil {
		t.Fatalf("the answer is %d %q: %v", a.status, a.body, err)
	}
	return problem
}

func (p *pair) get(path string, fields ...string) (answered, error) {
	return p.do(http.MethodGet, path, fields...)
}

// do makes a request of web, as its bytes are: path is sent as it is.
func (p *pair) do(method, path string, fields ...string) (answered, error) {
	conn, err := net.DialTimeout("tcp", p.web.inbound, 10*time.Second)
	if err != nil {
		return answered{}, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	var sent bytes.Buffer
	fmt.Fprintf(&sent, "%s %s HTTP/1.1\r\nHost: orders\r\n", method, path)
	for i := 0; i < len(fields); i += 2 {
		fmt.Fprintf(&sent, "%s: %s\r\n", fields[i], fields[i+1])
	}
	sent.WriteString("\r\n")
	if _, err := conn.Write(sent.Bytes()); err != nil {
		return answered{}, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return answered{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answered{resp.StatusCode, resp.Header, string(body)}, err
}

// A WebSocket is a request like any other: the policy decides about the upgrade.
func TestEnvoyAsksAboutWebSockets(t *testing.T) {
	t.Parallel()
	p := startPair(t)
	upgrade := func(path string) (status int, echoed string) {
		t.Helper()
		conn, err := net.DialTimeout("tcp", p.web.inbound, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: orders\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", path)
		r := bufio.NewReader(conn)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != http.StatusSwitchingProtocols {
			return resp.StatusCode, ""
		}
		io.WriteString(conn, "hello\n")
		echoed, err = r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, echoed
	}
	if status, echoed := upgrade("/orders/live"); status != http.StatusSwitchingProtocols || echoed != "hello\n" {
		t.Errorf("an allowed WebSocket: %d, %q", status, echoed)
	}
	calls := p.app.calls.Load()
	if status, _ := upgrade("/admin/live"); status != http.StatusForbidden || p.app.calls.Load() != calls {
		t.Errorf("a denied WebSocket: %d, and the app saw %d of it", status, p.app.calls.Load()-calls)
	}
}

func TestEnvoyAsksTheAgent(t *testing.T) {
	t.Parallel()
	p := startPair(t)
	got, err := p.get("/orders/1?full=1", "X-Spiffe-Id", p.d.ID("/admin"), "X-Forwarded-Client-Cert", "URI="+p.d.ID("/admin"), "Connection", "x-spiffe-id")
	if err != nil || got.status != http.StatusOK || got.body != "GET /orders/1?full=1 for "+p.d.ID("/web") {
		t.Errorf("an allowed call: %+v, %v", got, err)
	}
	if ids, certs := p.app.seen("X-Spiffe-Id"), p.app.seen("X-Forwarded-Client-Cert"); len(ids) != 1 || len(certs) != 0 {
		t.Errorf("the app sees x-spiffe-id %q and x-forwarded-client-cert %q; want one and none", ids, certs)
	}

	calls, before, asked := p.app.calls.Load(), p.d.Decisions(), 0
	for _, want := range []struct {
		method, path string
		status       int
		reason       string
	}{
		{"POST", "/orders", 403, "METHOD"},
		{"GET", "/admin", 403, "PATH"},
		{"GET", "/orders/../admin", 400, "BAD_REQUEST"},
		{"GET", "/orders//1", 400, "BAD_REQUEST"},
		{"GET", "/orders/%2e%2e/admin", 400, "BAD_REQUEST"},
		{"GET", "/orders%2f1", 400, "BAD_REQUEST"},
		{"GET", "/orders/%252e", 400, "BAD_REQUEST"},
		{"GET", "/orders/a;b", 400, "BAD_REQUEST"},
		{"GET", `/orders/a\b`, 400, "BAD_REQUEST"},
		// Where the configuration says gRPC, to one who does not speak it.
		{"POST", "/shop.Orders/List/more", 403, "BAD_REQUEST"},
		{"GET", "/shop.Orders/List", 403, "BAD_REQUEST"},
	} {
		got, err := p.do(want.method, want.path)
		if err != nil {
			t.Errorf("%s %s: %v", want.method, want.path, err)
			continue
		}
		if asked++; strings.HasPrefix(want.path, "/shop.Orders/") {
			if got.status != want.status || !strings.Contains(got.body, want.reason) {
				t.Errorf("%s %s: %+v; want %d %s", want.method, want.path, got, want.status, want.reason)
			}
			continue
		}
		problem := got.problem(t)
		if got.status != want.status || string(problem.Reason) != want.reason || problem.Status != want.status ||
			got.header.Get("Content-Type") != denial.ProblemContentType || got.header.Get("X-Decision-Id") != problem.DecisionID {
			t.Errorf("%s %s: %+v; want %d %s", want.method, want.path, got, want.status, want.reason)
		}
		if text := p.d.Explain("decision", problem.DecisionID); !strings.Contains(text, want.reason) || !strings.Contains(text, p.d.ID("/web")) {
			t.Errorf("%s %s is explained as %s", want.method, want.path, text)
		}
	}
	if saw, made := p.app.calls.Load()-calls, p.d.Decisions()-before; saw != 0 || made != asked {
		t.Errorf("the app saw %d of %d denied calls, and %d decisions were recorded; want none, and one each", saw, asked, made)
	}
}

// rpc calls through both Envoys.
func (p *pair) rpc(method string, fields ...string) error {
	p.t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+p.web.inbound, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		p.t.Fatal(err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(p.t.Context(), fields...), time.Minute)
	defer cancel()
	return cc.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{})
}

func TestEnvoyAsksTheAgentAboutGRPC(t *testing.T) {
	t.Parallel()
	p := startPair(t)
	if err := p.rpc("/shop.Orders/List", "x-spiffe-id", p.d.ID("/admin")); err != nil {
		t.Errorf("an allowed call: %v", err)
	}
	if ids := p.app.seen("X-Spiffe-Id"); len(ids) != 1 || ids[0] != p.d.ID("/web") {
		t.Errorf("the app sees x-spiffe-id %q", ids)
	}
	calls, before := p.app.calls.Load(), p.d.Decisions()
	err := p.rpc("/shop.Orders/Delete")
	denied, ok := sdk.DeniedFromStatus(err)
	if !ok || denied.Reason != "METHOD" || status.Code(err) != codes.PermissionDenied {
		t.Fatalf("a denied call: %v; want PermissionDenied for METHOD", err)
	}
	if text := p.d.Explain("decision", denied.DecisionID); !strings.Contains(text, "/shop.Orders/Delete") {
		t.Errorf("the denial is explained as %s", text)
	}
	// Another service is no route to gRPC, whatever its content type: an HTTP call.
	if err := p.rpc("/shop.Other/List"); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a call of another service: %v; want PermissionDenied", err)
	}
	if saw, made := p.app.calls.Load()-calls, p.d.Decisions()-before; saw != 0 || made != 2 {
		t.Errorf("the app saw %d of two denied calls, and %d decisions were recorded; want none, and two", saw, made)
	}

	// What a policy wants sent, over gRPC as far as Envoy knows a code for it.
	p.push(objects, "web-lists-orders", "off", "[List]", "[Other]")
	for want, code := range map[string]codes.Code{"401": codes.Unauthenticated, "404": codes.PermissionDenied, "503": codes.Unavailable} {
		stage.Eventually(t, "a denial with status "+want, func() error {
			err := p.rpc("/shop.Orders/List", "x-want", want)
			if denied, ok := sdk.DeniedFromStatus(err); !ok || denied.Message != "not you" || status.Code(err) != code {
				return fmt.Errorf("%w; want %v with the policy's message", err, code)
			}
			return nil
		})
	}
}

// objects is a policy that answers with opa-envoy-plugin's object.
const objects = `package envoy.authz

want := input.attributes.request.http.headers["x-want"]

default allow := {"allowed": false}

allow := {
	"allowed": true,
	"headers": {"x-role": "reader", "x-team": ["a", "b"]},
	"response_headers_to_add": {"x-policy": "seen", "x-own": "policy"},
	"request_headers_to_remove": ["x-debug"],
} if want == "all"

allow := {
	"allowed": false, "http_status": to_number(want), "body": "not you",
	"headers": {"x-why": ["a", "b"], "cache-control": "private"},
} if not want in ["all", ""]
`

func TestEnvoySendsWhatAPolicyWants(t *testing.T) {
	t.Parallel()
	p := startPair(t)
	p.push(objects)
	var got answered
	stage.Eventually(t, "the policy answers", func() (err error) {
		got, err = p.get("/orders", "X-Want", "all", "X-Role", "admin", "X-Debug", "1", "X-Team", "c")
		if err == nil && len(p.app.seen("X-Role")) == 0 {
			err = fmt.Errorf("%+v", got)
		}
		return err
	})
	for name, want := range map[string]string{"X-Role": "reader", "X-Team": "a,b", "X-Debug": "", "X-Spiffe-Id": p.d.ID("/web")} {
		if saw := strings.Join(p.app.seen(name), "|"); saw != want {
			t.Errorf("the app sees %s %q; want %q", name, saw, want)
		}
	}
	if got.header.Get("X-Policy") != "seen" || strings.Join(got.header["X-Own"], "|") != "app" {
		t.Errorf("web gets %v; want the policy's field, and the app's own", got.header)
	}
	for _, code := range []int{200, 302, 418, 503} {
		got, err := p.do("DELETE", "/orders", "X-Want", strconv.Itoa(code))
		if err != nil || got.status != code || got.body != "not you" || strings.Join(got.header["X-Why"], "|") != "a|b" ||
			got.header.Get("Cache-Control") != "private" || got.header.Get("X-Decision-Id") == "" {
			t.Errorf("a denial with status %d: %+v, %v", code, got, err)
		}
	}
}

// The example's one command.
func TestEnvoyExampleRuns(t *testing.T) {
	t.Parallel()
	binary := envoyBinary(t)
	cmd := exec.CommandContext(t.Context(), stage.Bin(t, stage.Build(t, "example-envoy", "examples/envoy", "")))
	cmd.Dir, cmd.Env = "../..", append(os.Environ(), "ENVOY="+binary)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Everything was seen.") {
		t.Errorf("%v\n%s", err, out)
	}
}
