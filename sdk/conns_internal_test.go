// The table forgets connections that their owners closed, and never needs a
// goroutine per connection.

package sdk

import (
	"crypto/x509"
	"log/slog"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
)

// tcpPair gives both ends of a connection.
func tcpPair(t *testing.T, lis net.Listener) (client, server net.Conn) {
	t.Helper()
	client, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func TestClosedConnectionsLeaveTheTable(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	table := newConnTable(slog.New(slog.DiscardHandler))
	peer := &svid.Peer{ID: spiffeid.RequireFromString("spiffe://sdktest.test/web")}
	now := time.Now()
	goroutines := runtime.NumGoroutine()
	const n = 100
	var tracked []*trackedConn
	var plain []net.Conn
	for range n {
		_, server := tcpPair(t, lis)
		table.add(new(*x509.Certificate), &liveConn{raw: server, peer: peer, end: now.Add(time.Hour)}, now)
		plain = append(plain, server)

		_, server = tcpPair(t, lis)
		c, key := table.track(server), new(*x509.Certificate)
		c.key.Store(key)
		table.add(key, &liveConn{raw: c, peer: peer, end: now.Add(time.Hour)}, now)
		tracked = append(tracked, c)
	}
	if got := runtime.NumGoroutine(); got > goroutines {
		t.Errorf("%d goroutines more for %d connections", got-goroutines, 2*n)
	}
	table.sweep(now)
	if got := table.size.Load(); got != 2*n {
		t.Fatalf("%d entries; want %d", got, 2*n)
	}
	for _, c := range tracked {
		c.Close()
	}
	if got := table.size.Load(); got != n {
		t.Errorf("%d entries after the tracked ones were closed; want %d", got, n)
	}
	for _, c := range plain[:n/2] {
		c.Close()
	}
	if wait := table.sweep(now); wait != sweepInterval {
		t.Errorf("the next sweep is in %v; want %v", wait, sweepInterval)
	}
	if got := table.size.Load(); got != n/2 {
		t.Errorf("%d entries after the sweep; want %d", got, n/2)
	}
	table.sweep(now.Add(time.Hour))
	if got := table.size.Load(); got != 0 {
		t.Errorf("%d entries after all have expired; want none", got)
	}
}

func TestSweepIsPlannedForTheFirstToExpire(t *testing.T) {
	table := newConnTable(slog.New(slog.DiscardHandler))
	peer := &svid.Peer{ID: spiffeid.RequireFromString("spiffe://sdktest.test/web")}
	now := time.Now()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	table.next.Store(now.Add(sweepInterval).UnixNano())
	table.add(new(*x509.Certificate), &liveConn{raw: a, peer: peer, end: now.Add(time.Minute)}, now)
	if len(table.poke) != 0 {
		t.Error("a connection that ends after the planned sweep asks for an earlier one")
	}
	table.add(new(*x509.Certificate), &liveConn{raw: a, peer: peer, end: now.Add(time.Second)}, now)
	if len(table.poke) != 1 {
		t.Error("a connection that ends before the planned sweep does not ask for an earlier one")
	}
	if wait := table.sweep(now); wait != time.Second {
		t.Errorf("the next sweep is in %v; want 1 s", wait)
	}
}

func TestHandshakeThatDawdlesIsEnded(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	client, server := tcpPair(t, lis)
	newConnTable(slog.New(slog.DiscardHandler)).track(server)
	if err := client.SetReadDeadline(time.Now().Add(4 * svid.HandshakeTimeout)); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	_, err = client.Read(make([]byte, 1))
	if took := time.Since(start); err == nil || took < svid.HandshakeTimeout-time.Second || took > 3*svid.HandshakeTimeout {
		t.Errorf("Read = %v after %v; want the end after %v", err, took, svid.HandshakeTimeout)
	}
}
