// What connections leave behind that end in every possible way: nothing. And while
// there are many of them, and while they end, others are served and refused as ever.

package sdk_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

// leaksEnv is how many idle connections there are; 200 without it.
const leaksEnv = "MERLON_LEAKS"

// party is a server of all protocols, with two guests who are there before the crowd
// comes: web, who may call, and the intruder, who may not.
type party struct {
	td        *sdktest.TD
	orders    *sdk.Identity
	addresses map[string]string // by protocol
	guests    map[string]*guest
	log       bytes.Buffer // of the HTTP server

	mu     sync.Mutex
	served map[string]bool // guarded by mu: callers that a handler or Accept has seen
}

// guestConns are those that two guests keep open: one over HTTP and one over gRPC.
const guestConns = 4

type guest struct {
	id   *sdk.Identity
	http *http.Client
	grpc testgrpc.TestServiceClient
}

func (p *party) saw(ctx context.Context) {
	name := "nobody"
	if peer, ok := sdk.PeerFromContext(ctx); ok {
		name = peer.ID.Path()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.served[name] = true
}

// partyService is the gRPC service.
type partyService struct {
	testgrpc.UnimplementedTestServiceServer
	party *party
}

// EmptyCall implements the service.
func (s *partyService) EmptyCall(ctx context.Context, in *testgrpc.Empty) (*testgrpc.Empty, error) {
	s.party.saw(ctx)
	return in, nil
}

func newParty(t *testing.T) *party {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.CompilePolicy()
	p := &party{td: td, orders: td.Workload("orders"), guests: make(map[string]*guest), served: make(map[string]bool)}
	listen := func() net.Listener {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return lis
	}
	serve := func(run func(net.Listener) error, stop func()) string {
		lis, done := listen(), make(chan struct{})
		go func() { defer close(done); _ = run(lis) }()
		t.Cleanup(func() { stop(); <-done })
		return lis.Addr().String()
	}
	web := &http.Server{
		TLSConfig:         p.orders.ServerTLS(),
		ReadHeaderTimeout: 5 * time.Second, // also of the handshake
		ErrorLog:          log.New(&p.log, "", 0),
		Handler:           httpauth.Handler(p.orders, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { p.saw(r.Context()) })),
	}
	rpc := grpc.NewServer(grpcauth.ServerOptions(p.orders)...)
	testgrpc.RegisterTestServiceServer(rpc, &partyService{party: p})
	overHTTP := serve(func(lis net.Listener) error { return web.ServeTLS(lis, "", "") }, func() { web.Close() })
	p.addresses = map[string]string{
		"http/1.1": overHTTP, "h2": overHTTP,
		"grpc": serve(rpc.Serve, rpc.Stop),
		"tcp":  echo(t, p.orders.Listener(listen())),
	}
	for _, name := range []string{"web", "intruder"} {
		id := td.Workload(name)
		cc, err := grpc.NewClient("passthrough:///"+p.addresses["grpc"], grpcauth.DialOptions(id, sdk.Service("orders"))...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cc.Close() })
		client := httpauth.Client(id, sdk.Service("orders"))
		t.Cleanup(client.CloseIdleConnections)
		p.guests[name] = &guest{id, client, testgrpc.NewTestServiceClient(cc)}
	}
	return p
}

// check has both guests call in every way, on connections that they have and on new
// ones.
func (p *party) check(t *testing.T, when string) {
	t.Helper()
	for name, g := range p.guests {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		fresh, one := httpauth.Client(g.id, sdk.Service("orders")), httpauth.Client(g.id, sdk.Service("orders"))
		defer fresh.CloseIdleConnections()
		defer one.CloseIdleConnections()
		for way, err := range map[string]error{
			"HTTP": get(ctx, g.http, p.addresses["h2"]), "HTTP, new": get(ctx, fresh, p.addresses["h2"]),
			"gRPC": emptyCall(ctx, g.grpc), "TCP": p.knock(ctx, g.id),
		} {
			if _, denied := errors.AsType[*sdk.DeniedError](err); name == "web" && err != nil || name == "intruder" && !denied && (err == nil || way != "TCP") {
				t.Errorf("%s: %s by %s: %v", when, way, name, err)
			}
		}
	}
}

func get(ctx context.Context, c *http.Client, address string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+"/", nil)
	if err != nil {
		return err
	}
	res, err := c.Do(r)
	if err != nil {
		return err
	}
	return res.Body.Close()
}

func emptyCall(ctx context.Context, c testgrpc.TestServiceClient) error {
	_, err := c.EmptyCall(ctx, &testgrpc.Empty{})
	return err
}

// knock makes a connection of the plain kind; a denied one is closed without a word.
func (p *party) knock(ctx context.Context, id *sdk.Identity) error {
	conn, err := id.DialTLS(sdk.Service("orders"))(ctx, "tcp", p.addresses["tcp"])
	if err != nil {
		return err
	}
	defer conn.Close()
	return say(conn, "hello")
}

