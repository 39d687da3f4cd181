// Live connections end when their ground goes: revocation, loss of trust,
// withdrawal, expiry, at either end.

package sdk_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// say sends a line through an echo server and waits for it.
func say(conn net.Conn, s string) error {
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, s); err != nil {
		return err
	}
	back := make([]byte, len(s))
	if _, err := io.ReadFull(conn, back); err != nil {
		return err
	}
	return nil
}

// cutWithin waits for the end of a silent connection.
func cutWithin(t *testing.T, conn net.Conn, limit time.Duration) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return // closed already
	}
	n, err := conn.Read(make([]byte, 1))
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the connection is alive after %v: Read = %d, %v", limit, n, err)
	}
}

// stranger is a TLS client without the SDK, with a session cache.
func stranger(own *x509svid.SVID) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true,
		ClientSessionCache: tls.NewLRUClientSessionCache(8),
		Certificates:       []tls.Certificate{{Certificate: [][]byte{own.Certificates[0].Raw}, PrivateKey: own.PrivateKey}},
	}
}

// call makes one connection and sends one line over it.
func call(address string, cfg *tls.Config) error {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", address, cfg)
	if err != nil {
		return err
	}
	defer conn.Close()
	if conn.ConnectionState().DidResume {
		return errors.New("the session was resumed")
	}
	return say(conn, "hello")
}

func TestLiveConnectionsAreCut(t *testing.T) {
	for name, tc := range map[string]struct {
		event func(*sdktest.TD)
	}{
		"server sees the client revoked":  {func(td *sdktest.TD) { td.Revoke("web") }},
		"client sees the server revoked":  {func(td *sdktest.TD) { td.Revoke("orders") }},
		"root removed":                    {func(td *sdktest.TD) { td.RemoveRoot() }},
		"server's own identity withdrawn": {func(td *sdktest.TD) { td.Withdraw("orders") }},
		"client's own identity withdrawn": {func(td *sdktest.TD) { td.Withdraw("web") }},
	} {
		t.Run(name, func(t *testing.T) {
			td := sdktest.New(t)
			td.Allow("web", "orders")
			td.Allow("bystander", "orders")
			address := listen(t, td.Workload("orders"))
			dial := func(name string) net.Conn {
				conn, err := td.Workload(name).DialTLS(sdk.Service("orders"))(t.Context(), "tcp", address)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { conn.Close() })
				if err := say(conn, "hello"); err != nil {
					t.Fatal(err)
				}
				return conn
			}
			web, bystander := dial("web"), dial("bystander")
			start := time.Now()
			tc.event(td)
			cutWithin(t, web, 20*time.Second)
			t.Logf("cut after %v", time.Since(start))
			if name == "server sees the client revoked" || name == "client's own identity withdrawn" {
				if err := say(bystander, "still here"); err != nil {
					t.Errorf("a connection that is not concerned: %v", err)
				}
			}
		})
	}
}

func TestServerCutsAPeerThatKnowsNothingOfMerlon(t *testing.T) {
	for name, event := range map[string]func(*sdktest.TD){
		"revoked":      func(td *sdktest.TD) { td.Revoke("web") },
		"root removed": func(td *sdktest.TD) { td.RemoveRoot() },
	} {
		t.Run(name, func(t *testing.T) {
			td := sdktest.New(t)
			td.Allow("web", "orders")
			conn, err := tls.Dial("tcp", listen(t, td.Workload("orders")), stranger(td.SVID("web")))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := say(conn, "hello"); err != nil {
				t.Fatal(err)
			}
			event(td)
			cutWithin(t, conn, 20*time.Second)
		})
	}
}

func TestConnectionsEndWithTheFirstCertificateToExpire(t *testing.T) {
	t.Parallel()
	for name, short := range map[string]string{"the client's": "web", "the server's": "orders"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			td := sdktest.New(t)
			td.Allow("web", "orders")
			td.SetTTL(3 * time.Second)
			soon := td.Workload(short) // issued with the short life
			td.SetTTL(time.Hour)
			server := td.Workload("orders")
			client := td.SVID("web")
			if short == "web" {
				client = must(soon.GetX509SVID())
			}
			expires := must(soon.GetX509SVID()).Certificates[0].NotAfter
			// The client enforces nothing; the end comes from the server.
			conn, err := tls.Dial("tcp", listen(t, server), stranger(client))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := say(conn, "hello"); err != nil {
				t.Fatal(err)
			}
			cutWithin(t, conn, 20*time.Second)
			if now := time.Now(); now.Before(expires) {
				t.Errorf("cut %v before the certificate expired", expires.Sub(now))
			}
		})
	}
}

func must(own *x509svid.SVID, err error) *x509svid.SVID {
	if err != nil {
		panic(err)
	}
	return own
}

func TestHandshakeRefusesStrangers(t *testing.T) {
	td, other := sdktest.New(t), sdktest.New(t)
	address := listen(t, td.Workload("orders"))
	td.Allow("web", "orders")
	good := stranger(td.SVID("web"))
	if err := call(address, good); err != nil {
		t.Fatal(err)
	}
	none := good.Clone()
	none.Certificates = nil
	old := good.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	stolen := stranger(other.SVID("web"))
	stolen.Certificates[0].Certificate = good.Certificates[0].Certificate // without its key
	for name, cfg := range map[string]*tls.Config{
		"no certificate":        none,
		"TLS 1.2":               old,
		"another root":          stranger(other.SVID("web")),
		"not allowed by policy": stranger(td.SVID("intruder")),
		"certificate alone":     stolen,
	} {
		if err := call(address, cfg); err == nil {
			t.Errorf("%s: let in", name)
		}
	}
}

