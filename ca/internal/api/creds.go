// Transport credentials of the TLS port: who is at the other end is taken from
// the verified chain once per connection.

package api

import (
	"context"
	"crypto/tls"
	"net"

	"google.golang.org/grpc/credentials"

	"merlon.dev/sdk/svid"
)

// tlsInfo is the auth info of a TLS connection.
type tlsInfo struct {
	credentials.TLSInfo
	Peer *svid.Peer // nil: the client showed no certificate
}

type serverCreds struct {
	credentials.TransportCredentials
}

// newServerCreds wraps a configuration of svid.TLS, whose VerifyConnection has
// verified the chain by the time the handshake returns.
func newServerCreds(cfg *tls.Config) credentials.TransportCredentials {
	return serverCreds{credentials.NewTLS(cfg)}
}

// ServerHandshake implements credentials.TransportCredentials.
func (c serverCreds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	wrapped, info, err := c.TransportCredentials.ServerHandshake(conn)
	if err != nil {
		return nil, nil, err
	}
	t := tlsInfo{TLSInfo: info.(credentials.TLSInfo)}
	if p, ok := svid.PeerFromState(t.State); ok {
		t.Peer = p
	}
	return wrapped, t, nil
}

// ClientHandshake implements credentials.TransportCredentials; these are a
// server's.
func (c serverCreds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	panic("api: server credentials used by a client")
}

// Clone implements credentials.TransportCredentials.
func (c serverCreds) Clone() credentials.TransportCredentials {
	return serverCreds{c.TransportCredentials.Clone()}
}
