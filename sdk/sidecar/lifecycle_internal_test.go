// A sidecar's life: settings that change, a successor, operators' questions, the app
// that it starts.

package sidecar

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/sdk/sdktest"
)

// shortDir is a folder for sockets.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "m") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// named is an app that answers with its name.
func named(t testing.TB, name string) string {
	address, _ := httpApp(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, name) })
	return address
}

func TestReloadReplacesWhatIsServed(t *testing.T) {
	p := startPair(t, "http", named(t, "old"))
	c := client(t)
	url := "http://" + p.outbound.addrs[0] + "/"
	ask := func() string { _, text := do(t, c, "GET", url, nil); return text }
	if got := ask(); got != "old" {
		t.Fatal(got)
	}
	s := p.inbound.sidecar
	cfg := s.config()
	further := listen(t)
	free := further.Addr().String()
	further.Close()
	cfg.Inbound = []Inbound{{Listen: "127.0.0.1:0", App: named(t, "new"), Protocol: "http"}, {Listen: free, App: named(t, "further"), Protocol: "http"}}
	if err := s.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	// A connection that is kept may bring one more request to what served before.
	await(t, "the new app's answer", func() bool { return ask() == "new" })
	out := start(t, p.td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: []string{free}, Protocol: "http"}}})
	if _, got := do(t, c, "GET", "http://"+out.addrs[0]+"/", nil); got != "further" {
		t.Errorf("on the listener that was added %q answers", got)
	}
	for name, spoil := range map[string]func(c *Config){
		"invalid":                     func(c *Config) { c.Inbound[0].App = "10.0.0.1:1" },
		"what only a restart changes": func(c *Config) { c.MetricsBySource = true },
		"an address that is taken":    func(c *Config) { c.Inbound[1].Listen = out.addrs[0] },
		"nothing to serve":            func(c *Config) { c.Inbound = nil },
	} {
		bad := s.config()
		bad.Inbound = append([]Inbound(nil), bad.Inbound...)
		spoil(&bad)
		if err := s.Reload(bad); err == nil {
			t.Errorf("%s: it was taken", name)
		}
		if got := ask(); got != "new" {
			t.Errorf("%s: after the refusal %q answers", name, got)
		}
	}
	cfg.Inbound = cfg.Inbound[:1]
	if err := s.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	await(t, "the end of the listener", func() bool {
		conn, err := net.Dial("tcp", free)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// A hangup counts once, whatever is wrong with what it finds: the file itself, a
// setting, or what only a restart can change.
func TestEveryReloadIsCounted(t *testing.T) {
	td := sdktest.New(t)
	r := start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: "127.0.0.1:1", Protocol: "http"}}})
	path := filepath.Join(t.TempDir(), "sidecar.yaml")
	cl := &CommandLine{args: []string{"-config", path}, getenv: func(string) string { return "" }}
	good := fmt.Sprintf("inbound: [{listen: \"127.0.0.1:0\", app: \"127.0.0.1:2\", protocol: http}]\nagent_socket: %s\nhealth_address: off\naccess_log: %s\n", td.Address("orders"), r.logFile)
	refused, taken := 0.0, 0.0
	for _, tc := range []struct {
		name, text string
		want       *float64
	}{
		{"no YAML", "inbound: [", &refused},
		{"an unknown key", good + "inbuond: []\n", &refused},
		{"a setting", good + "max_streams: -1\n", &refused},
		{"what only a restart changes", good + "metrics_by_source: true\n", &refused},
		{"a good one", good, &taken},
	} {
		if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
			t.Fatal(err)
		}
		err := cl.reload(r.sidecar)
		if (err == nil) != (tc.want == &taken) {
			t.Errorf("%s: %v", tc.name, err)
		}
		*tc.want++
		for result, want := range map[string]float64{"refused": refused, "taken": taken} {
			if got := r.metric("merlon_sidecar_reloads_total", "result", result); got != want {
				t.Errorf("%s: %v are counted as %s; want %v", tc.name, got, result, want)
			}
		}
	}
	if got := r.sidecar.config().Inbound[0].App; got != "127.0.0.1:2" {
		t.Errorf("the good one is not in force: the app is %s", got)
	}
}

