// What the policy denies no server serves: requests that servers read differently, sent
// to Go, nginx and Node behind a sidecar (SECURITY.md T13 to T18).

package integration_test

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
)

// secret is what the apps answer below /admin, and below nothing else.
const secret = "the secret of admin"

// goApp, nginxApp and nodeApp serve /public/ and /admin, each as it is used to, and
// give the address.
func goApp(t *testing.T, root string) string {
	srv := httptest.NewServer(http.FileServer(http.Dir(root)))
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String()
}

func nginxApp(t *testing.T, root string) string {
	if _, err := exec.LookPath("nginx"); err != nil {
		t.Skip("needs nginx: apt-get install nginx-light")
	}
	dir := stage.Dir(t)
	socket := filepath.Join(dir, "nginx.sock")
	config := fmt.Sprintf(`daemon off; pid %[1]s/pid; error_log %[1]s/err; worker_processes 1; events {}
http { access_log off; client_body_temp_path %[1]s/1; proxy_temp_path %[1]s/2; fastcgi_temp_path %[1]s/3; uwsgi_temp_path %[1]s/4; scgi_temp_path %[1]s/5;
underscores_in_headers on; server { listen unix:%[2]s; root %[3]s; } }`, dir, socket, root)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	// Its workers run as somebody else if it is started by root.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	startServer(t, exec.Command("nginx", "-c", file, "-e", filepath.Join(dir, "err")))
	return "unix://" + socket
}

