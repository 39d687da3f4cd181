// P9 and P10: what a pair of sidecars costs, beside a pair made of
// httputil.ReverseProxy and, where it is installed, a pair of HAProxy. Each pair is
// two processes; the figures are CPU of both per request, in turn with the others,
// and the time that the caller waits.

package bench_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
)

// proxied is a pair of processes between the caller and the app.
type proxied struct {
	name  string
	entry string // where the caller connects
	inner string // where the process behind that does
	pids  []int
}

// pairs starts the pairs around an app, and waits until each serves.
func pairs(b *testing.B, d *stage.Domain, app, protocol string) []proxied {
	b.Helper()
	admin := capb.NewAdminClient(dial(b, d.Admin))
	rule := "http: {methods: [GET, POST], paths: [/orders/*]}"
	if protocol == "tcp" {
		rule = "tcp: {}"
	}
	sidecar, baseline := "merlon-sidecar", stage.Build(b, "reverseproxy", "integration/reverseproxy", "")
	for _, name := range []string{sidecar, baseline} {
		d.Merlon("entry", "create", "--spiffe-id", d.ID("/me"), "--selector", "unix:path:"+stage.Bin(b, name))
	}
	push(b, admin, built(b, d, rule, ""))
	env := []string{"SPIFFE_ENDPOINT_SOCKET=" + d.WorkloadAPI}
	port := func() string { return fmt.Sprintf("127.0.0.1:%d", stage.FreePort(b)) }
	in, out := port(), port()
	all := []proxied{{"sidecar", out, in, []int{
		stage.Start(b, sidecar, env, "-health-address", "off", "-inbound", in+","+app+","+protocol).PID(),
		stage.Start(b, sidecar, env, "-health-address", "off", "-outbound", out+",me,"+protocol+","+in).PID(),
	}}}
	if protocol == "http" {
		in, out := port(), port()
		all = append(all, proxied{"reverseproxy", out, in, []int{
			stage.Start(b, baseline, env, "inbound", in, app).PID(),
			stage.Start(b, baseline, env, "outbound", out, "me", in).PID(),
		}})
	}
	if path, err := exec.LookPath("haproxy"); err == nil {
		all = append(all, haproxy(b, path, app, protocol, port(), port()))
	} else {
		b.Log("HAProxy is not measured: apt-get install haproxy")
	}
	return all
}

// haproxy is mutual TLS 1.3 between two HAProxys of one thread per processor.
func haproxy(b *testing.B, path, app, protocol, in, out string) proxied {
	b.Helper()
	dir := b.TempDir()
	files := stage.Certify(b, dir, "127.0.0.1")
	var both []byte
	for _, f := range []string{files.Cert, files.Key} {
		text, err := os.ReadFile(f)
		if err != nil {
			b.Fatal(err)
		}
		both = append(both, text...)
	}
	pem := filepath.Join(dir, "both.pem")
	if err := os.WriteFile(pem, both, 0o600); err != nil {
		b.Fatal(err)
	}
	config := func(name, bind, server string) int {
		text := fmt.Sprintf("global\n  ssl-default-bind-options ssl-min-ver TLSv1.3\n  tune.ssl.default-dh-param 2048\ndefaults\n  mode %s\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n  http-reuse always\nlisten l\n  bind %s\n  server s %s\n", protocol, bind, server)
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
		cmd := exec.Command(path, "-db", "-f", file)
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		return cmd.Process.Pid
	}
	tls := "crt " + pem + " ca-file " + files.CA + " verify required"
	return proxied{"haproxy", out, in, []int{
		config("in.cfg", in+" ssl "+tls, app),
		config("out.cfg", out, in+" ssl "+tls),
	}}
}

// plainApp answers each request of HTTP/1.1 with size bytes; it reads bodies.
func plainApp(b *testing.B, size int) string {
	b.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { lis.Close() })
	answer := append([]byte(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n", size)), make([]byte, size)...)
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				for r := bufio.NewReaderSize(conn, 64<<10); ; {
					if skipMessage(r) != nil {
						return
					}
					if _, err := conn.Write(answer); err != nil {
						return
					}
				}
			}()
		}
	}()
	return lis.Addr().String()
}

// skipMessage reads a head and the body that its Content-Length announces.
func skipMessage(r *bufio.Reader) error {
	length := 0
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) == 2 {
			_, err := r.Discard(length)
			return err
		}
		if name, value, ok := bytes.Cut(line, []byte(": ")); ok && strings.EqualFold(string(name), "content-length") {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil {
				return err
			}
		}
	}
}

// caller keeps one connection and makes requests over it.
type caller struct {
	conn net.Conn
	r    *bufio.Reader
}

func newCaller(address string) (*caller, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	return &caller{conn, bufio.NewReaderSize(conn, 64<<10)}, nil
}

func (c *caller) call(request []byte) error {
	if _, err := c.conn.Write(request); err != nil {
		return err
	}
	status, err := c.r.Peek(len("HTTP/1.1 200"))
	if err != nil {
		return err
	}
	if string(status) != "HTTP/1.1 200" {
		rest, _ := io.ReadAll(io.LimitReader(c.r, 1<<10))
		return fmt.Errorf("answer: %s", rest)
	}
	return skipMessage(c.r)
}

// ticks is the CPU time of the processes, in the kernel's ticks of 10 ms.
func ticks(b *testing.B, pids []int) (n int) {
	b.Helper()
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			b.Fatal(err)
		}
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		for _, f := range fields[11:13] {
			t, err := strconv.Atoi(f)
			if err != nil {
				b.Fatal(err)
			}
			n += t
		}
	}
	return n
}

