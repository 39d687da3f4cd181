// Real handshakes over loopback: who gets in, who does not, and who used to get
// in through a resumed session.

package svid_test

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// handshake connects the two configurations and exchanges a byte, because in TLS
// 1.3 a client learns with the first read that it was refused.
func handshake(t *testing.T, server, client *tls.Config) (cs tls.ConnectionState, serverErr, clientErr error) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	done := make(chan error, 1)
	go func() {
		done <- func() error {
			raw, err := lis.Accept()
			if err != nil {
				return err
			}
			defer raw.Close()
			conn := tls.Server(raw, server)
			_ = conn.SetDeadline(time.Now().Add(svid.HandshakeTimeout))
			if err := conn.Handshake(); err != nil {
				return err
			}
			if _, err := conn.Write([]byte("x")); err != nil {
				return err
			}
			_, err = io.ReadFull(conn, make([]byte, 1)) // until the client has read
			return err
		}()
	}()
	cs, clientErr = dial(lis.Addr().String(), client)
	return cs, <-done, clientErr
}

func dial(addr string, client *tls.Config) (tls.ConnectionState, error) {
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer raw.Close()
	conn := tls.Client(raw, client)
	_ = conn.SetDeadline(time.Now().Add(svid.HandshakeTimeout))
	if err := conn.Handshake(); err != nil {
		return conn.ConnectionState(), err
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		return conn.ConnectionState(), err
	}
	_, err = conn.Write([]byte("x"))
	return conn.ConnectionState(), err
}

func anyone(*svid.Peer) error { return nil }

func endpoint(ca *forge.Authority, path string, admit func(*svid.Peer) error) svid.TLS {
	return svid.TLS{SVIDs: ca.Leaf(path).X509SVID(), Bundles: ca.Bundle(), Admit: admit}
}

func TestPeersMeet(t *testing.T) {
	ca := forge.New(t, "example.org")
	sub := ca.Intermediate()
	server, client := endpoint(sub, "/server", anyone), endpoint(sub, "/client", anyone)
	var seen [2]*svid.Peer
	var conn net.Conn
	server.OnPeer = func(c net.Conn, p *svid.Peer) { conn, seen[0] = c, p }
	client.OnPeer = func(_ net.Conn, p *svid.Peer) { seen[1] = p }
	cs, serverErr, clientErr := handshake(t, server.Server(), client.Client())
	if serverErr != nil || clientErr != nil {
		t.Fatal(serverErr, clientErr)
	}
	if cs.Version != tls.VersionTLS13 || cs.CurveID != tls.X25519MLKEM768 || cs.NegotiatedProtocol != "h2" || cs.DidResume {
		t.Errorf("version %x, group %s, protocol %q, resumed %t", cs.Version, cs.CurveID, cs.NegotiatedProtocol, cs.DidResume)
	}
	if seen[0].ID.Path() != "/client" || seen[1].ID.Path() != "/server" || conn == nil {
		t.Errorf("server saw %+v on %v; client saw %+v", seen[0], conn, seen[1])
	}
	again, ok := svid.PeerFromState(cs)
	if !ok || again.ID != seen[1].ID || again.SerialHex != seen[1].SerialHex || !slices.Equal(again.AuthorityIDs, seen[1].AuthorityIDs) {
		t.Errorf("PeerFromState = %+v, %t; VerifyConnection saw %+v", again, ok, seen[1])
	}
}

func TestHandshakesAreRefused(t *testing.T) {
	ca, other := forge.New(t, "example.org"), forge.New(t, "example.org")
	good := func(path string) svid.TLS { return endpoint(ca, path, anyone) }
	deny := func(*svid.Peer) error { return errors.New("denied") }
	forged := func(s *forge.SVID) svid.TLS {
		return svid.TLS{SVIDs: s.X509SVID(), Bundles: ca.Bundle(), Admit: anyone}
	}
	noAdmit, noBundles := good("/x"), good("/x")
	noAdmit.Admit, noBundles.Bundles = nil, nil
	old := good("/x")
	old.Now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	tests := map[string]struct {
		one, two svid.TLS // both as server and client
		want     string   // what one says
	}{
		"nobody says who may":   {noAdmit, good("/a"), "nothing says who may connect"},
		"no trust bundles":      {noBundles, good("/a"), "no source of trust bundles"},
		"denied":                {endpoint(ca, "/x", deny), good("/a"), "denied"},
		"another ID":            {endpoint(ca, "/x", svid.AdmitID(spiffeid.RequireFromString("spiffe://example.org/b"))), good("/a"), "is expected"},
		"zero ID":               {endpoint(ca, "/x", svid.AdmitID(spiffeid.ID{})), good("/a"), "is expected"},
		"another root":          {good("/x"), svid.TLS{SVIDs: other.Leaf("/a").X509SVID(), Bundles: ca.Bundle(), Admit: anyone}, "X13"},
		"X4 root path":          {good("/x"), forged(ca.Leaf("")), "X4"},
		"X7 signing cert":       {good("/x"), forged(ca.SelfAsSVID()), "X4"},
		"X10 no keyUsage":       {good("/x"), forged(ca.Leaf("/a", noKeyUsage)), "X10"},
		"X14 no basicConstr.":   {good("/x"), forged(ca.Leaf("/a", noBasicConstraints)), "X14"},
		"expired by own clock":  {old, good("/a"), "X13"},
		"certificate of others": {good("/x"), forged(&forge.SVID{Chain: ca.Leaf("/b").Chain, Key: ca.Leaf("/a").Key}), ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, serverErr, clientErr := handshake(t, tt.one.Server(), tt.two.Client())
			if serverErr == nil || clientErr == nil || !strings.Contains(serverErr.Error(), tt.want) {
				t.Errorf("as server: %v; the client sees %v; want %q", serverErr, clientErr, tt.want)
			}
			_, serverErr, clientErr = handshake(t, tt.two.Server(), tt.one.Client())
			if serverErr == nil || clientErr == nil || !strings.Contains(clientErr.Error(), tt.want) {
				t.Errorf("as client: %v; the server sees %v; want %q", clientErr, serverErr, tt.want)
			}
		})
	}
}