func nodeApp(t *testing.T, root string) string {
	if _, err := exec.LookPath("node"); err != nil {
		t.Skip("needs Node: apt-get install nodejs")
	}
	address := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	host, port, _ := net.SplitHostPort(address)
	script := fmt.Sprintf(`const fs = require("fs"), path = require("path");
require("http").createServer((req, res) => {
  const url = new URL(req.url, "http://app");
  fs.readFile(path.join(%q, decodeURIComponent(url.pathname)), (err, text) => { res.statusCode = err ? 404 : 200; res.end(err ? "" : text); });
}).listen(%s, %q);`, root, port, host)
	startServer(t, exec.Command("node", "-e", script))
	return address
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

func TestWhatThePolicyDeniesNoServerServes(t *testing.T) {
	t.Parallel()
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
	d := stage.Dev(t)
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/shop"), "--selector", "unix:path:"+stage.Bin(t, "merlon-sidecar"))
	d.Entry("/web")
	dir := stage.Dir(t)
	grants := fmt.Sprintf("grants:\n  - {id: public, from: [%s], to: [%s], http: {paths: [\"/public/*\"]}}\n", d.ID("/web"), d.ID("/shop"))
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(grants), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", dir)
	web, err := sdk.Open(t.Context(), sdk.WithAgentAddress(d.WorkloadAPI), sdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	defer web.Close()
	env := []string{"SPIFFE_ENDPOINT_SOCKET=" + d.WorkloadAPI}
	for name, app := range map[string]func(*testing.T, string) string{"Go": goApp, "nginx": nginxApp, "Node": nodeApp} {
		t.Run(name, func(t *testing.T) {
			inbound := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
			address := app(t, root)
			stage.Start(t, "merlon-sidecar", env, "-health-address", "off", "-inbound", inbound+","+address+",http")
			bare := func() (net.Conn, error) {
				if path, ok := strings.CutPrefix(address, "unix://"); ok {
					return net.Dial("unix", path)
				}
				return net.Dial("tcp", address)
			}
			secured := func() (net.Conn, error) {
				return web.DialTLS(sdk.Service("shop"), "http/1.1")(t.Context(), "tcp", inbound)
			}
			send := func(dial func() (net.Conn, error), request string, limit time.Duration) (string, error) {
				conn, err := dial()
				if err != nil {
					return "", err
				}
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(limit))
				if _, err := io.WriteString(conn, request); err != nil {
					return "", err
				}
				var all strings.Builder
				r := bufio.NewReader(conn)
				for { // as many answers as come
					res, err := http.ReadResponse(r, nil)
					if err != nil {
						return all.String(), nil
					}
					text, _ := io.ReadAll(res.Body)
					fmt.Fprintf(&all, "%d %s;", res.StatusCode, text)
					if res.Close {
						return all.String(), nil
					}
				}
			}
			get := func(target string) string {
				return "GET " + target + " HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n"
			}
			stage.Eventually(t, "a public answer", func() error {
				got, err := send(secured, get("/public/a"), 20*time.Second)
				if err == nil && got != "200 public;" {
					err = fmt.Errorf("%q; want the public answer", got)
				}
				return err
			})
			served := 0
			for _, request := range hostile(get) {
				if got, _ := send(bare, request, time.Second); strings.Contains(got, secret) {
					served++
				}
				got, err := send(secured, request, 20*time.Second)
				if err != nil || strings.Contains(got, secret) || got == "" {
					t.Errorf("%q: %q, %v", request, got, err)
				}
			}
			t.Logf("%d of the requests get the secret without a sidecar", served)
			if served < 5 {
				t.Error("the requests prove nothing about this server")
			}
		})
	}
}

// hostile are requests for admin in the clothes of public.
func hostile(get func(string) string) (all []string) {
	for _, target := range []string{
		"/admin/a", "/ADMIN/a", "/admin.txt", "//admin/a", "/public//../admin/a", "/public/../admin/a", "/public/./../admin/a", "/public/..;/admin/a", "/public/..%2fadmin/a",
		"/public/%2e%2e/admin/a", "/public/%2E%2E%2Fadmin/a", "/public/.%2e/admin/a", "/public/%252e%252e/admin/a", "/public/..%5cadmin/a", `/public/..\admin/a`,
		"/public%2f..%2fadmin/a", "/public/..%c0%afadmin/a", "/public/..%ef%bc%8fadmin/a", "/public/%u002e%u002e/admin/a", "/public/a/../../admin/a", "/public/..%00/admin/a",
		"/admin/a?/public/a", "/admin/a#/public/a", "/public/a%00/../../admin/a", "/%61dmin/a", "/./admin/a", "/public/../../../../admin/a", "http://shop/admin/a",
		"http://shop/public/../admin/a", "*", "admin/a", "/public/a/..%2f..%2fadmin/a", "/public/%c0%ae%c0%ae/admin/a", "/public/..%09/admin/a", "/public/..;a=b/admin/a",
		"/public/%2e%2e;/admin/a", "?/../admin/a", "/public/..?/admin/a", "/public/..#/admin/a",
	} {
		all = append(all, get(target))
	}
	smuggled := get("/admin/a")
	n := len(smuggled)
	return append(all,
		"GET /public/a HTTP/1.1\r\nHost: shop\r\nContent-Length: "+fmt.Sprint(n)+"\r\nConnection: close\r\n\r\n"+smuggled,
		"POST /public/a HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"+smuggled,
		"POST /public/a HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\nContent-Length: "+fmt.Sprint(n)+"\r\n\r\n"+smuggled,
		"POST /public/a HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"+smuggled,
		"POST /public/a HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding:\x0bchunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"+smuggled,
		"POST /public/a HTTP/1.1\r\nHost: shop\r\nTransfer_Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"+smuggled,
		"POST /public/a HTTP/1.1\r\nHost: shop\r\nX: a\nContent-Length: "+fmt.Sprint(n)+"\r\n\r\n"+smuggled,
		"GET /public/a HTTP/1.1\r\nHost: shop\r\nX: a\r\n\rGET /admin/a HTTP/1.1\r\n\r\n"+smuggled,
		"GET /public/a HTTP/1.1\r\nHost: shop\r\nX-Original-URL: /admin/a\r\nX-Rewrite-URL: /admin/a\r\nConnection: close\r\n\r\n",
		"GET /public/a HTTP/1.1\r\nHost: shop\r\nConnection: close, content-length\r\nContent-Length: "+fmt.Sprint(n)+"\r\n\r\n"+smuggled,
		"GET /public/a HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"+smuggled,
		"CONNECT /admin/a HTTP/1.1\r\nHost: shop\r\n\r\n"+smuggled,
		"POST /public/a HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n0;\n\r\n\r\n"+smuggled,
		"POST /public/a HTTP/1.1\r\nHost: shop\r\nExpect: 100-continue\r\nContent-Length: "+fmt.Sprint(n)+"\r\nConnection: close\r\n\r\n"+smuggled,
	)
}