// measured are the figures of a pair.
type measured struct {
	ticks, requests int
	took            []time.Duration
}

// run makes n requests over each caller at the same time.
func (m *measured) run(b *testing.B, p proxied, callers []*caller, request []byte, n int) {
	b.Helper()
	before := ticks(b, p.pids)
	took := make([][]time.Duration, len(callers))
	errs := make([]error, len(callers))
	var all sync.WaitGroup
	for i, c := range callers {
		all.Go(func() {
			for range n {
				begun := time.Now()
				if errs[i] = c.call(request); errs[i] != nil {
					return
				}
				took[i] = append(took[i], time.Since(begun))
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		b.Fatal(p.name, err)
	}
	m.ticks += ticks(b, p.pids) - before
	m.requests += n * len(callers)
	for _, t := range took {
		m.took = append(m.took, t...)
	}
}

func benchPairs(b *testing.B, all []proxied, concurrent int, request []byte) {
	callers := make([][]*caller, len(all))
	for i, p := range all {
		stage.Eventually(b, p.name+" serves", func() error {
			c, err := newCaller(p.entry)
			if err != nil {
				return err
			}
			defer c.conn.Close()
			return c.call(request)
		})
		for range concurrent {
			c, err := newCaller(p.entry)
			if err != nil {
				b.Fatal(err)
			}
			defer c.conn.Close()
			callers[i] = append(callers[i], c)
		}
	}
	figures := make([]measured, len(all))
	n := max(2000/concurrent, 20)
	if len(request) > 64<<10 {
		n = max(n/20, 4)
	}
	rounds := 0
	for b.Loop() {
		for i := range all {
			at := (i + rounds) % len(all)
			figures[at].run(b, all[at], callers[at], request, n)
		}
		rounds++
	}
	b.ReportMetric(0, "ns/op")
	for i, p := range all {
		b.ReportMetric(float64(figures[i].ticks)*10_000/float64(figures[i].requests), p.name+"-cpu-µs")
		report(b, p.name, figures[i].took)
		if i > 0 && figures[i].ticks > 0 {
			b.ReportMetric(float64(figures[0].ticks)/float64(figures[0].requests)/(float64(figures[i].ticks)/float64(figures[i].requests)), "ratio-to-"+p.name)
		}
	}
}

func BenchmarkSidecarPair(b *testing.B) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	head := "%s /orders/17 HTTP/1.1\r\nHost: orders\r\nUser-Agent: bench\r\nAccept: */*\r\nX-Request-Id: 0123456789abcdef\r\n"
	get := []byte(fmt.Sprintf(head, "GET") + "\r\n")
	post := append([]byte(fmt.Sprintf(head, "POST")+"Content-Length: 1048576\r\n\r\n"), make([]byte, 1<<20)...)
	for _, protocol := range []string{"http", "tcp"} {
		b.Run(protocol, func(b *testing.B) {
			all := pairs(b, stage.Dev(b), plainApp(b, 100), protocol)
			for _, concurrent := range []int{1, 16, 64} {
				b.Run(fmt.Sprintf("GET/concurrent=%d", concurrent), func(b *testing.B) { benchPairs(b, all, concurrent, get) })
			}
			b.Run("POST-1MiB/concurrent=4", func(b *testing.B) { benchPairs(b, all, 4, post) })
		})
	}
}

// BenchmarkSidecarMemory is what each side holds idle, and for each of 1 000
// connections that have made a request and are kept.
func BenchmarkSidecarMemory(b *testing.B) {
	const many = 1000
	d := stage.Dev(b)
	d.Entry("/me")
	p := pairs(b, d, plainApp(b, 100), "http")[0]
	id, err := sdk.Open(b.Context(), sdk.WithAgentAddress(d.WorkloadAPI), sdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		b.Fatal(err)
	}
	defer id.Close()
	request := []byte("GET /orders/17 HTTP/1.1\r\nHost: orders\r\n\r\n")
	dials := []func() (net.Conn, error){
		func() (net.Conn, error) {
			return id.DialTLS(sdk.Service("me"), "http/1.1")(b.Context(), "tcp", p.inner)
		},
		func() (net.Conn, error) { return net.Dial("tcp", p.entry) },
	}
	for b.Loop() {
		for i, name := range []string{"inbound", "outbound"} {
			var first *caller
			stage.Eventually(b, "the sidecars serve", func() error {
				var err error
				first, err = call(dials[i], request)
				return err
			})
			idle := resident(b, p.pids[i])
			callers := []*caller{first}
			for range many {
				c, err := call(dials[i], request)
				if err != nil {
					b.Fatal(err)
				}
				callers = append(callers, c)
			}
			b.ReportMetric(float64(idle)/1024, name+"-MiB")
			b.ReportMetric(float64(resident(b, p.pids[i])-idle)/many, name+"-KiB/conn")
			for _, c := range callers {
				c.conn.Close()
			}
		}
	}
}

// call makes a request over a connection of its own, which stays.
func call(dial func() (net.Conn, error), request []byte) (*caller, error) {
	conn, err := dial()
	if err != nil {
		return nil, err
	}
	c := &caller{conn, bufio.NewReaderSize(conn, 4<<10)}
	if err := c.call(request); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

// resident is the memory of a process in KiB.
func resident(b *testing.B, pid int) int {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "VmRSS:")
	n, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		b.Fatal(err)
	}
	return n
}
