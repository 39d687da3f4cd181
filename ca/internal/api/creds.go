// Transport credentials of the TLS port: who is at the other end is taken from
// the verified chain once per connection.

package api

import (
	"context"
	"crypto/tls"
	"net"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/sdk/svid"
)

// tlsInfo is the auth info of a TLS connection.
type tlsInfo struct {
	credentials.TLSInfo
	Peer *svid.Peer   // nil: the client showed no certificate
	conn *countedConn // of an agent
}

// connOf is the connection of a call, if its caller is an agent.
func connOf(ctx context.Context) *countedConn {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(tlsInfo); ok {
			return info.conn
		}
	}
	return nil
}

type serverCreds struct {
	credentials.TransportCredentials
	service *Service
}

// newServerCreds wraps a configuration of svid.TLS, whose VerifyConnection has
// verified the chain by the time the handshake returns.
func (s *Service) newServerCreds(cfg *tls.Config) credentials.TransportCredentials {
	return serverCreds{credentials.NewTLS(cfg), s}
}

// ServerHandshake implements credentials.TransportCredentials.
func (c serverCreds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	turn := &inTurn{Conn: conn, turns: c.service.turns}
	wrapped, info, err := c.TransportCredentials.ServerHandshake(turn)
	turn.pass()
	if err != nil {
		return nil, nil, err
	}
	t := tlsInfo{TLSInfo: info.(credentials.TLSInfo)}
	p, ok := svid.PeerFromState(t.State)
	if !ok {
		return wrapped, t, nil
	}
	t.Peer = p
	if _, isAgent := entry.AgentName(p.ID); !isAgent {
		return wrapped, t, nil // administrators; whoever else has an SVID gets no answers
	}
	if t.conn, err = c.service.admitConn(wrapped, p); err != nil {
		return nil, nil, err
	}
	return t.conn, t, nil
}

// ClientHandshake implements credentials.TransportCredentials; these are a
// server's.
func (c serverCreds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	panic("api: server credentials used by a client")
}

// Clone implements credentials.TransportCredentials.
func (c serverCreds) Clone() credentials.TransportCredentials {
	return serverCreds{c.TransportCredentials.Clone(), c.service}
}
