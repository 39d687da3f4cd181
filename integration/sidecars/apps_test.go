// What stands behind a sidecar in the tests of hostile requests: Go's server, nginx and
// Node, each as people use it, and a tap before it that hears what it is sent.

package sidecars_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/policy"
	"merlon.dev/sdk"
)

// secret is what the apps answer below /admin, and below nothing else.
const secret = "the secret of admin"

// apps serve the files of root, over HTTP/1.1 and over HTTP/2 without TLS, and give the
// two addresses.
var apps = map[string]func(t *testing.T, root string) (http1, http2 string){"Go": goApp, "nginx": nginxApp, "Node": nodeApp}

func goApp(t *testing.T, root string) (http1, http2 string) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	files := http.FileServer(http.Dir(root))
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		files.ServeHTTP(w, r)
	})
	srv := &http.Server{Handler: handler, Protocols: &protocols, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(lis) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return lis.Addr().String(), lis.Addr().String()
}

func nginxApp(t *testing.T, root string) (http1, http2 string) {
	if _, err := exec.LookPath("nginx"); err != nil {
		t.Skip("needs nginx: apt-get install nginx-light")
	}
	dir := stage.Dir(t)
	config := fmt.Sprintf(`daemon off; pid %[1]s/pid; error_log %[1]s/err; worker_processes 1; events {}
http { access_log off; client_body_temp_path %[1]s/1; proxy_temp_path %[1]s/2; fastcgi_temp_path %[1]s/3; uwsgi_temp_path %[1]s/4; scgi_temp_path %[1]s/5;
underscores_in_headers on; error_page 405 =200 $uri; server { listen unix:%[1]s/1.sock; listen unix:%[1]s/2.sock http2; root %[2]s; } }`, dir, root)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	// Its workers run as somebody else if it is started by root.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	startServer(t, exec.Command("nginx", "-c", file, "-e", filepath.Join(dir, "err")))
	return "unix://" + dir + "/1.sock", "unix://" + dir + "/2.sock"
}

// nodeServer serves argv's folder at its two addresses.
const nodeServer = `const fs = require("fs"), path = require("path"), [root, one, two] = process.argv.slice(1);
const serve = (req, res) => {
  let name;
  try { name = decodeURIComponent(new URL(req.url, "http://app").pathname); } catch { res.statusCode = 400; return res.end(); }
  if (name.includes("\0")) { res.statusCode = 400; return res.end(); }
  fs.readFile(path.join(root, name), (err, text) => { res.statusCode = err ? 404 : 200; res.end(err ? "" : text); });
};
require("http").createServer(serve).listen(one);
require("http2").createServer(serve).listen(two);`

func nodeApp(t *testing.T, root string) (http1, http2 string) {
	if _, err := exec.LookPath("node"); err != nil {
		t.Skip("needs Node: apt-get install nodejs")
	}
	dir := stage.Dir(t)
	startServer(t, exec.Command("node", "-e", nodeServer, root, dir+"/1.sock", dir+"/2.sock"))
	return "unix://" + dir + "/1.sock", "unix://" + dir + "/2.sock"
}

func startServer(t *testing.T, cmd *exec.Cmd) {
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
}

// shop is a trust domain in which web may have what is public of the shop, whose
// sidecar tests start.
type shop struct {
	t    *testing.T
	d    *stage.Domain
	web  *sdk.Identity
	root string // of the apps
}

func openShop(t *testing.T) *shop {
	t.Helper()
	root := t.TempDir()
	for name, text := range map[string]string{"public/a": "public", "admin/a": secret, "ADMIN/a": secret, "admin.txt": secret} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for dir := root; dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) { // for nginx's workers
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d := stage.Separate(t)
	d.Merlon("entry", "create", "--parent", d.AgentID(), "--spiffe-id", d.ID("/shop"), "--selector", "unix:path:"+stage.Bin(t, "merlon-sidecar"))
	d.Entry("/web")
	dir := stage.Dir(t)
	grants := fmt.Sprintf("grants:\n  - {id: public, from: [%s], to: [%s], http: {paths: [\"/public/*\"]}}\n", d.ID("/web"), d.ID("/shop"))
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(grants), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", dir)
	web := services.Open(t, d, sdk.WithLogger(slog.New(slog.DiscardHandler)))
	return &shop{t: t, d: d, web: web, root: root}
}

