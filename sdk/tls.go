// Mutual TLS on behalf of an identity: what a connection has to prove before
// it is entered into the table of live connections, and the configurations,
// dialers and listeners that make such connections.

package sdk

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/sdk/internal/telemetry"
	"merlon.dev/sdk/svid"
)

// httpProtocols is the ALPN list where the caller names none.
var httpProtocols = []string{"h2", "http/1.1"}

// ServerTLS is the configuration for the accepting side, for an http.Server or
// any other TLS listener. It lets in every workload whose X509-SVID verifies
// and is not revoked, of the own and of federated trust domains: what the peer
// may do is decided per call by httpauth or grpcauth, or per connection by
// [Identity.Listener]. protocols are the ALPN protocols, by default h2 and
// http/1.1.
//
// The connections are in the table of live connections and are cut when the
// peer is revoked or expires. The listener below has to hand out connections
// as the net package makes them; see [Identity.Listener] for others.
func (id *Identity) ServerTLS(protocols ...string) *tls.Config {
	cfg := id.tlsBase(id, protocols).Server()
	// Without GetConfigForClient, should somebody clear it, cfg still verifies;
	// only its connections could not be cut, so it lets nobody in.
	cfg.VerifyConnection = func(tls.ConnectionState) error {
		return errors.New("the TLS configuration was changed: GetConfigForClient is missing")
	}
	cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if hello.Conn == nil {
			return nil, errors.New("the connection below TLS is not known")
		}
		limitHandshake(hello)
		own := id.snapshot()
		inner := id.tlsBase(own, protocols).Server()
		inner.VerifyConnection = id.verify(hello.Context(), hello.Conn, own, nil)
		return inner, nil
	}
	return cfg
}

// limitHandshake ends a handshake that takes too long after its hello.
// Whatever comes before it is for the server's own deadlines or trackedConn.
func limitHandshake(hello *tls.ClientHelloInfo) {
	ctx, conn := hello.Context(), hello.Conn // ctx ends with the handshake
	if tracked, ok := conn.(*trackedConn); ok {
		tracked.handshake.Store(&ctx)
		return
	}
	time.AfterFunc(svid.HandshakeTimeout, func() {
		if ctx.Err() == nil {
			hangUp(conn)
		}
	})
}

// ClientTLS is the configuration for connecting to one target, for clients
// which take a *tls.Config, such as database drivers. Host names play no part.
// protocols are the ALPN protocols, by default h2 and http/1.1.
//
// A client's tls.Config never learns its connection, so connections made with
// it alone are not cut from this side; the other side cuts them if it is
// Merlon's. Prefer [Identity.DialTLS] where the client takes a dial function.
func (id *Identity) ClientTLS(to Target, protocols ...string) *tls.Config {
	return id.clientTLS(nil, nil, id, to, protocols)
}

func (id *Identity) clientTLS(raw net.Conn, own *snapshot, svids x509svid.Source, to Target, protocols []string) *tls.Config {
	cfg := id.tlsBase(svids, protocols).Client()
	cfg.VerifyConnection = id.verify(context.Background(), raw, own, func(p *svid.Peer) error {
		own, err := id.GetX509SVID()
		if err != nil {
			return err
		}
		want, err := to.resolve(own.ID.TrustDomain())
		if err != nil {
			return err
		}
		return svid.AdmitID(want)(p)
	})
	return cfg
}

// snapshot is what one handshake presents, whatever the agent sends meanwhile:
// the connection ends with that X509-SVID, and not with a later one.
type snapshot struct {
	id *Identity
	*current
}

func (id *Identity) snapshot() *snapshot { return &snapshot{id, id.current.Load()} }

// GetX509SVID implements x509svid.Source.
func (s *snapshot) GetX509SVID() (*x509svid.SVID, error) { return s.id.present(s.current) }

// tlsBase has no Admit, so a configuration whose VerifyConnection is not
// replaced refuses everyone.
func (id *Identity) tlsBase(svids x509svid.Source, protocols []string) svid.TLS {
	if len(protocols) == 0 {
		protocols = httpProtocols
	}
	return svid.TLS{SVIDs: svids, Bundles: id, NextProtos: protocols}
}

// verify makes the VerifyConnection of one connection, or of all connections
// of a client configuration, for which raw is nil. also is the client's: it judges a
// verified peer further.
func (id *Identity) verify(ctx context.Context, raw net.Conn, own *snapshot, also func(*svid.Peer) error) func(tls.ConnectionState) error {
	role := telemetry.Server
	if also != nil {
		role = telemetry.Client
	}
	return func(cs tls.ConnectionState) error {
		now := time.Now()
		peer, err := id.current.Load().trust.VerifyChain(cs.PeerCertificates, now)
		if err == nil {
			err = id.admit(peer)
		}
		if err == nil && also != nil {
			err = also(peer)
		}
		if err == nil && role == telemetry.Server {
			// In the state's own array, which is the connection's.
			id.certs.share(cs.PeerCertificates)
		}
		if err == nil && raw != nil {
			err = id.enter(&cs.PeerCertificates[0], raw, peer, own.current, now)
		}
		if err != nil {
			id.logRefused(ctx, raw, err)
		}
		return tellHandshake(ctx, role, err)
	}
}

// admit says why a verified peer may not connect, or stay connected.
func (id *Identity) admit(peer *svid.Peer) error {
	if id.closed.Load() {
		return errClosed
	}
	if !id.ready.isReady() {
		return errors.New("the agent has not said yet who is revoked")
	}
	if rev, ok := id.revocations.Load().Concerning(peer); ok {
		return &revokedError{peer: peer, rev: rev}
	}
	return nil
}

