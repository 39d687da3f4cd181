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
	conn, err := c.id.ServerHandshake(context.Background(), raw, "h2")
	return withInfo(conn, err)
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *creds) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	host, _, err := net.SplitHostPort(authority)
	if err != nil {
		host = authority
	}
	conn, err := c.id.ClientHandshake(ctx, raw, c.to, host, "h2")
	return withInfo(conn, err)
}

// plaintextInfo marks a connection without TLS, which sdk.WithPlaintextUntil lets in.
type plaintextInfo struct{ credentials.CommonAuthInfo }

// AuthType implements credentials.AuthInfo.
func (plaintextInfo) AuthType() string { return "plaintext" }

func withInfo(conn *tls.Conn, err error) (net.Conn, credentials.AuthInfo, error) {
	if err != nil {
		return nil, nil, err
	}
	state := conn.ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		_ = conn.Close() // the refusal is what counts
		return nil, nil, errors.New("grpcauth: the other side does not speak HTTP/2 (no ALPN h2)")
	}
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