func TestAnonymousPeers(t *testing.T) {
	ca := forge.New(t, "example.org")
	server := endpoint(ca, "/ca", anyone)
	anonymous := endpoint(ca, "/", anyone).Client()
	anonymous.GetClientCertificate = nil
	silent := anonymous.Clone()
	silent.NextProtos = nil
	if _, serverErr, clientErr := handshake(t, server.Server(), anonymous); serverErr == nil || clientErr == nil {
		t.Error("a client without certificate was let in")
	}
	server.AnonymousPeers = true
	for _, withHook := range []bool{false, true} {
		if withHook {
			server.OnPeer = func(net.Conn, *svid.Peer) {}
		}
		if _, serverErr, clientErr := handshake(t, server.Server(), anonymous); serverErr != nil || clientErr != nil {
			t.Errorf("AnonymousPeers: %v, %v", serverErr, clientErr)
		}
		if _, serverErr, _ := handshake(t, server.Server(), silent); serverErr == nil {
			t.Error("AnonymousPeers let in a client that names no protocol")
		}
		bad := svid.TLS{SVIDs: forge.New(t, "example.org").Leaf("/a").X509SVID(), Bundles: ca.Bundle(), Admit: anyone}
		if _, serverErr, _ := handshake(t, server.Server(), bad.Client()); serverErr == nil {
			t.Error("AnonymousPeers let in a client with a bad certificate")
		}
	}
	// On the dialing side there are no anonymous peers.
	client := endpoint(ca, "/a", anyone)
	client.AnonymousPeers = true
	if err := client.Client().VerifyConnection(tls.ConnectionState{HandshakeComplete: true}); err == nil {
		t.Error("a client let in a server without a certificate")
	}
}

// First contact: the client has no trust bundle and knows the hash of the root's
// key.
func TestIncludeRootLetsTheRootBePinned(t *testing.T) {
	ca := forge.New(t, "example.org")
	server := endpoint(ca.Intermediate(), "/ca", anyone)
	server.IncludeRoot, server.AnonymousPeers = true, true
	pin := sha256.Sum256(ca.Cert.RawSubjectPublicKeyInfo)
	client := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{"h2"}}
	client.VerifyConnection = func(cs tls.ConnectionState) error {
		root := cs.PeerCertificates[len(cs.PeerCertificates)-1]
		if sha256.Sum256(root.RawSubjectPublicKeyInfo) != pin {
			return errors.New("not the pinned root")
		}
		bundle := x509bundle.FromX509Authorities(ca.TrustDomain, []*x509.Certificate{root})
		_, err := svid.VerifyChain(cs.PeerCertificates, bundle, time.Now())
		return err
	}
	if _, serverErr, clientErr := handshake(t, server.Server(), client); serverErr != nil || clientErr != nil {
		t.Error(serverErr, clientErr)
	}
	server.Bundles = x509bundle.New(ca.TrustDomain)
	if _, serverErr, _ := handshake(t, server.Server(), client); serverErr == nil || !strings.Contains(serverErr.Error(), "present the root") {
		t.Errorf("without a root to present: %v", serverErr)
	}
}