// Settings that change while there is no identity yet are those that it begins with.
func TestReloadWhileTheIdentityIsWaitedFor(t *testing.T) {
	td := sdktest.New(t)
	td.StopAgent("orders")
	cfg := Config{
		Inbound:     []Inbound{{Listen: "127.0.0.1:0", App: "127.0.0.1:1", Protocol: "http"}},
		AgentSocket: td.Address("orders"), HealthAddress: off, AccessLog: filepath.Join(t.TempDir(), "access.log"), Logger: slog.New(slog.DiscardHandler),
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	opened := make(chan []*door, 1)
	s.opened = func(doors []*door) { opened <- doors }
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	cfg.Inbound = append(cfg.Inbound, Inbound{Listen: "[::1]:0", App: "127.0.0.1:2", Protocol: "tcp"})
	if err := s.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	td.StartAgent("orders")
	select {
	case doors := <-opened:
		if len(doors) != 2 || doors[1].serving.Load().hop.Protocol != "tcp" {
			t.Errorf("%d listeners; want those of the reload", len(doors))
		}
	case err := <-done:
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestReloadLetsRequestsFinish(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	app, _ := httpApp(t, func(w http.ResponseWriter, _ *http.Request) {
		close(arrived)
		<-release
		fmt.Fprint(w, "done")
	})
	p := startPair(t, "http", app)
	conn := dial(t, p.outbound.addrs[0])
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	<-arrived
	for _, r := range []*running{p.inbound, p.outbound} {
		if err := r.sidecar.Reload(r.sidecar.config()); err != nil {
			t.Fatal(err)
		}
	}
	close(release)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(res.Body); string(text) != "done" || err != nil {
		t.Errorf("%q %v", text, err)
	}
}

// A successor takes the sockets over while connections keep coming. None of them is
// refused, and no request fails.
func TestSuccessorTakesOverWithoutARefusedConnection(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	dir := shortDir(t)
	socket := filepath.Join(dir, "app.sock")
	in := start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: named(t, "app"), Protocol: "http"}}})
	cfg := Config{
		Outbound: []Outbound{
			{Listen: "127.0.0.1:0", To: "orders", Upstreams: []string{in.addrs[0]}, Protocol: "http"},
			{Listen: "unix://" + socket, To: "orders", Upstreams: []string{in.addrs[0]}, Protocol: "http"},
		},
		AdminSocket: filepath.Join(dir, "admin.sock"),
	}
	first := start(t, td, "web", cfg)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var made atomic.Int64
	failed := make(chan error, 8)
	for _, to := range [][2]string{{"tcp", first.addrs[0]}, {"tcp", first.addrs[0]}, {"unix", socket}} {
		go func() {
			for ctx.Err() == nil {
				if err := once(to[0], to[1]); err != nil {
					failed <- err
					return
				}
				made.Add(1)
			}
			failed <- nil
		}()
	}
	for range 3 {
		before := made.Load()
		await(t, "requests", func() bool { return made.Load() > before+20 || len(failed) > 0 })
		second := start(t, td, "web", cfg)
		if second.addrs[0] != first.addrs[0] {
			t.Fatalf("the successor listens on %s; want %s", second.addrs[0], first.addrs[0])
		}
		<-first.done
		first = second
	}
	cancel()
	for range 3 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	first.stop()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// once makes a request over a connection of its own.
func once(network, address string) error {
	conn, err := net.Dial(network, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	if text, err := io.ReadAll(res.Body); err != nil || string(text) != "app" {
		return fmt.Errorf("%s %q %v", res.Status, text, err)
	}
	return nil
}

// A successor that does not come to serve leaves the one before as it was.
func TestSuccessorThatFailsChangesNothing(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	dir := shortDir(t)
	in := start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: named(t, "app"), Protocol: "http"}}})
	cfg := Config{
		Outbound:    []Outbound{{Listen: "unix://" + filepath.Join(dir, "app.sock"), To: "orders", Upstreams: []string{in.addrs[0]}, Protocol: "http"}},
		AdminSocket: filepath.Join(dir, "admin.sock"),
	}
	start(t, td, "web", cfg)
	cfg.Inbound = []Inbound{{Listen: in.addrs[0], App: "127.0.0.1:1", Protocol: "http"}} // which is taken
	cfg.AgentSocket, cfg.HealthAddress, cfg.Logger = td.Address("web"), off, slog.New(slog.DiscardHandler)
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil {
		t.Fatal("it ran")
	}
	if err := once("unix", filepath.Join(dir, "app.sock")); err != nil {
		t.Error(err)
	}
}

