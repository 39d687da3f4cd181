// L4: one decision for a connection, which then carries anything, for as long as
// policy and identity of the caller hold.

package sidecar

import (
	"bytes"
	"crypto/rand"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk"
)

// echoApp is an app that sends everything back, and counts who comes.
func echoApp(t testing.TB) (address string, came *atomic.Int64) {
	lis := listen(t)
	came = new(atomic.Int64)
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			came.Add(1)
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()
	return lis.Addr().String(), came
}

// say sends a byte and waits for it to come back.
func say(conn net.Conn) error {
	buf := []byte("x")
	if _, err := conn.Write(buf); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, buf)
	return err
}

// sayAt is say over a connection of its own, which may be refused as it is made.
func sayAt(address string) error {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err
	}
	return say(conn)
}

func TestTCPGoesBothWaysAndEndsByHalves(t *testing.T) {
	app, _ := echoApp(t)
	p := startPair(t, "tcp", app)
	sent := make([]byte, 3<<20)
	rand.Read(sent)
	conn := dial(t, p.outbound.addrs[0])
	go func() {
		conn.Write(sent)
		conn.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d bytes came back, err %v; want the %d that were sent", len(got), err, len(sent))
	}
	line := p.inbound.logged(1)[0]
	if line["source"] != p.td.ID("web").String() || line["reason"] != string(policy.Allowed) || line["bytes_in"] != float64(len(sent)) || line["bytes_out"] != float64(len(sent)) {
		t.Errorf("access log: %v", line)
	}
	if line := p.outbound.logged(1)[0]; line["upstream"] != p.inbound.addrs[0] || line["err"] != nil {
		t.Errorf("access log of the caller's side: %v", line)
	}
}

func TestTCPThatIsDeniedReachesNobody(t *testing.T) {
	app, came := echoApp(t)
	p := startPair(t, "tcp", app)
	p.td.Deny("web", "orders")
	if err := say(dial(t, p.outbound.addrs[0])); err == nil {
		t.Error("a denied connection was served")
	}
	line := p.inbound.logged(1)[0]
	if line["reason"] != string(policy.DenyRule) || line["decision_id"] == nil || line["upstream"] != nil {
		t.Errorf("access log: %v", line)
	}
	if n := came.Load(); n != 0 {
		t.Errorf("the app saw %d connections", n)
	}
}

func TestTCPIsCutWhenItsGroundGoes(t *testing.T) {
	for name, remove := range map[string]func(p *pair){
		"policy":     func(p *pair) { p.td.Deny("web", "orders") },
		"revocation": func(p *pair) { p.td.Revoke("web") },
		"identity":   func(p *pair) { p.td.Withdraw("orders") },
		"root":       func(p *pair) { p.td.RemoveRoot() },
	} {
		t.Run(name, func(t *testing.T) {
			app, _ := echoApp(t)
			p := startPair(t, "tcp", app)
			conn := dial(t, p.outbound.addrs[0])
			if err := say(conn); err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			remove(p)
			if n, err := conn.Read(make([]byte, 1)); err == nil {
				t.Fatalf("%d bytes came on a connection that had to end", n)
			}
			if time.Since(begun) > 29*time.Second {
				t.Error("the connection was not cut, it ran into the test's deadline")
			}
			p.inbound.logged(1)
		})
	}
}

func TestOutboundReachesTheExpectedPeerOnly(t *testing.T) {
	app, came := echoApp(t)
	p := startPair(t, "tcp", app)
	p.td.Allow("web", "other")
	p.td.Allow("web", "orders")
	out := start(t, p.td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "other", Upstreams: []string{p.inbound.addrs[0]}, Protocol: "tcp"}}})
	if err := sayAt(out.addrs[0]); err == nil {
		t.Error("a peer that is not the expected one was taken")
	}
	if n := came.Load(); n != 0 {
		t.Errorf("the app saw %d connections", n)
	}
}

func TestSDKSpeaksToASidecar(t *testing.T) {
	app, _ := echoApp(t)
	p := startPair(t, "tcp", app)
	conn, err := p.td.Workload("web").DialTLS(sdk.Service("orders"))(t.Context(), "tcp", p.inbound.addrs[0])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := say(conn); err != nil {
		t.Error(err)
	}
}

func TestStrangersAreRefused(t *testing.T) {
	app, came := echoApp(t)
	p := startPair(t, "tcp", app)
	conn := dial(t, p.inbound.addrs[0])
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: orders\r\n\r\n")
	if answer, err := io.ReadAll(conn); err == nil && bytes.Contains(answer, []byte("HTTP")) {
		t.Errorf("plaintext was served on the port for callers: %q", answer)
	}
	if n := came.Load(); n != 0 {
		t.Errorf("the app saw %d connections", n)
	}
}

func TestAnUpstreamThatIsAwayIsPassedOver(t *testing.T) {
	app, _ := echoApp(t)
	p := startPair(t, "tcp", app)
	away := listen(t)
	nobody := away.Addr().String()
	away.Close()
	out := start(t, p.td, "web", Config{Outbound: []Outbound{{Listen: "127.0.0.1:0", To: "orders", Upstreams: []string{nobody, p.inbound.addrs[0]}, Protocol: "tcp"}}})
	for range 10 {
		conn := dial(t, out.addrs[0])
		if err := say(conn); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
}
