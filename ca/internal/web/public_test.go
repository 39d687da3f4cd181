// The public endpoint: its documents, and how many connections anybody has.

package web

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"merlon.dev/ca/internal/trust"
)

// Without a JWT key there is no algorithm, which is a list all the same.
func TestDiscoveryWithoutAJWTKey(t *testing.T) {
	p := &Public{Issuer: "https://trust.test"}
	for name, document := range map[string]func(*trust.Bundle) ([]byte, error){"configuration": p.discovery, "keys": keys} {
		text, err := document(&trust.Bundle{TrustDomain: td, Keys: spiffebundle.New(td)})
		if err != nil || strings.Contains(string(text), "null") {
			t.Errorf("%s: %s, %v", name, text, err)
		}
	}
}

// One address has its share of connections and no more, and another one is served
// beside it; who leaves makes room.
func TestConnectionsOfAnAddressAreBounded(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lis := limit(inner)
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.WriteString(conn, "x")
				_, _ = io.Copy(io.Discard, conn) // until the other side is gone
			}()
		}
	}()
	t.Cleanup(func() {
		lis.Close()
		<-served
	})
	from := func(host string) (net.Conn, bool) {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(host)}, Timeout: 30 * time.Second}
		conn, err := d.Dial("tcp", lis.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		n, _ := conn.Read(make([]byte, 1)) // nothing comes over one that was closed
		return conn, n == 1
	}
	var last net.Conn
	for i := range maxOfAddress {
		conn, ok := from("127.0.0.1")
		if !ok {
			t.Fatalf("connection %d was closed", i+1)
		}
		last = conn
	}
	if _, ok := from("127.0.0.1"); ok {
		t.Errorf("connection %d of one address was served", maxOfAddress+1)
	}
	if _, ok := from("127.0.0.2"); !ok {
		t.Error("another address was not served")
	}
	last.Close()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, ok := from("127.0.0.1"); ok {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("there is no room after one has left")
		}
	}
}

func TestConnectionsInAllAreBounded(t *testing.T) {
	l := limit(nil)
	address := func(i int) net.Addr { return &net.TCPAddr{IP: net.IPv4(10, 0, byte(i>>8), byte(i)), Port: 1} }
	for i := range maxConnections {
		if !l.enter(sourceOf(address(i))) {
			t.Fatalf("connection %d was refused", i+1)
		}
	}
	if l.enter(sourceOf(address(maxConnections))) {
		t.Error("one too many was let in")
	}
	for i := range maxConnections {
		l.leave(sourceOf(address(i)))
	}
	if l.all != 0 || len(l.open) != 0 {
		t.Errorf("when all have left: %d, %v", l.all, l.open)
	}
}

func TestWhoseAddressItIs(t *testing.T) {
	for name, tt := range map[string]struct {
		a, b string
		same bool
	}{
		"ports":            {"192.0.2.1", "192.0.2.1", true},
		"hosts":            {"192.0.2.1", "192.0.2.2", false},
		"mapped":           {"192.0.2.1", "::ffff:192.0.2.1", true},
		"one /64":          {"2001:db8::1", "2001:db8::ffff:1", true},
		"two /64":          {"2001:db8::1", "2001:db8:0:1::1", false},
		"IPv4 and IPv6":    {"192.0.2.1", "2001:db8::1", false},
		"loopback, mapped": {"127.0.0.1", "::ffff:127.0.0.2", false},
	} {
		a, b := &net.TCPAddr{IP: net.ParseIP(tt.a), Port: 1}, &net.TCPAddr{IP: net.ParseIP(tt.b), Port: 2}
		if got := sourceOf(a) == sourceOf(b); got != tt.same {
			t.Errorf("%s: %v and %v are one source: %t", name, sourceOf(a), sourceOf(b), got)
		}
	}
}
