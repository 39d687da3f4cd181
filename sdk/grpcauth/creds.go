// Transport credentials over the identity's handshakes, so that gRPC's
// connections are in the table of live connections.

package grpcauth

import (
	"context"
	"crypto/tls"
	"errors"
	"net"

	"google.golang.org/grpc/credentials"

	"merlon.dev/sdk"
)

type creds struct {
	id *sdk.Identity
	to sdk.Target // the zero value refuses every server
}

// ServerHandshake implements credentials.TransportCredentials.
func (c *creds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	// gRPC gives no context here; the handshake has its own limit of 5 s.
	if conn, err := c.id.Plaintext(context.Background(), raw); conn != nil || err != nil {
		return conn, plaintextInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}, err
	}
	secured, err := c.id.ServerHandshake(context.Background(), raw, "h2")
	if err != nil {
		return nil, nil, err
	}
	conn := &serverConn{Conn: secured}
	return c.withInfo(conn, secured, conn.leave)
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *creds) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	host, _, err := net.SplitHostPort(authority)
	if err != nil {
		host = authority
	}
	secured, err := c.id.ClientHandshake(ctx, raw, c.to, host, "h2")
	if err != nil {
		return nil, nil, err
	}
	conn := &clientConn{Conn: secured}
	return c.withInfo(conn, secured, conn.leave)
}

// plaintextInfo marks a connection without TLS, which sdk.WithPlaintextUntil lets in.
type plaintextInfo struct{ credentials.CommonAuthInfo }

// AuthType implements credentials.AuthInfo.
func (plaintextInfo) AuthType() string { return "plaintext" }

// withInfo is what a handshake gives: conn, on top of secured, which is told to leave
// when it drains.
func (c *creds) withInfo(conn net.Conn, secured *tls.Conn, leave func()) (net.Conn, credentials.AuthInfo, error) {
	state := secured.ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		_ = conn.Close() // the refusal is what counts
		return nil, nil, errors.New("grpcauth: the other side does not speak HTTP/2 (no ALPN h2)")
	}
	c.id.OnDrain(&state, leave)
	return conn, credentials.TLSInfo{
		State:          state,
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

// Info implements credentials.TransportCredentials.
func (c *creds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (c *creds) Clone() credentials.TransportCredentials {
	copied := *c
	return &copied
}

// OverrideServerName implements credentials.TransportCredentials. Server names
// play no part.
func (c *creds) OverrideServerName(string) error { return nil }
