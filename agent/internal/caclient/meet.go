// First contact: a connection on which the agent shows nothing before the other
// end has shown that it is the CA, and which evidence can be bound to.

package caclient

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/sdk/svid"
)

// meet connects to the CA at address, which is verified when it returns. The
// channel lives as long as its one connection: evidence is good on no other.
func (c *Client) meet(ctx context.Context, picture *cache.Cache, address string) (*grpc.ClientConn, tls.ConnectionState, error) {
	cfg := c.firstContact(picture)
	cfg.ServerName, _, _ = net.SplitHostPort(address) // for whoever routes by it
	bounded, cancel := context.WithTimeout(ctx, svid.HandshakeTimeout)
	defer cancel()
	raw, err := (&net.Dialer{KeepAliveConfig: probes}).DialContext(bounded, "tcp", address)
	if err != nil {
		return nil, tls.ConnectionState{}, fmt.Errorf("connect to the CA at %s: %w", address, err)
	}
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(bounded); err != nil {
		raw.Close()
		return nil, tls.ConnectionState{}, fmt.Errorf("connect to the CA at %s: %w", address, err)
	}
	cc, err := dial(address, &established{TransportCredentials: credentials.NewTLS(cfg), conn: conn}, grpc.WithContextDialer(once(conn)))
	if err != nil {
		conn.Close()
		return nil, tls.ConnectionState{}, err
	}
	return cc, conn.ConnectionState(), nil
}

// once gives conn out the first time it is asked.
func once(conn net.Conn) func(context.Context, string) (net.Conn, error) {
	var given atomic.Bool
	return func(context.Context, string) (net.Conn, error) {
		if given.Swap(true) {
			return nil, errors.New("the connection that the evidence is good for is gone")
		}
		return conn, nil
	}
}

// established are the credentials of a connection whose handshake is done.
type established struct {
	credentials.TransportCredentials
	conn *tls.Conn
}

// ClientHandshake implements credentials.TransportCredentials.
func (e *established) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return e.conn, credentials.TLSInfo{
		State:          e.conn.ConnectionState(),
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

// Clone implements credentials.TransportCredentials.
func (e *established) Clone() credentials.TransportCredentials { return e }
