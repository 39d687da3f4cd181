// The sidecar's HTTP/2 by the measure of others: a conformance suite, and a load
// generator that is not written in Go.

package sidecars_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"time"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/sidecar"
)

// http2App is Go's own HTTP/2 server, without TLS.
func http2App(t testing.TB) (address string) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{
		Protocols: &protocols, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			io.WriteString(w, "hello")
		}),
	}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(lis) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return lis.Addr().String()
}

// freeAddress is one on loopback where nobody listens.
func freeAddress(t testing.TB) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	return lis.Addr().String()
}

// sidecarPair runs two sidecars before app and gives the address for callers; both have
// real sockets and mutual TLS between them.
func sidecarPair(t testing.TB, protocol, app string) (address string) {
	t.Helper()
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.CompilePolicy()
	between, address := freeAddress(t), freeAddress(t)
	for name, cfg := range map[string]sidecar.Config{
		"orders": {Inbound: []sidecar.Inbound{{Listen: between, App: app, Protocol: protocol}}},
		"web":    {Outbound: []sidecar.Outbound{{Listen: address, To: "orders", Upstreams: []string{between}, Protocol: protocol}}},
	} {
		cfg.AgentSocket, cfg.HealthAddress, cfg.Logger = td.Address(name), "off", slog.New(slog.DiscardHandler)
		s, err := sidecar.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	for _, a := range []string{between, address} {
		stage.Eventually(t, "a sidecar listens", func() error {
			conn, err := net.Dial("tcp", a)
			if err == nil {
				conn.Close()
			}
			return err
		})
	}
	return address
}

func TestSidecarSpeaksHTTP2AsWellAsGo(t *testing.T) {
	app := http2App(t)
	ours := stage.H2Spec(t, sidecarPair(t, "http2", app))
	if len(ours) == 0 {
		return // Go's server fails five of its tests
	}
	theirs := stage.H2Spec(t, app)
	for _, test := range ours {
		if !slices.Contains(theirs, test) {
			t.Errorf("the sidecar fails what Go's server does not: %s", test)
		}
	}
}

func TestSidecarServesH2load(t *testing.T) {
	bin, err := exec.LookPath("h2load")
	if err != nil {
		t.Skip("h2load is missing: apt-get install nghttp2-client")
	}
	const requests = 5_000
	body := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(body, make([]byte, 100_000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"-c", "1", "-m", "1", "-n", fmt.Sprint(requests / 10)},
		{"-c", "8", "-m", "20", "-n", fmt.Sprint(requests)},
		{"-c", "200", "-m", "5", "-n", fmt.Sprint(requests)},
		{"-c", "4", "-m", "10", "-n", fmt.Sprint(requests / 10), "-d", body},
	} {
		t.Run(fmt.Sprint(args[:4]), func(t *testing.T) {
			out, err := exec.CommandContext(t.Context(), bin, append(args, "http://"+sidecarPair(t, "http2", http2App(t))+"/")...).CombinedOutput()
			if err != nil {
				t.Fatalf("h2load: %v\n%s", err, out)
			}
			if !regexp.MustCompile(` 0 failed, 0 errored, 0 timeout`).Match(out) || regexp.MustCompile(`requests: 0 total`).Match(out) {
				t.Errorf("h2load:\n%s", out)
			}
		})
	}
}
