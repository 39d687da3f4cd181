// T38, T29: what costs the sender little and the receiver much. Handshakes that never
// end at every listener of CA, agent, sidecar and service, and a bundle that unpacks to
// a thousand times its size.

package attacks_test

import (
	"bytes"
	"cmp"
	"compress/flate"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/svid"
)

// listener is one that the attacker reaches, and what an honest client gets of it.
type listener struct {
	network, address string
	owner            string
	honest           func(ctx context.Context) error
}

// listeners are all that there are in the town.
func (c *town) listeners(t *testing.T) map[string]listener {
	t.Helper()
	shake := func(address string, cfg *tls.Config) func(context.Context) error {
		return func(ctx context.Context) error {
			conn, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", address)
			if err == nil {
				conn.Close()
			}
			return err
		}
	}
	service := func(name, address string) func(context.Context) error {
		return func(ctx context.Context) error {
			conn, err := c.web.DialTLS(sdk.Service(name), "http/1.1")(ctx, "tcp", address)
			if err == nil {
				conn.Close()
			}
			return err
		}
	}
	probe := func(address string) func(context.Context) error {
		return func(context.Context) error {
			if code, text := get(t, "http://"+address+"/live"); code != http.StatusOK {
				return fmt.Errorf("%d %s", code, text)
			}
			return nil
		}
	}
	workloads := func(ctx context.Context) error {
		_, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(c.WorkloadAPI))
		return err
	}
	anyone := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}
	https := strings.Replace(c.HTTPS, "https://localhost", "127.0.0.1", 1)
	return map[string]listener{
		"the CA's gRPC":          {"tcp", c.GRPC, "merlon-ca", shake(c.GRPC, anyone)},
		"the CA's HTTPS":         {"tcp", https, "merlon-ca", shake(https, anyone)},
		"the bundle endpoint":    {"tcp", c.endpoint, "merlon-ca", shake(c.endpoint, anyone)},
		"the CA's health":        {"tcp", c.Health, "merlon-ca", probe(c.Health)},
		"the Workload API":       {"unix", strings.TrimPrefix(c.WorkloadAPI, "unix://"), "merlon-agent", workloads},
		"the agent's health":     {"tcp", c.AgentHealth, "merlon-agent", probe(c.AgentHealth)},
		"the sidecar's inbound":  {"tcp", c.shop, "merlon-sidecar", service("shop", c.shop)},
		"the sidecar's health":   {"tcp", c.sidecarHealth, "merlon-sidecar", probe(c.sidecarHealth)},
		"a service with the SDK": {"tcp", c.orders, "service", service("orders", c.orders)},
	}
}

// beginnings are what a client says before it says no more.
var beginnings = map[string]string{
	"nothing":                "",
	"half a TLS record":      "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
	"half a head of HTTP":    "GET / HTTP/1.1\r\nHost: a\r\nX-",
	"half HTTP/2's preface":  "PRI * HTTP/2.0\r\n",
	"a record of no TLS":     "\x16\x03\x01\x00\x02\x00",
	"HTTP/2 without an end ": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00",
}

