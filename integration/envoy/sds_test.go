// A real Envoy with examples/envoy/envoy.yaml, and the real agent as its source
// of secrets: both dialects of SDS, under traffic, and against strangers.

package envoy_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/svid/forge"
)

const envoyExample = "../../examples/envoy/envoy.yaml"

// envoy is a running one.
type envoy struct {
	t       *testing.T
	inbound string // host:port
	admin   string
	binary  string // empty: Envoy's own
	log     stage.Buffer
	out     stage.Buffer
}

// envoyConfig writes the example with the ports and the socket of a test;
// further edits are old text, new text, and so on. Each must apply.
func envoyConfig(t *testing.T, edits ...string) string {
	t.Helper()
	return envoyConfigOf(t, envoyExample, edits...)
}

func envoyConfigOf(t *testing.T, example string, edits ...string) string {
	t.Helper()
	raw, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	for pair := range slices.Chunk(edits, 2) {
		if !strings.Contains(text, pair[0]) {
			t.Fatalf("%s has no %q", example, pair[0])
		}
		text = strings.ReplaceAll(text, pair[0], pair[1])
	}
	path := filepath.Join(stage.Dir(t), "envoy.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// startEnvoy runs the example in front of the server at upstream.
func startEnvoy(t *testing.T, d *stage.Domain, upstream string, edits ...string) *envoy {
	t.Helper()
	e := &envoy{t: t, inbound: fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), admin: fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))}
	e.run(envoyConfig(t, append(edits,
		"port_value: 8000}", portOf(e.inbound), "port_value: 8001}", portOf(upstream), "port_value: 9901}", portOf(e.admin),
		"/run/merlon/agent/public/api.sock", strings.TrimPrefix(d.WorkloadAPI, "unix://"))...))
	return e
}

// portOf is the port of address, as the examples write one.
func portOf(address string) string {
	return "port_value: " + address[strings.LastIndex(address, ":")+1:] + "}"
}

func (e *envoy) run(config string) {
	e.t.Helper()
	if e.binary == "" {
		e.binary = envoyBinary(e.t)
	}
	cmd := exec.Command(e.binary, "-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "warning")
	cmd.Stderr, cmd.Stdout = &e.log, &e.out
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		late := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		defer late.Stop()
		if err := cmd.Wait(); err != nil {
			e.t.Errorf("Envoy: %v", err)
		}
		if e.t.Failed() {
			e.t.Logf("log of Envoy:\n%s", e.log.String())
		}
	})
}

// stat is a number of Envoy's own, as text.
func (e *envoy) stat(name string) (string, error) {
	resp, err := plain.Get("http://" + e.admin + "/stats?filter=" + name)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if found, value, ok := strings.Cut(lines.Text(), ": "); ok && strings.HasSuffix(found, name) {
			return value, nil
		}
	}
	return "", fmt.Errorf("no %s", name)
}

var plain = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// get makes one call over a connection of its own, and returns the answer's
// body and the gateway's serial number.
func (e *envoy) get(id *sdk.Identity) (body, serial string, err error) {
	transport := &http.Transport{DialTLSContext: id.DialTLS(sdk.Service("gateway")), DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport, Timeout: 20 * time.Second}).Get("https://" + e.inbound + "/")
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, text)
	}
	return string(text), resp.TLS.PeerCertificates[0].SerialNumber.Text(16), err
}

// try shows the gateway what config does, and returns what it has against that.
func (e *envoy) try(config *tls.Config) error {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", e.inbound, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	// In TLS 1.3 the client learns only here that it was refused.
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}

// upstream is a server that knows only go-spiffe. Each connection carries one
// call, so that Envoy makes another for the next.
type upstream struct {
	address string
	source  *workloadapi.X509Source
	config  atomic.Pointer[tls.Config]
}

// pick is an X509-SVID of this process, by path.
func pick(path string) workloadapi.X509SourceOption {
	return workloadapi.WithDefaultX509SVIDPicker(func(svids []*x509svid.SVID) *x509svid.SVID {
		for _, s := range svids {
			if s.ID.Path() == path {
				return s
			}
		}
		return svids[0]
	})
}

func newUpstream(t *testing.T, d *stage.Domain) *upstream {
	t.Helper()
	source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(d.WorkloadAPI)), pick("/orders"))
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{source: source}
	u.reset(d)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u.address = lis.Addr().String()
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s for %s", r.TLS.PeerCertificates[0].URIs[0], r.Header.Get("X-Forwarded-Client-Cert"))
		}),
		TLSConfig: &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return u.config.Load(), nil
		}},
		ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
	}
	srv.SetKeepAlivesEnabled(false)
	var serving sync.WaitGroup
	serving.Go(func() { srv.ServeTLS(lis, "", "") })
	t.Cleanup(func() { srv.Close(); serving.Wait(); source.Close() })
	return u
}

// reset makes it what it is at first: /orders, for the gateway.
func (u *upstream) reset(d *stage.Domain) {
	u.config.Store(tlsconfig.MTLSServerConfig(u.source, u.source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(d.ID("/gateway")))))
}

