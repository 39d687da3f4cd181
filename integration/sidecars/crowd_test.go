// A crowd of callers that are idle, or slow, beside healthy ones: those are served as if
// they were alone, and the slow ones lose their connections (SECURITY.md T38). `make
// crowd` has thousands of them, and measures.

package sidecars_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/integration/frames"
	"merlon.dev/integration/measure"
	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
)

// market is an app behind a sidecar, which callers reach by mutual TLS, and another
// sidecar that leads there.
type market struct {
	t                 *testing.T
	web               *sdk.Identity
	inbound, outbound string
	protocol          string
}

// openMarket starts both with further flags.
func openMarket(t *testing.T, protocol string, app string, flags ...string) *market {
	t.Helper()
	d := stage.Dev(t)
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/shop"), "--selector", "unix:path:"+stage.Bin(t, "merlon-sidecar"))
	d.Entry("/web")
	dir := stage.Dir(t)
	grants := fmt.Sprintf("grants:\n  - {id: all, from: [%s, %s], to: [%[2]s], http: {}}\n", d.ID("/web"), d.ID("/shop"))
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(grants), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", dir)
	web := services.Open(t, d, sdk.WithLogger(slog.New(slog.DiscardHandler)))
	m := &market{t: t, web: web, protocol: protocol, inbound: fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), outbound: fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))}
	env := []string{"SPIFFE_ENDPOINT_SOCKET=" + d.WorkloadAPI}
	flags = append(flags, "-health-address", "off")
	stage.Start(t, "merlon-sidecar", env, append(flags, "-inbound", m.inbound+","+app+","+protocol)...)
	stage.Start(t, "merlon-sidecar", env, append(flags, "-outbound", m.outbound+",shop,"+protocol+","+m.inbound)...)
	return m
}

// raw connects and says nothing, secured is past the handshake.
func (m *market) raw() (net.Conn, error) { return net.Dial("tcp", m.inbound) }

func (m *market) secured() (net.Conn, error) {
	return m.web.DialTLS(sdk.Service("shop"), map[string]string{"http": "http/1.1", "http2": "h2"}[m.protocol])(context.Background(), "tcp", m.inbound)
}

// manner is what one of the crowd does until its connection ends, which it waits for.
type manner struct {
	name  string
	share int // of a hundred of the crowd of make crowd
	do    func(m *market) (conn net.Conn, drip string, err error)
}

// crowd are the manners over HTTP/1.1. What drips goes on byte by byte.
var crowd = []manner{
	{"idle", 80, func(m *market) (net.Conn, string, error) {
		conn, err := m.secured()
		if err != nil {
			return nil, "", err
		}
		fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil {
			_, err = io.Copy(io.Discard, res.Body)
		}
		return conn, "", err
	}},
	{"silent", 5, func(m *market) (net.Conn, string, error) { conn, err := m.raw(); return conn, "", err }},
	{"slow handshake", 5, func(m *market) (net.Conn, string, error) {
		conn, err := m.raw()
		return conn, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("a", 400), err
	}},
	{"slow head", 4, func(m *market) (net.Conn, string, error) {
		conn, err := m.secured()
		return conn, "GET / HTTP/1.1\r\nHost: shop\r\nX-A: " + strings.Repeat("a", 8000), err
	}},
	{"slow body", 3, func(m *market) (net.Conn, string, error) {
		conn, err := m.secured()
		if err == nil {
			_, err = fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 1000000\r\n\r\nbody")
		}
		return conn, "", err
	}},
	{"slow reader", 3, func(m *market) (net.Conn, string, error) {
		conn, err := m.secured()
		if err == nil {
			_, err = fmt.Fprint(conn, "GET /large HTTP/1.1\r\nHost: shop\r\n\r\n")
		}
		return conn, "", err
	}},
}