func TestSlowHandshakesStarveNobody(t *testing.T) {
	c := startTown(t)
	const each = 20 // of every beginning, at every listener
	listeners := c.listeners(t)
	c.keyUpdates(t, listeners)
	before := c.files(t)
	var ended sync.WaitGroup
	slow := map[string]net.Conn{}
	for name, l := range listeners {
		for how, text := range beginnings {
			for i := range each {
				conn, err := net.Dial(l.network, l.address)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				defer conn.Close()
				if _, err := io.WriteString(conn, text); err != nil {
					t.Fatalf("%s, %s: %v", name, how, err)
				}
				slow[fmt.Sprintf("%s, %s, %d", name, how, i)] = conn
			}
		}
	}
	for name, l := range listeners {
		// Were the honest to wait for the silent ones, one after the other or for a place,
		// the others' limit would be their time, many times over. Twice that is what a
		// busy machine may take for itself.
		ctx, cancel := context.WithTimeout(t.Context(), 2*svid.HandshakeTimeout)
		err := l.honest(ctx)
		if err = cmp.Or(err, ctx.Err()); err != nil {
			t.Errorf("%s, with %d connections that say nothing: %v", name, each*len(beginnings), err)
		}
		cancel()
	}
	for what, conn := range slow {
		ended.Go(func() {
			// The limit of a handshake, and of a head of HTTP, which ran out for most while
			// the honest were served. Three times that, for a busy machine.
			conn.SetReadDeadline(time.Now().Add(3 * svid.HandshakeTimeout))
			if _, err := io.Copy(io.Discard, conn); os.IsTimeout(err) {
				t.Errorf("%s: the connection is still open after three times the limit of a handshake", what)
			}
		})
	}
	ended.Wait()
	stage.Eventually(t, "their files are given back", func() error {
		for name, now := range c.files(t) {
			if now > before[name]+each {
				return fmt.Errorf("%s has %d files open, and had %d", name, now, before[name])
			}
		}
		return nil
	})
}

// files is how many each process has open.
func (c *town) files(t *testing.T) map[string]int {
	t.Helper()
	n := map[string]int{}
	for name, p := range c.processes() {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID()))
		if err != nil {
			t.Fatal(err)
		}
		n[name] = len(entries)
	}
	return n
}

// bomb is a gzip file of size bytes that unpacks to a thousand times as many zeros.
func bomb(t *testing.T, size int) []byte {
	t.Helper()
	var part bytes.Buffer
	w, err := flate.NewWriter(&part, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	all := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff}
	for range 2 { // the second refers to zeros before it, and so may come again and again
		part.Reset()
		if _, err := w.Write(make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		all = append(all, part.Bytes()...)
	}
	return append(all, bytes.Repeat(part.Bytes(), size/part.Len()-2)...)
}

func TestBundleThatIsABombIsRefused(t *testing.T) {
	d := stage.Separate(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/publisher"), "--parent", d.AgentID(), "--selector", "unix:path:"+self, "--role", "policy-publisher")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	held, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(d.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	var chain [][]byte
	for _, cert := range held.Certificates {
		chain = append(chain, cert.Raw)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true, Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: held.PrivateKey}},
	}}}
	put := func(body []byte) (int, string) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, d.HTTPS+"/v1/policy/bundles/main", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res, err := client.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			return 0, err.Error()
		}
		return res.StatusCode, string(text)
	}
	before := memory(t, d.CA, "VmRSS:")
	var all sync.WaitGroup
	small := bomb(t, 4<<20-4096) // 4 GiB
	for range 8 {
		all.Go(func() {
			code, text := put(small)
			if code != http.StatusUnprocessableEntity || !strings.Contains(text, "when decompressed") {
				t.Errorf("a bomb of %d bytes: %d %.300s", len(small), code, text)
			}
		})
	}
	all.Wait()
	if code, text := put(bomb(t, 10<<20)); code != http.StatusRequestEntityTooLarge && code != 0 {
		t.Errorf("a bomb of 10 MiB: %d %.300s", code, text)
	}
	// The peak: what was taken and given back before the answer counts.
	if grown := memory(t, d.CA, "VmHWM:") - before; grown > 150<<10 {
		t.Errorf("eight bombs took the CA %d KiB of memory", grown)
	} else {
		t.Logf("eight bombs took the CA %d KiB of memory", grown)
	}
	if _, stderr, err := d.Try("policy", "status"); err != nil {
		t.Errorf("the CA afterwards: %v %s", err, stderr)
	}
}

// memory is how much the process has (VmRSS:) or ever had (VmHWM:) in KiB.
func memory(t *testing.T, p *stage.Process, field string) (kib int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		t.Error(err)
		return 0
	}
	_, rest, _ := strings.Cut(string(text), field)
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Error(err)
	}
	return kib
}