func TestEnvoyExampleIsValid(t *testing.T) {
	t.Parallel()
	for _, file := range []string{envoyExample, envoyDir + "orders.yaml", envoyDir + "web.yaml"} {
		out, err := exec.CommandContext(t.Context(), envoyBinary(t), "--mode", "validate", "-c", file).CombinedOutput()
		if err != nil {
			t.Errorf("envoy --mode validate -c %s: %v\n%s", file, err, out)
		}
	}
}

// gateways are one Envoy for each dialect of SDS, and one that does without the
// SPIFFE validator, between two services. Each takes its secrets by other names.
type gateways struct {
	t      *testing.T
	d      *stage.Domain
	web    *sdk.Identity
	orders *upstream
	envoys map[string]*envoy
}

func startGateways(t *testing.T) *gateways {
	t.Helper()
	envoyBinary(t)
	d := stage.Separate(t, "trust_refresh_hint: 1s")
	d.Entry("/web")
	d.Entry("/orders")
	web := services.Open(t, d, sdk.WithLogger(slog.New(slog.DiscardHandler)))
	orders := newUpstream(t, d)
	return &gateways{t: t, d: d, web: web, orders: orders, envoys: map[string]*envoy{
		"delta": startEnvoy(t, d, orders.address),
		"state of the world": startEnvoy(t, d, orders.address, "DELTA_GRPC", "GRPC",
			"name: spiffe://shop.test/gateway", "name: default", "name: ROOTCA", "name: ALL"),
		"plain roots": startEnvoy(t, d, orders.address, "name: ROOTCA", `name: "spiffe://shop.test"`,
			"cluster: gateway}", "cluster: gateway, metadata: {disable_spiffe_cert_validation: true}}"),
	}}
}

// register makes the entry of all of them.
func (g *gateways) register() (entryID string) {
	g.t.Helper()
	var entry struct {
		EntryID string `json:"entry_id"`
	}
	stage.Decode(g.t, g.d.Merlon("entry", "create", "-o", "json", "--parent", g.d.AgentID(), "--ttl", "20s",
		"--spiffe-id", g.d.ID("/gateway"), "--selector", "unix:path:"+envoyBinary(g.t)), &entry)
	return entry.EntryID
}

// each waits until check is content with all of them.
func (g *gateways) each(what string, check func(*envoy) error) {
	g.t.Helper()
	for dialect, e := range g.envoys {
		stage.Eventually(g.t, dialect+": "+what, func() error { return check(e) })
	}
}

// serves says whether a call from end to end works.
func (g *gateways) serves(e *envoy) error {
	body, _, err := e.get(g.web)
	if err == nil && (!strings.HasPrefix(body, g.d.ID("/gateway")+" for ") || !strings.Contains(body, "URI="+g.d.ID("/web"))) {
		err = fmt.Errorf("orders saw %q", body)
	}
	return err
}

// logged waits for a line of the agent's log with all texts.
func (g *gateways) logged(texts ...string) {
	g.t.Helper()
	stage.Eventually(g.t, fmt.Sprintf("the agent logs %q", texts), func() error {
		for line := range strings.Lines(g.d.Agent.Log()) {
			if !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(line, text) }) {
				return nil
			}
		}
		return errors.New("no such line")
	})
}

// traffic calls through all of them, each call on connections of its own, until stop
// is called, which says how many were made. Each that fails fails the test.
func (g *gateways) traffic() (renewed func(what string), stop func() (calls int64)) {
	ctx, cancel := context.WithCancel(g.t.Context())
	var running sync.WaitGroup
	var calls, failed atomic.Int64
	var serials sync.Map // dialect → serial
	for dialect, e := range g.envoys {
		running.Go(func() {
			for pace := time.NewTicker(100 * time.Millisecond); ; {
				select {
				case <-ctx.Done():
					pace.Stop()
					return
				case <-pace.C:
				}
				_, serial, err := e.get(g.web)
				if calls.Add(1); err != nil {
					if failed.Add(1) <= 5 {
						g.t.Errorf("%s: call %d: %v", dialect, calls.Load(), err)
					}
					continue
				}
				serials.Store(dialect, serial)
			}
		})
	}
	g.t.Cleanup(func() { cancel(); running.Wait() })
	renewed = func(what string) {
		g.t.Helper()
		before := map[string]any{}
		for dialect := range g.envoys {
			stage.Eventually(g.t, dialect+": the first call", func() (err error) {
				var ok bool
				if before[dialect], ok = serials.Load(dialect); !ok {
					err = errors.New("none yet")
				}
				return err
			})
		}
		// Half of 20 s, and whatever else the machine has to do.
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			waiting := false
			for dialect := range g.envoys {
				now, _ := serials.Load(dialect)
				waiting = waiting || now == before[dialect]
			}
			if !waiting {
				return
			}
			if time.Now().After(deadline) {
				g.t.Fatalf("no new SVID is shown %s", what)
			}
		}
	}
	return renewed, func() int64 {
		cancel()
		running.Wait()
		return calls.Load()
	}
}