// stay behaves in a manner until the connection has ended or ctx is over, and says
// whether it was ended.
func (m *market) stay(ctx context.Context, how manner, pace time.Duration) (cut bool, err error) {
	conn, drip, err := how.do(m)
	if conn != nil {
		defer conn.Close()
	}
	if err != nil {
		return false, err
	}
	ended := make(chan struct{})
	if how.name == "slow reader" { // it learns of its end by writing
		drip = strings.Repeat("GET / HTTP/1.1\r\nHost: shop\r\n\r\n", 10_000)
	} else {
		go func() {
			defer close(ended)
			io.Copy(io.Discard, conn)
		}()
	}
	every := time.NewTicker(pace)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return false, nil
		case <-ended:
			return true, nil
		case <-every.C:
			if drip == "" {
				continue
			}
			if _, err := io.WriteString(conn, drip[:1]); err != nil {
				return true, nil
			}
			drip = drip[1:]
		}
	}
}

// marketApp answers with a little, or at /large with more than any buffer holds, and
// reads bodies.
func marketApp(t *testing.T) string {
	large := make([]byte, 64<<20)
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/large" {
			w.Write(large)
			return
		}
		io.WriteString(w, "hello")
	}))
	t.Cleanup(app.Close)
	return app.Listener.Addr().String()
}