// A successor serves health where it is told to, and where that is as before, on the
// socket of before.
func TestSuccessorServesHealthWhereItIsTold(t *testing.T) {
	td := sdktest.New(t)
	cfg := Config{
		Inbound:     []Inbound{{Listen: "127.0.0.2:0", App: named(t, "app"), Protocol: "http"}},
		AdminSocket: filepath.Join(shortDir(t), "admin.sock"),
	}
	healthOf := func(r *running) string {
		r.sidecar.mu.Lock()
		defer r.sidecar.mu.Unlock()
		return r.sidecar.next[healthSocket].Addr().String()
	}
	var before *running
	old := ""
	for _, tc := range []struct {
		address, host string
		same          bool
	}{{"127.0.0.1:0", "127.0.0.1", false}, {"[::1]:0", "::1", false}, {"[::1]:0", "::1", true}} {
		cfg.HealthAddress = tc.address
		r := start(t, td, "orders", cfg)
		if before != nil {
			<-before.done
		}
		address := healthOf(r)
		if host, _, err := net.SplitHostPort(address); err != nil || host != tc.host || (address == old) != tc.same {
			t.Errorf("with health_address %s after %q it is %s", tc.address, old, address)
		}
		if res, _ := do(t, client(t), "GET", "http://"+address+"/live", nil); res.StatusCode != http.StatusOK {
			t.Errorf("at %s: %s", address, res.Status)
		}
		await(t, "the end of the socket of before", func() bool {
			if old == "" || tc.same {
				return true
			}
			conn, err := net.Dial("tcp", old)
			if err == nil {
				conn.Close()
			}
			return err != nil
		})
		before, old = r, address
	}
}

// Where a successor does not listen any more, nobody's connection waits.
func TestSuccessorEndsWhatItDoesNotTake(t *testing.T) {
	td := sdktest.New(t)
	dir := shortDir(t)
	socket := filepath.Join(dir, "app.sock")
	out := func(listen string) Outbound {
		return Outbound{Listen: listen, To: "orders", Upstreams: []string{"127.0.0.1:1"}, Protocol: "http"}
	}
	cfg := Config{Outbound: []Outbound{out("127.0.0.1:0"), out("unix://" + socket), out("[::1]:0")}, AdminSocket: filepath.Join(dir, "admin.sock")}
	first := start(t, td, "web", cfg)
	cfg.Outbound = cfg.Outbound[:1]
	second := start(t, td, "web", cfg)
	<-first.done
	if second.addrs[0] != first.addrs[0] {
		t.Errorf("the successor listens on %s; want %s", second.addrs[0], first.addrs[0])
	}
	await(t, "the end of the listener", func() bool {
		conn, err := net.Dial("tcp", first.addrs[2])
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	await(t, "the end of the socket", func() bool { _, err := os.Stat(socket); return errors.Is(err, os.ErrNotExist) })
}

func TestSocketsAreKnownByTheirAddress(t *testing.T) {
	tcp := listen(t)
	_, port, err := net.SplitHostPort(tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	everywhere, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer everywhere.Close()
	_, everywherePort, err := net.SplitHostPort(everywhere.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(shortDir(t), "a.sock")
	unix, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	for _, tc := range []struct {
		lis     net.Listener
		address string
		want    bool
	}{
		{tcp, "127.0.0.1:" + port, true},
		{tcp, "127.0.0.1:0", true},
		{tcp, "127.0.0.1:1", false},
		{tcp, "127.0.0.2:" + port, false},
		{tcp, ":" + port, false},
		{tcp, "0.0.0.0:" + port, false},
		{tcp, "[::1]:" + port, false},
		{tcp, "unix://" + tcp.Addr().String(), false},
		{everywhere, ":" + everywherePort, true},
		{everywhere, "[::]:" + everywherePort, true},
		{everywhere, "0.0.0.0:" + everywherePort, true},
		{everywhere, "127.0.0.1:" + everywherePort, false},
		{unix, "unix://" + path, true},
		{unix, "unix://" + path + "2", false},
		{unix, "127.0.0.1:0", false},
	} {
		if got := listensOn(tc.lis, tc.address); got != tc.want {
			t.Errorf("listensOn(%s, %s) = %v", tc.lis.Addr(), tc.address, got)
		}
	}
}

func TestOperatorsSeeWhatRuns(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	admin := filepath.Join(shortDir(t), "admin", "admin.sock")
	in := start(t, td, "orders", Config{
		Inbound: []Inbound{{Listen: "127.0.0.1:0", App: named(t, "app"), Protocol: "http"}}, AdminSocket: admin, MetricsBySource: true,
	})
	p := &pair{td: td, inbound: in}
	conn := asWeb(t, p)
	io.WriteString(conn, "GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET //b HTTP/1.1\r\nHost: a\r\n\r\n")
	io.Copy(io.Discard, conn)
	in.logged(2)
	open := asWeb(t, p)
	io.WriteString(open, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
	http.ReadResponse(bufio.NewReader(open), nil)
	if fi, err := os.Stat(filepath.Dir(admin)); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the folder of the admin socket: %v %v", fi.Mode(), err)
	}
	c := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", admin)
		},
	}}
	for path, want := range map[string][]string{
		"/config":    {`"idle_timeout": "1m0s"`, `"listen": "127.0.0.1:0"`},
		"/listeners": {`"connections": `, `"direction": "inbound"`},
		"/identity":  {td.ID("web").String(), `"policy_revision": `, td.ID("orders").String()},
		"/health":    {`"ready": true`, `"policy"`},
		"/requests":  {`"path":"//b"`, `"BAD_REQUEST"`, `"path":"/a"`},
	} {
		res, text := do(t, c, "GET", "http://sidecar"+path, nil)
		var any any
		flat := strings.Join(strings.Fields(text), " ")
		if err := json.Unmarshal([]byte(text), &any); err != nil || res.StatusCode != 200 {
			t.Errorf("%s: %s %v", path, res.Status, err)
		}
		for _, w := range want {
			if !strings.Contains(flat, w) && !strings.Contains(strings.ReplaceAll(flat, `": "`, `":"`), w) {
				t.Errorf("%s does not say %s:\n%s", path, w, text)
			}
		}
	}
	in.logged(3) // they are counted before
	families, err := in.sidecar.health.Registry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	counted := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if f.GetName() == "merlon_sidecar_requests_total" {
				counted[labels["code"]+" "+labels["reason"]+" "+labels["source"]] += m.GetCounter().GetValue()
			}
		}
	}
	web := td.ID("web").String()
	if counted["200 ALLOWED "+web] != 2 || counted["400 BAD_REQUEST "+web] != 1 {
		t.Errorf("counted: %v", counted)
	}
}