// T50: nothing below TLS 1.3, no group outside the list.
func TestT50DowngradesAreRefused(t *testing.T) {
	ca := forge.New(t, "example.org")
	weaken := map[string]func(*tls.Config){
		"TLS 1.2":      func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"P-521 only":   func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP521} },
		"another ALPN": func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }, // Go tolerates this one
		"no ALPN":      func(c *tls.Config) { c.NextProtos = nil },
	}
	for name, f := range weaken {
		server, client := endpoint(ca, "/s", anyone).Server(), endpoint(ca, "/c", anyone).Client()
		f(client)
		if _, serverErr, clientErr := handshake(t, server, client); serverErr == nil || clientErr == nil {
			t.Errorf("the server takes %s", name)
		}
		server, client = endpoint(ca, "/s", anyone).Server(), endpoint(ca, "/c", anyone).Client()
		f(server)
		if _, serverErr, clientErr := handshake(t, server, client); serverErr == nil || clientErr == nil {
			t.Errorf("the client takes %s", name)
		}
	}
	silent := endpoint(ca, "/c", anyone).Client()
	silent.NextProtos, silent.VerifyConnection = nil, nil
	database, web := endpoint(ca, "/s", anyone), endpoint(ca, "/s", anyone)
	database.OptionalALPN, web.NextProtos = true, []string{"h2", "http/1.1"}
	for _, server := range []svid.TLS{database, web} {
		if _, serverErr, clientErr := handshake(t, server.Server(), silent); serverErr != nil || clientErr != nil {
			t.Errorf("a peer that names no protocol: %v, %v", serverErr, clientErr)
		}
	}
	classic := endpoint(ca, "/c", anyone).Client()
	classic.CurvePreferences = []tls.CurveID{tls.X25519}
	if cs, serverErr, clientErr := handshake(t, endpoint(ca, "/s", anyone).Server(), classic); serverErr != nil || clientErr != nil {
		t.Errorf("a peer without ML-KEM is refused: %v, %v (%s)", serverErr, clientErr, cs.CurveID)
	}
}

// sessions counts what a client could resume.
type sessions struct {
	tls.ClientSessionCache
	stored atomic.Int32
}

func (s *sessions) Put(key string, cs *tls.ClientSessionState) {
	if cs != nil {
		s.stored.Add(1)
	}
	s.ClientSessionCache.Put(key, cs)
}

func newSessions() *sessions { return &sessions{ClientSessionCache: tls.NewLRUClientSessionCache(8)} }

// gate is an authorization that changes: allow, then deny, or lose the root.
type gate struct {
	denied atomic.Bool
	bundle *x509bundle.Bundle
}

func (g *gate) admit(*svid.Peer) error {
	if g.denied.Load() {
		return errors.New("denied")
	}
	return nil
}

func (g *gate) authorize(spiffeid.ID, [][]*x509.Certificate) error { return g.admit(nil) }

func (g *gate) close(how string) {
	if how == "new deny" {
		g.denied.Store(true)
		return
	}
	for _, root := range g.bundle.X509Authorities() {
		g.bundle.RemoveX509Authority(root)
	}
}

// T20, the server's side: a client that was let in once and keeps its session
// comes back after a deny or a removed root. The stock configuration of go-spiffe
// lets it in; ours does not.
func TestT20ResumingClientIsRefused(t *testing.T) {
	for _, how := range []string{"new deny", "root removed"} {
		for _, ours := range []bool{false, true} {
			ca := forge.New(t, "example.org")
			g := &gate{bundle: ca.Bundle().X509Bundle()}
			server := tlsconfig.MTLSServerConfig(ca.Leaf("/s").X509SVID(), g.bundle, g.authorize)
			server.NextProtos = []string{"h2"}
			if ours {
				server = svid.TLS{SVIDs: ca.Leaf("/s").X509SVID(), Bundles: g.bundle, Admit: g.admit}.Server()
			}
			cache := newSessions()
			client := endpoint(ca, "/c", anyone).Client()
			client.ClientSessionCache, client.SessionTicketsDisabled, client.ServerName = cache, false, "s"
			if _, serverErr, clientErr := handshake(t, server, client); serverErr != nil || clientErr != nil {
				t.Fatalf("%s, ours=%t: first connection: %v, %v", how, ours, serverErr, clientErr)
			}
			g.close(how)
			cs, serverErr, clientErr := handshake(t, server, client)
			switch {
			case ours && (serverErr == nil || clientErr == nil || cs.DidResume):
				t.Errorf("%s: let in again (resumed: %t)", how, cs.DidResume)
			case ours && cache.stored.Load() != 0:
				t.Errorf("%s: the server gives session tickets", how)
			case !ours && (serverErr != nil || clientErr != nil || !cs.DidResume):
				t.Errorf("%s: go-spiffe's stock server now refuses (%v, %v): is this test still needed?", how, serverErr, clientErr)
			}
		}
	}
}

