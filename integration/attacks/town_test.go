// Package attacks_test attacks the real binaries from outside. README.md says which
// attack is tested where; this file starts what is attacked.
package attacks_test

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(passTo); path != "" {
		if err := passConnection(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		return
	}
	m.Run()
	stage.RemoveBins()
}

// stranger is a user of the machine who is nobody to Merlon.
const stranger = 4242

// town is a CA, an agent, and two services that web may read: shop is an app behind a
// sidecar, orders a program built on the SDK. The test itself is web. All log as
// much as they can.
type town struct {
	*stage.Domain
	sidecar, service *stage.Process
	web              *sdk.Identity
	shop, orders     string // host:port
	endpoint         string // of the trust bundle, by a certificate of the web
	sidecarHealth    string
	accessLog        string
	decisionLog      string
}

const everything = "log_level: debug"

func startTown(t *testing.T) *town {
	t.Helper()
	address := func() string { return fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)) }
	dir := stage.Dir(t)
	c := &town{
		shop: address(), orders: address(), endpoint: address(), sidecarHealth: address(),
		accessLog: filepath.Join(dir, "access.jsonl"), decisionLog: filepath.Join(dir, "decisions.jsonl"),
	}
	files := stage.Certify(t, dir, "127.0.0.1")
	c.Domain = stage.CAAlone(t, "merlon-ca", nil, everything,
		fmt.Sprintf("bundle_endpoint: {address: '%s', cert_file: '%s', key_file: '%s'}", c.endpoint, files.Cert, files.Key), "jwt_issuer: https://"+c.endpoint)
	token := c.Token()
	c.StartAgentBy(token.RootHash, "join_token: "+token.Token, everything, "decision_log_file: "+c.decisionLog)
	env := []string{"SPIFFE_ENDPOINT_SOCKET=" + c.WorkloadAPI}

	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
	t.Cleanup(app.Close)
	service := stage.Build(t, "service", "examples/http", "")
	for path, program := range map[string]string{"/shop": "merlon-sidecar", "/orders": service} {
		c.Merlon("entry", "create", "--spiffe-id", c.ID(path), "--parent", token.AgentID, "--selector", "unix:path:"+stage.Bin(t, program))
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c.Merlon("entry", "create", "--spiffe-id", c.ID("/web"), "--parent", token.AgentID, "--selector", "unix:path:"+self)
	grants := fmt.Sprintf("grants:\n  - {id: web-reads, from: [%s], to: [%s, %s], http: {methods: [GET]}}\n", c.ID("/web"), c.ID("/shop"), c.ID("/orders"))
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(grants), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Merlon("policy", "push", dir)
	c.sidecar = stage.Start(t, "merlon-sidecar", env, "-log-level", "debug", "-access-log", c.accessLog, "-health-address", c.sidecarHealth,
		"-inbound", c.shop+","+app.Listener.Addr().String()+",http")
	c.service = stage.Start(t, service, env, "serve", c.orders, "/")

	c.web, err = sdk.Open(t.Context(), sdk.WithAgentAddress(c.WorkloadAPI), sdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.web.Close() })
	for _, service := range []string{"shop", "orders"} {
		stage.Eventually(t, service+" answers", func() error {
			if text := c.send(t, service, "GET /hello HTTP/1.1\r\nHost: "+service+"\r\nConnection: close\r\n\r\n"); !strings.HasPrefix(text, "HTTP/1.1 200 ") {
				return fmt.Errorf("%.200q", text)
			}
			return nil
		})
	}
	return c
}

// send sends bytes to a service over mutual TLS, as web, and gives all that comes back.
func (c *town) send(t *testing.T, service, request string) string {
	t.Helper()
	conn, err := c.web.DialTLS(sdk.Service(service), "http/1.1")(t.Context(), "tcp", map[string]string{"shop": c.shop, "orders": c.orders}[service])
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, request); err != nil {
		return err.Error()
	}
	text, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, net.ErrClosed) && len(text) == 0 {
		return err.Error()
	}
	return string(text)
}

// openTo lets other users come to a path below a temporary folder.
func openTo(t *testing.T, path string) {
	t.Helper()
	for dir := filepath.Dir(path); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// processes are those of Merlon, by name.
func (c *town) processes() map[string]*stage.Process {
	return map[string]*stage.Process{"merlon-ca": c.CA, "merlon-agent": c.Agent, "merlon-sidecar": c.sidecar, "service": c.service}
}

// get is an answer of an address that speaks HTTP.
func get(t *testing.T, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err.Error()
	}
	return res.StatusCode, string(body)
}
