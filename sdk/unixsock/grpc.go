// gRPC over Unix sockets: transport credentials that carry the kernel's word
// on who is at the other end.

package unixsock

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// AuthInfo is the gRPC auth info of a connection made with the credentials of
// this package.
type AuthInfo struct {
	credentials.CommonAuthInfo
	Peer *Peer
}

// AuthType implements credentials.AuthInfo.
func (AuthInfo) AuthType() string { return "unix" }

// PeerFromContext returns the process that made the gRPC call of ctx. The Peer
// belongs to the connection: do not close it, and do not keep it longer than
// the call.
func PeerFromContext(ctx context.Context) (*Peer, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	info, ok := p.AuthInfo.(AuthInfo)
	return info.Peer, ok
}

// ServerCredentials pins each connecting process for the life of its
// connection. Clients need nothing.
func ServerCredentials() credentials.TransportCredentials { return unixCreds{} }

// ClientCredentials connects only to a socket whose listener runs as root, as
// the caller's own user, or as one of uids, so that nobody can put a socket of
// his own in the way (SECURITY.md T49).
func ClientCredentials(uids ...uint32) credentials.TransportCredentials {
	return unixCreds{trusted: append([]uint32{0, uint32(os.Geteuid())}, uids...)}
}

type unixCreds struct{ trusted []uint32 }

func (c unixCreds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return handshake(conn)
}

func (c unixCreds) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	wrapped, info, err := handshake(conn)
	if err != nil {
		return nil, nil, err
	}
	if uid := info.Peer.UID; !slices.Contains(c.trusted, uid) {
		wrapped.Close()
		return nil, nil, fmt.Errorf("the socket %s is served by uid %d, which is not trusted; expected one of %v", conn.RemoteAddr(), uid, c.trusted)
	}
	return wrapped, info, nil
}

func handshake(conn net.Conn) (net.Conn, AuthInfo, error) {
	p, err := PeerOf(conn)
	if err != nil {
		return nil, AuthInfo{}, err
	}
	p.hangup = conn.Close
	info := AuthInfo{
		// The kernel carries the bytes: nobody on a network can read them.
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		Peer:           p,
	}
	return &peerConn{Conn: conn, peer: p}, info, nil
}

func (unixCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}
func (c unixCreds) Clone() credentials.TransportCredentials { return c }
func (unixCreds) OverrideServerName(string) error           { return nil }

// peerConn releases the pinned process together with the connection.
type peerConn struct {
	net.Conn
	peer *Peer
	once sync.Once
}

func (c *peerConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.peer.Close)
	return err
}