// T20, the client's side: a server whose authorization ended. Even a caller who
// adds a session cache to our configuration is protected by VerifyConnection.
func TestT20ResumedServerIsRefused(t *testing.T) {
	for _, how := range []string{"new deny", "root removed"} {
		for _, ours := range []bool{false, true} {
			ca := forge.New(t, "example.org")
			g := &gate{bundle: ca.Bundle().X509Bundle()}
			own := ca.Leaf("/c").X509SVID()
			client := tlsconfig.MTLSClientConfig(own, g.bundle, g.authorize)
			if ours {
				client = svid.TLS{SVIDs: own, Bundles: g.bundle, Admit: g.admit}.Client()
				client.SessionTicketsDisabled = false
			}
			client.NextProtos = []string{"h2"}
			client.ClientSessionCache, client.ServerName = newSessions(), "s"
			server := tlsconfig.MTLSServerConfig(ca.Leaf("/s").X509SVID(), ca.Bundle(), tlsconfig.AuthorizeAny())
			server.NextProtos = []string{"h2"}
			if _, serverErr, clientErr := handshake(t, server, client); serverErr != nil || clientErr != nil {
				t.Fatalf("%s, ours=%t: first connection: %v, %v", how, ours, serverErr, clientErr)
			}
			g.close(how)
			cs, _, clientErr := handshake(t, server, client)
			switch {
			case ours && (clientErr == nil || !strings.Contains(clientErr.Error(), map[string]string{"new deny": "denied", "root removed": "X13"}[how])):
				t.Errorf("%s: the server is let in again: %v", how, clientErr)
			case !ours && (clientErr != nil || !cs.DidResume):
				t.Errorf("%s: go-spiffe's stock client now refuses (%v): is this test still needed?", how, clientErr)
			}
		}
	}
}

func TestConfigurationsHoldTheRules(t *testing.T) {
	ca := forge.New(t, "example.org")
	hooked := endpoint(ca, "/s", anyone)
	hooked.OnPeer = func(net.Conn, *svid.Peer) {}
	inner, err := hooked.Server().GetConfigForClient(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]*tls.Config{
		"server": endpoint(ca, "/s", anyone).Server(), "client": endpoint(ca, "/c", anyone).Client(),
		"hooked server": hooked.Server(), "per connection": inner,
	} {
		switch {
		case cfg.MinVersion != tls.VersionTLS13:
			t.Errorf("%s: TLS below 1.3", name)
		case !cfg.SessionTicketsDisabled || cfg.ClientSessionCache != nil:
			t.Errorf("%s: sessions can be resumed", name)
		case cfg.VerifyConnection == nil || cfg.VerifyPeerCertificate != nil:
			t.Errorf("%s: verification is in the wrong place", name)
		case !slices.Equal(cfg.NextProtos, []string{"h2"}) || cfg.CurvePreferences[0] != tls.X25519MLKEM768:
			t.Errorf("%s: protocols %v, groups %v", name, cfg.NextProtos, cfg.CurvePreferences)
		}
	}
}

// rotating gives another SVID each time it is asked.
type rotating struct{ next chan *x509svid.SVID }

func (r rotating) GetX509SVID() (*x509svid.SVID, error) {
	select {
	case s := <-r.next:
		return s, nil
	default:
		return nil, errors.New("no identity")
	}
}

func TestEachHandshakeReadsTheSVIDAnew(t *testing.T) {
	ca := forge.New(t, "example.org")
	source := rotating{make(chan *x509svid.SVID, 2)}
	source.next <- ca.Leaf("/one").X509SVID()
	source.next <- ca.Leaf("/two").X509SVID()
	server := svid.TLS{SVIDs: source, Bundles: ca.Bundle(), Admit: anyone}.Server()
	client := endpoint(ca, "/c", anyone).Client()
	for _, want := range []string{"/one", "/two"} {
		cs, _, err := handshake(t, server, client)
		if err != nil {
			t.Fatal(err)
		}
		if peer, _ := svid.PeerFromState(cs); peer.ID.Path() != want {
			t.Errorf("peer = %s; want %s", peer.ID, want)
		}
	}
	if _, serverErr, _ := handshake(t, server, client); serverErr == nil || !strings.Contains(serverErr.Error(), "no identity") {
		t.Errorf("without an SVID: %v", serverErr)
	}
	if _, serverErr, _ := handshake(t, svid.TLS{}.Server(), client); serverErr == nil {
		t.Error("the zero value serves")
	}
}

func TestPeerFromStateTellsAnonymousPeers(t *testing.T) {
	leaf := forge.New(t, "example.org").Leaf("/a").Chain
	for name, cs := range map[string]tls.ConnectionState{
		"anonymous":             {HandshakeComplete: true},
		"handshake in progress": {PeerCertificates: leaf},
		"no SPIFFE ID":          {HandshakeComplete: true, PeerCertificates: forge.New(t, "example.org").Leaf("").Chain},
	} {
		if p, ok := svid.PeerFromState(cs); ok {
			t.Errorf("%s: PeerFromState = %+v", name, p)
		}
	}
}