func TestChangedConfigurationLetsNobodyIn(t *testing.T) {
	td := sdktest.New(t)
	cfg := td.Workload("orders").ServerTLS()
	cfg.GetConfigForClient = nil
	lis, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := call(echo(t, lis), stranger(td.SVID("web"))); err == nil {
		t.Error("let in by a configuration that cannot cut the connection")
	}
}

func TestNothingIsLetInWithoutDecisions(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	orders := td.Workload("orders")
	address := listen(t, orders)
	cfg := stranger(td.SVID("web"))
	td.StopAgent("orders")
	if err := call(address, cfg); err == nil {
		t.Error("let in while the agent was away")
	}
	d := orders.Authorize(t.Context(), &policy.Input{Source: "spiffe://sdktest.test/web", Protocol: policy.HTTP, Method: "GET", Path: "/"})
	if d.Allow || d.Reason != policy.AgentUnavailable || d.DecisionID.IsZero() {
		t.Errorf("Authorize = %+v; want AGENT_UNAVAILABLE with a decision ID", d)
	}
	td.StartAgent("orders")
	eventually(t, "let in again", func() bool { return call(address, cfg) == nil })
}

func TestAuthorizeNeverAllowsByAccident(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	orders := td.Workload("orders")
	web := td.ID("web").String()
	for name, tc := range map[string]struct {
		in   *policy.Input
		want policy.Reason
	}{
		"nil":               {nil, policy.BadRequest},
		"no source":         {&policy.Input{Protocol: policy.HTTP, Path: "/"}, policy.NoIdentity},
		"not UTF-8":         {&policy.Input{Source: web, Protocol: policy.HTTP, Path: "/", Headers: policy.HeaderMap{"x": {"\xff"}}}, policy.BadRequest},
		"other destination": {&policy.Input{Source: web, Destination: "spiffe://sdktest.test/refunds", Protocol: policy.HTTP, Path: "/"}, policy.Error},
		"no grant":          {&policy.Input{Source: "spiffe://sdktest.test/x", Protocol: policy.HTTP, Path: "/"}, policy.NoGrant},
	} {
		if d := orders.Authorize(t.Context(), tc.in); d.Allow || d.Reason != tc.want || d.DecisionID.IsZero() {
			t.Errorf("%s: %+v; want a denial for %s", name, d, tc.want)
		}
	}
	for name, d := range map[string]policy.Decision{
		"allow without reason":     {Allow: true},
		"allow for another reason": {Allow: true, Reason: policy.NoGrant},
		"deny that says ALLOWED":   {Reason: policy.Allowed},
		"nothing":                  {},
	} {
		td.Decide(func(*policy.Input) policy.Decision { return d })
		if got := orders.Authorize(t.Context(), &policy.Input{Source: web, Protocol: policy.TCP}); got.Allow || got.Reason == policy.Allowed || got.Reason == "" {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestPeerIsKnownOnlyOnLiveConnectionsOfTheIdentity(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	web, orders := td.Workload("web"), td.Workload("orders")
	conn, err := web.DialTLS(sdk.Service("orders"))(t.Context(), "tcp", listen(t, orders))
	if err != nil {
		t.Fatal(err)
	}
	cs := conn.(*tls.Conn).ConnectionState()
	if peer, ok := web.Peer(&cs); !ok || peer.ID != orders.ID() {
		t.Errorf("Peer = %v, %v; want orders", peer, ok)
	}
	forged := cs
	forged.PeerCertificates = append([]*x509.Certificate(nil), cs.PeerCertificates...)
	if _, ok := web.Peer(&forged); ok {
		t.Error("a state that only looks alike has a peer")
	}
	unproven := cs // the peer has not shown yet that it holds its key
	unproven.HandshakeComplete = false
	if _, ok := web.Peer(&unproven); ok {
		t.Error("a peer counts before the handshake is complete")
	}
	if _, ok := orders.Peer(&cs); ok {
		t.Error("another identity knows the connection")
	}
	if _, ok := web.Peer(nil); ok {
		t.Error("no connection has a peer")
	}
	conn.Close()
	if _, ok := web.Peer(&cs); ok {
		t.Error("a closed connection has a peer")
	}
}

// The state of each connection shows the certificates of its peer, and those of one
// peer are the same in memory.
func TestConnectionsShareTheirPeersCertificates(t *testing.T) {
	td := sdktest.New(t)
	orders, web := td.Workload("orders"), td.Workload("web")
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	var states []tls.ConnectionState
	for range 2 {
		go func() {
			if conn, err := web.DialTLS(sdk.Service("orders"))(t.Context(), "tcp", lis.Addr().String()); err == nil {
				defer conn.Close()
				_, _ = conn.Read(make([]byte, 1)) // until the server closes
			}
		}()
		raw, err := lis.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conn, err := orders.ServerHandshake(t.Context(), raw)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		cs := conn.ConnectionState()
		if peer, ok := orders.Peer(&cs); !ok || peer.ID != td.ID("web") {
			t.Errorf("peer %v, %v", peer, ok)
		}
		states = append(states, cs)
	}
	for i, cert := range states[0].PeerCertificates {
		if cert != states[1].PeerCertificates[i] {
			t.Errorf("certificate %d is there twice", i)
		}
	}
	if &states[0].PeerCertificates[0] == &states[1].PeerCertificates[0] {
		t.Error("two connections have one state")
	}
}