func TestEnvoyTakesItsSecretsFromTheAgent(t *testing.T) {
	t.Parallel() // it mostly waits
	g := startGateways(t)

	// A name that stands for nothing, and later for something.
	g.each("the names are answered", func(e *envoy) error {
		if live, err := e.stat("listener_manager.total_listeners_active"); err != nil || live != "1" {
			return fmt.Errorf("%s listeners are active, %v", live, err)
		}
		return nil
	})
	g.logged("SDS names stand for nothing", g.d.ID("/gateway"), "merlon explain identity --pid")
	for dialect, e := range g.envoys {
		if err := g.serves(e); err == nil {
			t.Errorf("%s: a call without secrets went through", dialect)
		}
	}
	g.register()
	g.each("calls go through once there is an entry", g.serves)

	renewed, stop := g.traffic()
	begun := time.Now()
	renewed("at half life")
	stage.RotateRoot(g.d, func() {})
	g.d.Agent.Restart()
	renewed("after a restart of the agent")
	t.Logf("%d calls in %s, each with two handshakes", stop(), time.Since(begun).Round(time.Second))
}

func TestEnvoyRefusesStrangers(t *testing.T) {
	t.Parallel()
	g := startGateways(t)
	g.register()
	g.each("calls go through", g.serves)

	sameName, otherDomain := forge.New(t, g.d.TrustDomain).Intermediate(), forge.New(t, "stranger.test").Intermediate()
	own, err := g.orders.source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	for name, certs := range map[string][]tls.Certificate{
		"no certificate":         nil,
		"another root":           {sameName.Leaf("/web").Certificate()},
		"another trust domain":   {otherDomain.Leaf("/web").Certificate()},
		"a lent trust domain":    {otherDomain.Leaf("/web", forge.URIs(g.d.ID("/web"))).Certificate()},
		"another SPIFFE ID here": {{Certificate: raw(own), PrivateKey: own.PrivateKey}},
	} {
		for dialect, e := range g.envoys {
			if err := e.try(&tls.Config{InsecureSkipVerify: true, Certificates: certs}); err == nil || !strings.Contains(err.Error(), "tls:") {
				t.Errorf("%s: a caller with %s: %v; want a refusal by TLS", dialect, name, err)
			}
		}
	}
	for name, cert := range map[string]tls.Certificate{
		"another root":         sameName.Leaf("/orders").Certificate(),
		"another trust domain": otherDomain.Leaf("/orders").Certificate(),
		"another SPIFFE ID":    sameName.Leaf("/web").Certificate(),
	} {
		g.orders.config.Store(&tls.Config{Certificates: []tls.Certificate{cert}})
		for dialect, e := range g.envoys {
			if _, _, err := e.get(g.web); err == nil || !strings.Contains(err.Error(), "503") {
				t.Errorf("%s: orders with %s: %v; want 503", dialect, name, err)
			}
		}
	}
	g.orders.reset(g.d)
	g.each("calls go through again", g.serves)
}

// What SDS can do about an identity that was taken away, and what it cannot:
// Envoy keeps the last SVID, peers refuse it.
func TestEnvoyWhoseEntryIsDeleted(t *testing.T) {
	t.Parallel()
	g := startGateways(t)
	id := g.register()
	g.each("calls go through", g.serves)
	held := map[*envoy]string{}
	for _, e := range g.envoys {
		held[e] = e.shown(t)
	}
	g.d.Merlon("entry", "delete", id)
	g.each("the SDK refuses what was revoked", func(e *envoy) error {
		if _, _, err := e.get(g.web); err == nil || !strings.Contains(err.Error(), "revoked") {
			return fmt.Errorf("the call: %v", err)
		}
		return nil
	})
	for dialect, e := range g.envoys {
		if now := e.shown(t); now != held[e] {
			t.Errorf("%s: Envoy shows %s; want %s, which it keeps", dialect, now, held[e])
		}
	}
	g.register()
	g.each("calls go through again", g.serves)
}

// shown is the serial number of what Envoy shows.
func (e *envoy) shown(t *testing.T) (serial string) {
	t.Helper()
	conn, err := tls.Dial("tcp", e.inbound, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.Text(16)
}

func raw(s *x509svid.SVID) (chain [][]byte) {
	for _, cert := range s.Certificates {
		chain = append(chain, cert.Raw)
	}
	return chain
}

// A name of the wrong kind, in Envoy's words.
func TestWhatEnvoyRefusesIsLogged(t *testing.T) {
	t.Parallel()
	g := startGateways(t)
	g.register()
	startEnvoy(t, g.d, g.orders.address, "name: spiffe://shop.test/gateway", "name: ROOTCA")
	startEnvoy(t, g.d, g.orders.address, "name: ROOTCA", "name: default", "DELTA_GRPC", "GRPC")
	g.logged("Envoy refused secrets", "names=[ROOTCA]", "Failed to load incomplete private key")
	g.logged("Envoy refused secrets", "names=[default]", "without trusted CA is insecure")
}

// envoyBinary is Envoy's, not the script beside it that starts it: unix:path
// names what runs.
func envoyBinary(t *testing.T) string {
	t.Helper()
	return stage.Interop(t, "Envoy", "venv/lib/python3*/site-packages/envoy/_bin/envoy")
}