func TestACrowdHurtsNobody(t *testing.T) {
	t.Parallel()
	const each = 20
	m := openMarket(t, "http", marketApp(t),
		"-connect-timeout", "3s", "-head-timeout", "3s", "-idle-timeout", "3s", "-stall-timeout", "3s")
	open := func() error { return services.Wants("http://"+m.outbound+"/", "200 hello") }
	stage.Eventually(t, "an answer", open)

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var there, healthy sync.WaitGroup
	cut := make([]atomic.Int64, len(crowd))
	for i, how := range crowd {
		for range each {
			there.Go(func() {
				ended, err := m.stay(ctx, how, 50*time.Millisecond)
				if err != nil {
					t.Errorf("%s: %v", how.name, err)
				}
				if ended {
					cut[i].Add(1)
				}
			})
		}
	}
	gone := make(chan struct{})
	var served atomic.Int64
	for range 4 {
		healthy.Go(func() {
			c := http.Client{Transport: &http.Transport{}, Timeout: 30 * time.Second}
			defer c.CloseIdleConnections()
			for {
				res, err := c.Get("http://" + m.outbound + "/")
				if err != nil {
					t.Errorf("a healthy caller: %v", err)
					return
				}
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
				if served.Add(1); res.StatusCode != http.StatusOK {
					t.Errorf("a healthy caller: %s", res.Status)
				}
				select {
				case <-gone:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
	}
	there.Wait()
	close(gone)
	healthy.Wait()
	t.Logf("%d healthy requests meanwhile", served.Load())
	for i, how := range crowd {
		if n := cut[i].Load(); n != each {
			t.Errorf("%s: %d of %d connections were ended", how.name, n, each)
		}
	}
}

// TestCrowdLatency is `make crowd`: MERLON_CROWD connections, there and not there in
// turn, beside a load generator that is not written in Go.
func TestCrowdLatency(t *testing.T) {
	size := numberFrom(t, "MERLON_CROWD", 0)
	if size == 0 {
		t.Skip("run make crowd")
	}
	rounds := numberFrom(t, "MERLON_ROUNDS", 5)
	for _, driver := range []struct {
		name, protocol string
		p99            func(t *testing.T, url string) time.Duration
	}{
		{"wrk", "http", wrk},
		{"h2load", "http2", h2load},
	} {
		t.Run(driver.name, func(t *testing.T) {
			app := marketApp(t)
			if driver.protocol == "http2" {
				app = http2App(t)
			}
			m := openMarket(t, driver.protocol, app)
			stage.Eventually(t, "the sidecars serve", func() error {
				conn, err := m.secured()
				if err == nil {
					conn.Close()
				}
				return err
			})
			url := "http://" + m.outbound + "/"
			driver.p99(t, url) // connections, caches, code
			var alone, beside, ratios []float64
			for range rounds {
				without := driver.p99(t, url)
				leave := m.gather(size)
				with := driver.p99(t, url)
				leave()
				alone, beside = append(alone, float64(without)), append(beside, float64(with))
				ratios = append(ratios, float64(with)/float64(without))
				t.Logf("p99 %v without, %v with the crowd: %.2f", without, with, float64(with)/float64(without))
			}
			t.Logf("%s, %d in the crowd, %d rounds: median p99 %v without, %v with; median ratio %.2f (target ≤ 2)", driver.name, size, rounds,
				time.Duration(measure.Median(alone)), time.Duration(measure.Median(beside)), measure.Median(ratios))
		})
	}
}

// gather has the crowd come; who is cut comes again, until leave is called.
func (m *market) gather(size int) (leave func()) {
	m.t.Helper()
	manners := crowd
	if m.protocol == "http2" { // bytes of HTTP/1.1 mean nothing there
		manners = []manner{{"idle", 90, func(m *market) (net.Conn, string, error) { return idleHTTP2(m) }}, crowd[1], crowd[2]}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all, arrived sync.WaitGroup
	var failed atomic.Int64
	room := make(chan struct{}, 16) // handshakes at the same time
	for _, how := range manners {
		for range size * how.share / 100 {
			arrived.Add(1)
			all.Go(func() {
				first := sync.OnceFunc(arrived.Done)
				defer first()
				patient := how
				patient.do = func(m *market) (net.Conn, string, error) {
					room <- struct{}{}
					defer func() { <-room; first() }()
					return how.do(m)
				}
				for ctx.Err() == nil {
					if _, err := m.stay(ctx, patient, time.Second); err != nil && ctx.Err() == nil {
						failed.Add(1)
						time.Sleep(100 * time.Millisecond)
					}
				}
			})
		}
	}
	arrived.Wait()
	return func() {
		m.t.Helper()
		cancel()
		all.Wait()
		if n := failed.Load(); n > 0 {
			m.t.Errorf("%d of the crowd did not get in", n)
		}
	}
}

// run gives what a driver printed.
func run(t *testing.T, pkg string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Skipf("needs %s: apt-get install %s", args[0], pkg)
	}
	out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return string(out)
}

var wrk99 = regexp.MustCompile(`(?m)^\s+99%\s+(\S+)$`)

func wrk(t *testing.T, url string) time.Duration {
	t.Helper()
	out := run(t, "wrk", "wrk", "-t", "1", "-c", "16", "-d", "5s", "--latency", url)
	found := wrk99.FindStringSubmatch(out)
	if found == nil || strings.Contains(out, "errors") || strings.Contains(out, "Non-2xx") {
		t.Fatalf("wrk:\n%s", out)
	}
	d, err := time.ParseDuration(found[1])
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func h2load(t *testing.T, url string) time.Duration {
	t.Helper()
	file := filepath.Join(t.TempDir(), "log")
	out := run(t, "nghttp2-client", "h2load", "-c", "4", "-m", "4", "-D", "5", "--log-file", file, url)
	if !strings.Contains(out, " 0 failed, 0 errored, 0 timeout") || strings.Contains(out, "requests: 0 total") {
		t.Fatalf("h2load:\n%s", out)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var took []float64 // in µs
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line) // begun, status, took
		if len(fields) != 3 || fields[1] != "200" {
			t.Fatalf("h2load's log: %q", line)
		}
		us, err := strconv.ParseFloat(fields[2], 64)
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, us)
	}
	slices.Sort(took)
	return time.Duration(measure.Quantile(took, 0.99)) * time.Microsecond
}

func idleHTTP2(m *market) (net.Conn, string, error) {
	conn, err := m.secured()
	if err != nil {
		return nil, "", err
	}
	c := frames.New(conn)
	c.Hello()
	c.Headers(1, true, asking()...)
	if got := c.Await(1); got.Status != "200" {
		return conn, "", errors.New("no answer, but " + got.Status + got.ErrCode.String())
	}
	return conn, "", nil
}
