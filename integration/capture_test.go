// Two machines with an app each that knows nothing of a sidecar, and calls by address
// as ever: rules of the kernel have its calls go through both sidecars.

package integration_test

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

func TestCapturedCallsGoThroughSidecars(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("capture is not tested without nft: apt-get install nftables")
	}
	if _, err := exec.LookPath("setpriv"); err != nil {
		t.Skip("capture is not tested without setpriv: apt-get install util-linux")
	}
	if !stage.InNamespace(t) {
		return
	}
	d := stage.Dev(t)
	sidecar := stage.Bin(t, "merlon-sidecar")
	socket := strings.TrimPrefix(d.WorkloadAPI, "unix://")
	for dir := filepath.Dir(socket); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		os.Chmod(dir, 0o755) // for other users
	}
	os.Chmod(filepath.Dir(sidecar), 0o755)
	for path, uid := range map[string]int{"/web": webSidecar, "/orders": ordersSidecar} {
		d.Merlon("entry", "create", "--spiffe-id", d.ID(path), "--selector", fmt.Sprintf("unix:uid:%d", uid))
	}
	policy := t.TempDir()
	text := fmt.Sprintf("grants:\n  - id: web\n    from: [%s]\n    to: [%s]\n    http: {methods: [GET]}\n", d.ID("/web"), d.ID("/orders"))
	if err := os.WriteFile(filepath.Join(policy, "grants.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", policy)

	network := stage.NewNetwork(t)
	web, orders := network.Machine("web"), network.Machine("orders")
	calls := appOn(t, orders, ":8080")
	orders.Run(t, sidecar, "capture", "install", "-sidecar-user", fmt.Sprint(ordersSidecar), "-inbound", "8080:8443")
	orders.Start(t, ordersSidecar, nil, sidecar, "-agent-socket", d.WorkloadAPI, "-inbound", ":8443,127.0.0.1:8080,http", "-health-address", "off")
	config := filepath.Join(stage.Dir(t), "sidecar.yaml")
	// The address that the app knows is the service's own; there it comes to the sidecar.
	text = fmt.Sprintf(`agent_socket: %[1]s
health_address: "off"
captured_port: 15001
outbound:
  - {captures: ["%[2]s:8080"], to: orders, upstreams: ["%[2]s:8080"], protocol: http}
`, d.WorkloadAPI, orders.IP)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	os.Chmod(filepath.Dir(config), 0o755)
	web.Run(t, sidecar, "capture", "install", "-sidecar-user", fmt.Sprint(webSidecar), "-outbound-port", "15001")
	stop := web.Start(t, webSidecar, nil, sidecar, "-config", config)

	url := "http://" + orders.IP + ":8080/orders/1"
	stage.Eventually(t, "a call by the service's address arrives", func() error {
		status, body, err := callFrom(t, web, webApp, http.MethodGet, url)
		if err == nil && (status != http.StatusOK || body != "/orders/1 for "+d.ID("/web")) {
			err = fmt.Errorf("%d %q", status, body)
		}
		return err
	})
	before := calls.Load()
	if status, body, err := callFrom(t, web, webApp, http.MethodPost, url); err != nil || status != http.StatusForbidden || !strings.Contains(body, "METHOD") {
		t.Errorf("a call that the policy denies: %d %q, %v", status, body, err)
	}
	if status, body, err := callFrom(t, web, webApp, http.MethodGet, "http://"+orders.IP+":8081/"); err == nil {
		t.Errorf("a call to where no outbound is for: %d %q", status, body)
	}
	// T35: nobody comes past the sidecar of orders.
	for name, from := range map[string]*stage.Namespace{"another machine": network.Self(), "the user of web's sidecar": web} {
		uid := 0
		if from == web {
			uid = webSidecar
		}
		if status, body, err := callFrom(t, from, uid, http.MethodGet, url); err == nil && status == http.StatusOK {
			t.Errorf("%s reaches the app without a sidecar: %q", name, body)
		}
	}
	stop()
	if status, body, err := callFrom(t, web, webApp, http.MethodGet, url); err == nil {
		t.Errorf("while web's sidecar is away: %d %q", status, body)
	} else if _, dialled := errors.AsType[*net.OpError](err); !dialled {
		t.Errorf("while web's sidecar is away: %v; want a refused connection", err)
	}
	if n := calls.Load() - before; n != 0 {
		t.Errorf("the app saw %d of those calls", n)
	}
}
