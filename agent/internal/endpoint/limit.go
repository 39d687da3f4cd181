// Shares: no user of the node can take all connections or streams of the agent
// (SECURITY.md T39).

package endpoint

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/tap"

	"merlon.dev/sdk/unixsock"
)

// Limit counts something per user. It is safe for concurrent use.
type Limit struct {
	max int

	mu sync.Mutex
	// guarded by mu
	used map[uint32]int
	open map[*limitedConn]struct{} // of connections
	cut  bool                      // no connection is let in any more
}

// NewLimit allows each user max at the same time.
func NewLimit(limit int) *Limit {
	return &Limit{max: limit, used: map[uint32]int{}, open: map[*limitedConn]struct{}{}}
}

// Cut closes the connections that Credentials have let in, and lets in no other.
func (l *Limit) Cut() {
	l.mu.Lock()
	l.cut = true
	open := slices.Collect(maps.Keys(l.open))
	l.mu.Unlock()
	for _, conn := range open {
		_ = conn.Close() // it is to end
	}
}

// enter keeps conn for Cut, and says whether it is let in.
func (l *Limit) enter(conn *limitedConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.cut {
		l.open[conn] = struct{}{}
	}
	return !l.cut
}

func (l *Limit) leave(conn *limitedConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.open, conn)
}

// Take takes one for uid, or says that he has all of his.
func (l *Limit) Take(uid uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.used[uid] >= l.max {
		return false
	}
	l.used[uid]++
	return true
}

// Give gives one back.
func (l *Limit) Give(uid uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.used[uid]--; l.used[uid] <= 0 {
		delete(l.used, uid)
	}
}

// Tap bounds the open calls of a user, from their first header on: a call
// whose request never comes reaches no interceptor, and holds a goroutine all
// the same. How often he opens streams is bounded by opens, if that is not nil;
// decisions, which are asked for call by call, are not counted.
func (l *Limit) Tap(opens *Rate) tap.ServerInHandle {
	return func(ctx context.Context, call *tap.Info) (context.Context, error) {
		if opens != nil && rpcs[call.FullMethodName].once {
			if err := opens.Admit(ctx, "streams opened", "keep the stream open: what changes is sent on it"); err != nil {
				return ctx, err
			}
		}
		return l.take(ctx)
	}
}

// take takes one for the call of ctx.
func (l *Limit) take(ctx context.Context) (context.Context, error) {
	peer, ok := unixsock.PeerFromContext(ctx)
	if !ok {
		return ctx, Error(codes.Internal, ProcessGone, "the connection does not say who calls", "")
	}
	if !l.Take(peer.UID) {
		return ctx, Error(codes.ResourceExhausted, TooManyStreams,
			fmt.Sprintf("uid %d has %d calls open, which is all it may have", peer.UID, l.max), "close streams that are not read")
	}
	context.AfterFunc(ctx, func() { l.Give(peer.UID) }) // gRPC ends it with the call
	return ctx, nil
}

// Credentials are unixsock's server credentials with at most l connections per
// user. Each process that is let in is shown to meet, before its first call.
func (l *Limit) Credentials(meet func(*unixsock.Peer)) credentials.TransportCredentials {
	return limitedCredentials{TransportCredentials: unixsock.ServerCredentials(), limit: l, meet: meet}
}

type limitedCredentials struct {
	credentials.TransportCredentials
	limit *Limit
	meet  func(*unixsock.Peer)
}

func (c limitedCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	wrapped, info, err := c.TransportCredentials.ServerHandshake(conn)
	if err != nil {
		return nil, nil, err
	}
	peer := info.(unixsock.AuthInfo).Peer
	uid := peer.UID
	if !c.limit.Take(uid) {
		wrapped.Close()
		return nil, nil, fmt.Errorf("uid %d has %d connections open, which is all it may have", uid, c.limit.max)
	}
	c.meet(peer)
	limited := &limitedConn{Conn: wrapped}
	limited.done = sync.OnceFunc(func() {
		c.limit.Give(uid)
		c.limit.leave(limited)
	})
	if !c.limit.enter(limited) {
		limited.Close()
		return nil, nil, errors.New("the agent is stopping")
	}
	return limited, info, nil
}

func (c limitedCredentials) Clone() credentials.TransportCredentials {
	return limitedCredentials{TransportCredentials: c.TransportCredentials.Clone(), limit: c.limit, meet: c.meet}
}

type limitedConn struct {
	net.Conn
	done func()
}

func (c *limitedConn) Close() error {
	c.done()
	return c.Conn.Close()
}
