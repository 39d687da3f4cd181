// What the tests of the sidecar share: a trust domain, sidecars in this process on
// real sockets, and the access log as a test reads it.

package sidecar

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// running is a sidecar that serves until the test ends.
type running struct {
	t       testing.TB
	sidecar *Sidecar
	done    chan struct{} // closed when it has ended
	addrs   []string      // of its listeners: inbound ones first
	logFile string
	stop    func() // ends it, and waits
}

// start runs a sidecar as workload name.
func start(t testing.TB, td *sdktest.TD, name string, cfg Config) *running {
	t.Helper()
	cfg.AgentSocket = td.Address(name)
	if cfg.HealthAddress == "" {
		cfg.HealthAddress = off
	}
	if cfg.AccessLog == "" {
		cfg.AccessLog = filepath.Join(t.TempDir(), "access.log")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r := &running{t: t, sidecar: s, logFile: cfg.AccessLog}
	opened := make(chan struct{})
	s.opened = func(doors []*door) {
		for _, d := range doors {
			r.addrs = append(r.addrs, d.lis.Addr().String())
		}
		close(opened)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.done = make(chan struct{})
	var ended error
	go func() {
		ended = s.Run(ctx)
		close(r.done)
	}()
	r.stop = func() {
		cancel()
		<-r.done
		if ended != nil {
			t.Errorf("the sidecar of %s: %v", name, ended)
			ended = nil
		}
	}
	t.Cleanup(r.stop)
	select {
	case <-opened:
	case <-r.done:
		t.Fatalf("the sidecar of %s: %v", name, ended)
	}
	return r
}

// logged is the access log, once it has n lines.
func (r *running) logged(n int) []map[string]any {
	r.t.Helper()
	var text []byte
	await(r.t, "lines of the access log", func() bool {
		text, _ = os.ReadFile(r.logFile)
		return bytes.Count(text, []byte("\n")) >= n
	})
	var lines []map[string]any
	for line := range strings.Lines(string(text)) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			r.t.Fatalf("access log line %q: %v", line, err)
		}
		lines = append(lines, m)
	}
	if len(lines) != n {
		r.t.Errorf("%d lines in the access log; want %d:\n%s", len(lines), n, text)
	}
	return lines
}

// await waits until a condition holds.
func await(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 30 s in vain for %s", what)
		}
	}
}

// listen opens a listener on loopback for the test.
func listen(t testing.TB) net.Listener {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lis.Close() })
	return lis
}

// pair is an app behind a sidecar of workload orders, and a sidecar of workload web
// that leads there.
type pair struct {
	td                *sdktest.TD
	web               *sdk.Identity // for callers without a sidecar; nil: none yet
	inbound, outbound *running
}

// startPair starts both sidecars around the app at address. web may call orders.
func startPair(t testing.TB, protocol, app string) *pair {
	t.Helper()
	return startPairWith(t, protocol, app, func(*Config) {})
}

// startPairWith is startPair with other settings.
func startPairWith(t testing.TB, protocol, app string, set func(*Config)) *pair {
	t.Helper()
	td := sdktest.New(t)
	td.Allow("web", "orders")
	cfg := Config{Inbound: []Inbound{{Listen: "127.0.0.1:0", App: app, Protocol: protocol}}}
	set(&cfg)
	in := start(t, td, "orders", cfg)
	cfg = Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: []string{in.addrs[0]}, Protocol: protocol}}}
	set(&cfg)
	out := start(t, td, "web", cfg)
	return &pair{td: td, inbound: in, outbound: out}
}

// dial connects to address within the test.
func dial(t testing.TB, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}