// counter is the shop's sidecar with an app behind.
type counter struct {
	shop    *shop
	process *stage.Process
	tap     *stage.Tap
	app     string // past the sidecar
	address string
	alpn    string
	log     string // the access log's file
	before  int    // decisions that the agent knew of
}

// sell starts a sidecar that speaks protocol before an app.
func (s *shop) sell(t *testing.T, protocol, app string) *counter {
	t.Helper()
	c := &counter{
		shop: s, tap: stage.NewTap(t, app), app: app, address: fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)),
		before: s.d.Decisions(),
		alpn:   map[string]string{"http": "http/1.1", "http2": "h2"}[protocol], log: filepath.Join(t.TempDir(), "access.log"),
	}
	stage.Eventually(t, "the app listens", func() error {
		conn, err := stage.DialApp(app)
		if err == nil {
			conn.Close()
		}
		return err
	})
	c.process = stage.Start(t, "merlon-sidecar", []string{"SPIFFE_ENDPOINT_SOCKET=" + s.d.WorkloadAPI}, "-health-address", "off",
		"-inbound", c.address+","+c.tap.Address+","+protocol, "-access-log", c.log)
	return c
}

// dial connects as web.
func (c *counter) dial() (net.Conn, error) {
	return c.shop.web.DialTLS(sdk.Service("shop"), c.alpn)(c.shop.t.Context(), "tcp", c.address)
}

// record is a line of the access log.
type record struct {
	Remote     string `json:"remote"`
	Method     string `json:"method"`
	Path       string `json:"path"`
	Status     int    `json:"status"`
	Reason     string `json:"reason"`
	DecisionID string `json:"decision_id"`
	Upstream   string `json:"upstream"`
}

// close ends the sidecar, after which nothing is under way, and gives its access log by
// the callers' addresses. Before, the agent knows of as many decisions as are in it.
func (c *counter) close(t *testing.T) (records map[string][]record) {
	t.Helper()
	stage.Eventually(t, "the agent knows of each decision", func() error {
		known := c.shop.d.Decisions() - c.before
		if _, made := c.records(t); known != made {
			return fmt.Errorf("it knows of %d; want %d", known, made)
		}
		return nil
	})
	c.process.Stop()
	records, _ = c.records(t)
	return records
}

// records are what is in the access log, and how many of them have a decision.
func (c *counter) records(t *testing.T) (all map[string][]record, made int) {
	t.Helper()
	text, err := os.ReadFile(c.log)
	if err != nil {
		t.Fatal(err)
	}
	all = map[string][]record{}
	for line := range strings.Lines(string(text)) {
		var r record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("access log line %q: %v", line, err)
		}
		all[r.Remote] = append(all[r.Remote], r)
		if r.DecisionID != "" {
			made++
		}
	}
	return all, made
}

// isDenial says whether the record is one of a denial, and not of a request that went on.
func (r *record) isDenial() bool {
	return r.Reason != string(policy.Allowed) && r.Reason != "" && r.DecisionID != "" && r.Upstream == "" && (r.Status == 0 || r.Status >= 400)
}

// heardHTTP1 are the requests that an app was sent, as the letter of HTTP/1.1 has them.
// The last one of a connection may have been cut.
func heardHTTP1(t *testing.T, tap *stage.Tap) (all []*http.Request) {
	t.Helper()
	for _, sent := range tap.Heard() {
		for r := bufio.NewReader(bytes.NewReader(sent)); ; {
			req, err := http.ReadRequest(r)
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				break
			}
			if err != nil {
				t.Fatalf("what the app was sent is no HTTP/1.1: %v\n%q", err, sent)
			}
			io.Copy(io.Discard, req.Body)
			all = append(all, req)
		}
	}
	return all
}