// footprint is what the process holds.
type footprint struct {
	conns      int64
	goroutines int
	files      int
	heap, rss  int64 // bytes
}

func (p *party) footprint(t *testing.T) footprint {
	t.Helper()
	for range 3 { // stacks are freed by one collection and given back by the next
		debug.FreeOSMemory()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return footprint{p.orders.LiveConns(), runtime.NumGoroutine(), len(files), int64(m.HeapAlloc), rss(t)}
}

func (f footprint) String() string {
	return fmt.Sprintf("%d connections, %d goroutines, %d files, heap %d KiB, RSS %d KiB", f.conns, f.goroutines, f.files, f.heap>>10, f.rss>>10)
}

func (f footprint) within(allowed footprint) bool {
	return f.conns <= allowed.conns && f.goroutines <= allowed.goroutines && f.files <= allowed.files && f.heap <= allowed.heap && f.rss <= allowed.rss
}

func rss(t *testing.T) int64 {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(status)); lines.Scan(); {
		if kib, ok := strings.CutPrefix(lines.Text(), "VmRSS:"); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(kib, "kB")), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("/proc/self/status has no VmRSS")
	return 0
}

// storm has idle connections of every protocol, and handshakes that never end, and
// ends them in every way. peak is what the process holds while they are there.
func (p *party) storm(t *testing.T, idle, slow int) (peak footprint) {
	t.Helper()
	var crowds []*crowd
	for protocol, address := range p.addresses {
		crowds = append(crowds, startCrowd(t, p.td.Address("web"), crowdSpec{
			Protocol: protocol, Address: address, Idle: idle / len(p.addresses), Slow: slow / len(p.addresses),
			Vanish: idle >= 1000 && os.Geteuid() == 0, // which is noticed by keepalive, after 15 s
		}))
	}
	for _, c := range crowds {
		c.expect(t, "open")
	}
	if got := p.orders.LiveConns(); got < int64(idle) {
		t.Errorf("%d connections are in the table; want %d", got, idle)
	}
	p.check(t, "among many")
	peak = p.footprint(t)
	for _, c := range crowds {
		if _, err := fmt.Fprintln(c.in, "end"); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range crowds {
		c.expect(t, "ended")
	}
	p.check(t, "while they end")
	for _, c := range crowds {
		c.expect(t, "refused")
		c.kill()
	}
	p.check(t, "after they have ended")
	return peak
}

// T38, T51. `make leaks` has ten thousand of them.
func TestConnectionsLeaveNothingBehind(t *testing.T) {
	idle := 200
	if n, err := strconv.Atoi(os.Getenv(leaksEnv)); err == nil {
		idle = n
	}
	p := newParty(t)
	p.storm(t, 40, 0) // what is made once is made now
	time.Sleep(time.Second)
	before := p.footprint(t)
	t.Logf("before: %v", before)
	began := time.Now()
	peak := p.storm(t, idle, idle/4)
	t.Logf("at most: %v", peak)
	allowed := footprint{
		conns: guestConns, goroutines: before.goroutines, files: before.files,
		heap: before.heap + 4<<20 + int64(peak.goroutines)<<9, // the runtime keeps half a KiB of every goroutine that there was at a time
		rss:  before.rss + max(128<<20, (peak.rss-before.rss)/4),
	}
	var after footprint
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if after = p.footprint(t); after.within(allowed) {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("a minute later: %v; want at most %v", after, allowed)
			break
		}
	}
	t.Logf("after %v: %v", time.Since(began).Round(time.Millisecond), after)
	if log := p.log.String(); strings.Contains(log, "panic") {
		t.Error(log)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.served) != 1 || !p.served["/web"] {
		t.Errorf("served were %v; want web alone", p.served)
	}
}

// A peer that has gone, and a program that does not read and so never learns of it: the
// connection is in the table until the peer's X509-SVID ends, and no longer.
func TestUnreadEndsLeaveTheTableAtExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := sdktest.NewInMemory(t)
		td.Allow("web", "orders")
		orders, web := td.Workload("orders"), td.Workload("web")
		lis := orders.Listener(td.Listen("orders:1"))
		defer lis.Close()
		const conns = 20
		accepted := make(chan net.Conn, conns)
		go func() {
			for range conns {
				if conn, err := lis.Accept(); err == nil {
					accepted <- conn // and nobody reads
				}
			}
			close(accepted)
		}()
		for range conns {
			conn, err := web.DialTLS(sdk.Service("orders"))(t.Context(), "tcp", "orders:1")
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
		}
		time.Sleep(time.Hour - time.Minute)
		if n := orders.LiveConns(); n != conns {
			t.Errorf("%d connections before the end; want %d", n, conns)
		}
		time.Sleep(time.Minute + time.Second)
		if n := orders.LiveConns(); n != 0 {
			t.Errorf("%d connections after the end", n)
		}
		for conn := range accepted {
			if _, err := conn.Write([]byte("x")); err == nil {
				t.Error("the connection can still be written to")
			}
		}
	})
}