func TestMetricsAreBounded(t *testing.T) {
	td := sdktest.New(t)
	in := start(t, td, "orders", Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: named(t, "app"), Protocol: "http"}}, MetricsBySource: true})
	h := in.sidecar.doors[0].serving.Load().hop
	s := in.sidecar.metrics.of(h)
	for i := range 2 * maxSeries {
		s.counter(seriesKey{status: 200, source: fmt.Sprint(i)}).Inc()
	}
	if len(s.requests) > maxSeries+1 {
		t.Errorf("%d series; want at most %d", len(s.requests), maxSeries+1)
	}
}

// runCommand runs a sidecar that starts a command, to the end.
func runCommand(ctx context.Context, t *testing.T, td *sdktest.TD, command ...string) error {
	t.Helper()
	s, err := New(Config{
		Inbound:     []Inbound{{Listen: "127.0.0.1:0", App: named(t, "app"), Protocol: "http"}},
		AgentSocket: td.Address("orders"), HealthAddress: off, DrainTimeout: 500 * time.Millisecond, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Command = command
	return s.Run(ctx)
}

func TestSidecarEndsWithItsCommand(t *testing.T) {
	td := sdktest.New(t)
	if err := runCommand(t.Context(), t, td, "true"); err != nil {
		t.Errorf("a command that ends well: %v", err)
	}
	for script, want := range map[string]int{"exit 3": 3, "kill -KILL $$": 137} {
		var exit *ExitError
		if err := runCommand(t.Context(), t, td, "sh", "-c", script); !errors.As(err, &exit) || exit.Code != want {
			t.Errorf("%s: %v; want code %d", script, err, want)
		}
	}
	if err := runCommand(t.Context(), t, td, "/no/such/command"); err == nil {
		t.Error("a command that does not exist was started")
	}
}

func TestCommandEndsWithItsSidecar(t *testing.T) {
	td := sdktest.New(t)
	dir := t.TempDir()
	for name, script := range map[string]string{
		"by itself": `trap 'echo bye > "$0/ended"; exit 0' TERM; touch "$0/started"; while :; do sleep 0.01; done`,
		"by force":  `trap '' TERM; touch "$0/started"; while :; do sleep 0.01; done`,
	} {
		os.Remove(filepath.Join(dir, "started"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- runCommand(ctx, t, td, "sh", "-c", script, dir) }()
		await(t, "the command", func() bool { _, err := os.Stat(filepath.Join(dir, "started")); return err == nil })
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "ended")); err != nil {
		t.Error("the command was not told to end")
	}
}