type revokedError struct {
	peer *svid.Peer
	rev  svid.Revocation
}

func (e *revokedError) Error() string {
	return fmt.Sprintf("the X509-SVID %s of %s is revoked: %q", e.peer.SerialHex, e.peer.ID, e.rev.Note)
}

// enter puts the connection into the table and then looks at revocations and
// trust again: a push between the first look and the entry would have missed
// the connection.
// own is what this side has presented.
func (id *Identity) enter(key connKey, raw net.Conn, peer *svid.Peer, own *current, now time.Time) error {
	if own.svid == nil {
		return own.err
	}
	end := peer.NotAfter
	if own.notAfter.Before(end) {
		end = own.notAfter
	}
	tracked, isTracked := raw.(*trackedConn)
	if isTracked {
		tracked.key.Store(key)
	}
	c := &liveConn{raw: raw, peer: peer, remote: addrString(raw.RemoteAddr()), local: addrString(raw.LocalAddr()), end: end, authorities: own.authorities, trust: own.changes}
	id.conns.add(key, c, now)
	id.drainIfTainted(c, now)
	err, latest := id.admit(peer), id.current.Load()
	switch {
	case err != nil:
	case latest.svid == nil:
		err = latest.err
	case latest.svid.ID != own.svid.ID:
		err = fmt.Errorf("the own SPIFFE ID %s has changed", own.svid.ID)
	case !latest.trusts(peer):
		err = fmt.Errorf("the trust in the authority of %s was withdrawn", peer.ID)
	case isTracked && tracked.closed.Load():
		err = net.ErrClosed
	}
	if err != nil {
		id.conns.remove(key)
	}
	return err
}

// ServerHandshake does the server's side of a handshake on raw, within 5 s and
// ctx, and enters the connection into the table until it is closed. It is for
// protocols that handshake themselves, as gRPC does. On error raw is closed.
func (id *Identity) ServerHandshake(ctx context.Context, raw net.Conn, protocols ...string) (*tls.Conn, error) {
	tracked := id.conns.track(raw)
	return handshake(ctx, telemetry.Server, tls.Server(tracked, id.ServerTLS(protocols...)))
}

// ClientHandshake does the client's side of a handshake on raw with exactly
// this target, within 5 s and ctx, and enters the connection into the table
// until it is closed. serverName is sent for routing (SNI) and never trusted;
// it may be empty. On error raw is closed.
func (id *Identity) ClientHandshake(ctx context.Context, raw net.Conn, to Target, serverName string, protocols ...string) (*tls.Conn, error) {
	tracked := id.conns.track(raw)
	own := id.snapshot()
	cfg := id.clientTLS(tracked, own, own, to, protocols)
	cfg.ServerName = serverName
	ctx, cancel := context.WithTimeout(ctx, svid.HandshakeTimeout)
	defer cancel()
	tracked.handshake.Store(&ctx)
	return handshake(ctx, telemetry.Client, tls.Client(tracked, cfg))
}

func handshake(ctx context.Context, role telemetry.Role, conn *tls.Conn) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, svid.HandshakeTimeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = conn.Close() // the handshake's error is the one that counts
		tellFailed(ctx, role, err)
		return nil, err
	}
	if tracked, ok := conn.NetConn().(*trackedConn); ok {
		tracked.shaken()
	}
	return conn, nil
}

// DialTLS gives a dial function for connections to one target, as net/http,
// pgx, go-redis and others take it. The connections are in the table of live
// connections.
func (id *Identity) DialTLS(to Target, protocols ...string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		raw, err := id.connect(ctx, network, address)
		if err != nil {
			return nil, err
		}
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			host = "" // a Unix socket; there is no name to send
		}
		conn, err := id.ClientHandshake(ctx, raw, to, host, protocols...)
		if err != nil {
			return nil, fmt.Errorf("connect to %s at %s: %w", to, address, err)
		}
		return conn, nil
	}
}

func (id *Identity) connect(ctx context.Context, network, address string) (net.Conn, error) {
	if dial := id.Dialer(); dial != nil {
		return dial(ctx, network, address)
	}
	var dialer net.Dialer
	return dialer.DialContext(ctx, network, address)
}

// Dialer is how peers are reached, below TLS, where that is not the net package's
// affair: by the connections in memory of sdktest.NewInMemory. It is nil for every
// other Identity. It is for clients that handshake themselves, as gRPC's do.
func (id *Identity) Dialer() func(ctx context.Context, network, address string) (net.Conn, error) {
	return id.dial
}

// Peer says who is at the other end of a live connection that this identity
// let in. It is false for any other connection, and once the connection was
// cut: a certificate in cs alone proves nothing.
func (id *Identity) Peer(cs *tls.ConnectionState) (*svid.Peer, bool) {
	c, _ := id.conns.find(cs)
	if c == nil {
		return nil, false
	}
	return c.peer, true
}

// Cut ends the connection with TLS state cs at once, for a reason that is logged.
func (id *Identity) Cut(cs *tls.ConnectionState, reason string) {
	if c, key := id.conns.find(cs); c != nil {
		id.conns.cut(key, c, reason)
	}
}

func (id *Identity) logRefused(ctx context.Context, raw net.Conn, err error) {
	attrs := []slog.Attr{slog.Any("err", err)}
	if raw != nil {
		attrs = append(attrs, slog.String("remote", addrString(raw.RemoteAddr())))
	}
	id.refusals.log(ctx, id.log, "handshake refused", attrs...)
}

// Interfaces of go-spiffe that Identity implements.
var _ x509bundle.Source = (*Identity)(nil)
