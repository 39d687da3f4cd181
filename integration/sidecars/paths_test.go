// What the policy denies no server serves: requests that servers read differently, sent
// to Go, nginx and Node behind a sidecar (SECURITY.md T13 to T18).

package sidecars_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/stage"
)

func TestWhatThePolicyDeniesNoServerServes(t *testing.T) {
	t.Parallel()
	s := openShop(t)
	for name, app := range apps {
		t.Run(name, func(t *testing.T) {
			address, _ := app(t, s.root)
			c := s.sell(t, "http", address)
			stage.Eventually(t, "a public answer", func() error {
				got, _, err := sends(c.dial, lone("/public/a"), 20*time.Second)
				if err == nil && fmt.Sprint(got) != "[200 public]" {
					err = fmt.Errorf("%q; want the public answer", got)
				}
				return err
			})
			served := 0
			said := map[string]string{} // by the address that it came from
			answers := map[string]int{}
			for _, request := range hostile() {
				past := func() (net.Conn, error) { return stage.DialApp(c.app) }
				if got, _, _ := sends(past, request, 300*time.Millisecond); strings.Contains(fmt.Sprint(got), secret) {
					served++
				}
				got, from, err := sends(c.dial, request, 20*time.Second)
				said[from], answers[from] = request, len(got)
				if err != nil || strings.Contains(fmt.Sprint(got), secret) || len(got) == 0 {
					t.Errorf("%q: %q, %v", request, got, err)
				}
			}
			t.Logf("%d of the requests get the secret without a sidecar", served)
			if served < 5 {
				t.Error("the requests prove nothing about this server")
			}
			records := c.close(t)
			for from, request := range said {
				if n := len(records[from]); n != answers[from] {
					t.Errorf("%q: %d answers and %d records: %v", request, answers[from], n, records[from])
				}
			}
			for _, r := range heardHTTP1(t, c.tap) {
				if !strings.HasPrefix(r.RequestURI, "/public/") || strings.Join(r.Header["X-Spiffe-Id"], ",") != s.d.ID("/web") {
					t.Errorf("the app heard %s %s, %v", r.Method, r.RequestURI, r.Header)
				}
			}
		})
	}
}

// sends opens a connection, sends text, and gives as many answers as come, each its
// status and its body, and the address that it came from.
func sends(dial func() (net.Conn, error), text string, limit time.Duration) (answers []string, from string, err error) {
	conn, err := dial()
	if err != nil {
		return nil, "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	if _, err := io.WriteString(conn, text); err != nil {
		return nil, "", err
	}
	from = conn.LocalAddr().String()
	for r := bufio.NewReader(conn); ; {
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			return answers, from, nil
		}
		if res.StatusCode == http.StatusContinue {
			continue
		}
		body, _ := io.ReadAll(res.Body)
		answers = append(answers, fmt.Sprintf("%d %s", res.StatusCode, body))
		if res.Close || res.StatusCode == http.StatusSwitchingProtocols {
			return answers, from, nil
		}
	}
}

// lone is a request that is the last of its connection.
func lone(target string) string {
	return "GET " + target + " HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n"
}

// hostilePaths lead to admin where a server reads them as it likes.
var hostilePaths = []string{
	"/admin/a", "/ADMIN/a", "/admin.txt", "//admin/a", "/public//../admin/a", "/public/../admin/a", "/public/./../admin/a", "/public/..;/admin/a", "/public/..%2fadmin/a",
	"/public/%2e%2e/admin/a", "/public/%2E%2E%2Fadmin/a", "/public/.%2e/admin/a", "/public/%252e%252e/admin/a", "/public/..%5cadmin/a", `/public/..\admin/a`,
	"/public%2f..%2fadmin/a", "/public/..%c0%afadmin/a", "/public/%u002e%u002e/admin/a", "/public/a/../../admin/a", "/public/..%00/admin/a",
	"/admin/a?/public/a", "/admin/a#/public/a", "/public/a%00/../../admin/a", "/%61dmin/a", "/./admin/a", "/public/../../../../admin/a", "http://shop/admin/a",
	"http://shop/public/../admin/a", "*", "admin/a", "/public/a/..%2f..%2fadmin/a", "/public/%c0%ae%c0%ae/admin/a", "/public/..%09/admin/a", "/public/..;a=b/admin/a",
	"/public/%2e%2e;/admin/a", "?/../admin/a", "/public/..?/admin/a", "/public/..#/admin/a",
}

// hostile are requests for admin in the clothes of public.
func hostile() (all []string) {
	for _, target := range hostilePaths {
		all = append(all, lone(target))
	}
	all = append(all, lone("/public/..%ef%bc%8fadmin/a")) // a slash to nobody, so it goes on
	smuggled := lone("/admin/a")
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
		upgrade("/admin/a", "")+smuggled,
		upgrade("/admin/a", "")+lone("/public/a"),
		upgrade("/public/a", "")+smuggled, // no app here speaks WebSocket
		upgrade("/public/a", "Sec-WebSocket-Version: 12\r\n")+smuggled,
		upgrade("/public/../admin/a", "")+smuggled,
		upgrade("/public/a", "Upgrade: h2c\r\n")+smuggled,
		strings.Replace(upgrade("/public/a", ""), "GET", "POST", 1)+smuggled,
		"POST /public/a HTTP/1.1\r\nHost: shop\r\nExpect: 100-continue\r\nContent-Length: "+fmt.Sprint(n)+"\r\nConnection: close\r\n\r\n"+smuggled,
	)
}

// upgrade asks for a WebSocket.
func upgrade(target, fields string) string {
	return "GET " + target + " HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + fields + "\r\n"
}
