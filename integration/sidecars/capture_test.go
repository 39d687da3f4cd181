// Two machines with an app each that knows nothing of a sidecar, and calls by address
// as ever: rules of the kernel have its calls go through both sidecars.

package sidecars_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/integration/stage"
)

// Users of the machines.
const webSidecar, ordersSidecar, webApp = 4242, 4343, 1000

// appOn is a plain HTTP server on a machine, which says whom it takes the caller for.
func appOn(t *testing.T, space *stage.Namespace, address string) (calls *atomic.Int64) {
	t.Helper()
	var lis net.Listener
	err := space.Do(t, 0, func() (err error) {
		lis, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	calls = new(atomic.Int64)
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		fmt.Fprintf(w, "%s for %s", r.RequestURI, r.Header.Get("X-Spiffe-Id"))
	})}
	var serving sync.WaitGroup
	serving.Go(func() { srv.Serve(lis) })
	t.Cleanup(func() { srv.Close(); serving.Wait() })
	return calls
}

// callFrom makes a plain HTTP call on a machine as a user.
func callFrom(t *testing.T, space *stage.Namespace, uid int, method, url string) (status int, body string, err error) {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(_ context.Context, network, address string) (conn net.Conn, err error) {
		err = space.Do(t, uid, func() error {
			conn, err = net.DialTimeout(network, address, 10*time.Second)
			return err
		})
		return conn, err
	}}
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: transport, Timeout: 20 * time.Second}).Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// capturedPair is two machines with sidecars, to which their kernels send what is
// captured.
type capturedPair struct {
	t           *testing.T
	d           *stage.Domain
	network     *stage.Network
	web, orders *stage.Namespace
	hosts       []string      // addresses of orders
	calls       *atomic.Int64 // that its app saw
	stopWeb     func()        // ends web's sidecar
}

func startCapturedPair(t *testing.T) *capturedPair {
	t.Helper()
	p := &capturedPair{t: t, d: stage.Dev(t), network: stage.NewNetwork(t)}
	sidecar := stage.Bin(t, "merlon-sidecar")
	for dir := filepath.Dir(strings.TrimPrefix(p.d.WorkloadAPI, "unix://")); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		os.Chmod(dir, 0o755) // for other users
	}
	os.Chmod(filepath.Dir(sidecar), 0o755)
	p.allow()
	p.web, p.orders = p.network.Machine("web"), p.network.Machine("orders")
	p.network.Self().Run(t, "ip", "addr", "add", "fd77::9/64", "dev", "merlon0", "nodad")
	p.web.Run(t, "ip", "addr", "add", "fd77::1/64", "dev", "eth0", "nodad")
	p.orders.Run(t, "ip", "addr", "add", "fd77::2/64", "dev", "eth0", "nodad")
	p.hosts = []string{p.orders.IP, "fd77::2"}

	p.calls = appOn(t, p.orders, ":8080")
	p.orders.Run(t, sidecar, "capture", "install", "-sidecar-user", fmt.Sprint(ordersSidecar), "-inbound", "8080:8443")
	p.orders.Start(t, ordersSidecar, nil, sidecar, "-agent-socket", p.d.WorkloadAPI, "-inbound", ":8443,127.0.0.1:8080,http", "-health-address", "off")

	p.web.Run(t, sidecar, "capture", "install", "-sidecar-user", fmt.Sprint(webSidecar), "-outbound-port", "15001")
	p.stopWeb = p.web.Start(t, webSidecar, nil, sidecar, "-config", p.config())
	return p
}

// allow registers both sidecars, and lets web read at orders.
func (p *capturedPair) allow() {
	p.t.Helper()
	for path, uid := range map[string]int{"/web": webSidecar, "/orders": ordersSidecar} {
		p.d.Merlon("entry", "create", "--spiffe-id", p.d.ID(path), "--selector", fmt.Sprintf("unix:uid:%d", uid))
	}
	dir := p.t.TempDir()
	text := fmt.Sprintf("grants:\n  - id: web\n    from: [%s]\n    to: [%s]\n    http: {methods: [GET]}\n", p.d.ID("/web"), p.d.ID("/orders"))
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
	p.d.Merlon("policy", "push", dir)
}

// config is that of web's sidecar: the addresses that the app knows are the service's
// own, and there they come to its sidecar.
func (p *capturedPair) config() (path string) {
	p.t.Helper()
	path = filepath.Join(stage.Dir(p.t), "sidecar.yaml")
	text := fmt.Sprintf(`agent_socket: %[1]s
health_address: "off"
captured_port: 15001
outbound:
  - {captures: ["%[2]s:8080", "[%[3]s]:8080"], to: orders, upstreams: ["%[2]s:8080", "[%[3]s]:8080"], protocol: http}
`, p.d.WorkloadAPI, p.hosts[0], p.hosts[1])
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
	os.Chmod(filepath.Dir(path), 0o755)
	return path
}

func TestCapturedCallsGoThroughSidecars(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("capture is not tested without nft: apt-get install nftables")
	}
	if !stage.InNamespace(t) {
		return
	}
	p := startCapturedPair(t)
	for _, host := range p.hosts {
		url := "http://" + net.JoinHostPort(host, "8080") + "/orders/1"
		stage.Eventually(t, "a call by the service's address arrives", func() error {
			status, body, err := callFrom(t, p.web, webApp, http.MethodGet, url)
			if err == nil && (status != http.StatusOK || body != "/orders/1 for "+p.d.ID("/web")) {
				err = fmt.Errorf("%d %q", status, body)
			}
			return err
		})
		before := p.calls.Load()
		if status, body, err := callFrom(t, p.web, webApp, http.MethodPost, url); err != nil || status != http.StatusForbidden || !strings.Contains(body, "METHOD") {
			t.Errorf("a call that the policy denies: %d %q, %v", status, body, err)
		}
		elsewhere := "http://" + net.JoinHostPort(host, "8081") + "/"
		if status, body, err := callFrom(t, p.web, webApp, http.MethodGet, elsewhere); err == nil {
			t.Errorf("a call to where no outbound is for: %d %q", status, body)
		}
		// T35: nobody comes past the sidecar of orders.
		if status, body, err := callFrom(t, p.network.Self(), 0, http.MethodGet, url); err == nil && status == http.StatusOK {
			t.Errorf("another machine reaches the app without a sidecar: %q", body)
		}
		if status, body, err := callFrom(t, p.web, webSidecar, http.MethodGet, url); err == nil && status == http.StatusOK {
			t.Errorf("the user of web's sidecar reaches the app without TLS: %q", body)
		}
		if n := p.calls.Load() - before; n != 0 {
			t.Errorf("the app saw %d of the calls that are to fail", n)
		}
	}
	p.failsClosed()
}

// failsClosed ends web's sidecar: nothing goes past it then.
func (p *capturedPair) failsClosed() {
	p.t.Helper()
	p.stopWeb()
	before := p.calls.Load()
	for _, host := range p.hosts {
		status, body, err := callFrom(p.t, p.web, webApp, http.MethodGet, "http://"+net.JoinHostPort(host, "8080")+"/orders/1")
		if _, dialled := errors.AsType[*net.OpError](err); !dialled {
			p.t.Errorf("while web's sidecar is away: %d %q, %v; want a refused connection", status, body, err)
		}
	}
	if n := p.calls.Load() - before; n != 0 {
		p.t.Errorf("the app saw %d of those calls", n)
	}
}
