// The connection to the CA and the calls on it. A call whose connection dies
// is made again on the next one, so that its caller does not notice the loss
// of a replica.

package caclient

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

const (
	// callTimeout bounds one unary call.
	callTimeout = 15 * time.Second
	// maxMessageBytes bounds one message from the CA; a listing comes in
	// several.
	maxMessageBytes = 16 << 20

	// pingInterval is how long a connection may be silent before gRPC asks whether the
	// CA's process lives: longer than a CA with many agents is silent, since Sync asks
	// sooner (silence.go). pingTimeout is how long it may take to answer, and how long
	// data may stay unacknowledged by the CA's machine.
	pingInterval = 75 * time.Second
	pingTimeout  = 3 * time.Second
	// windowBytes is how much may be on its way: a listing of some megabytes from the
	// other side of the world.
	windowBytes = 1 << 20
	// noticeTimeout is how long a call whose connection has failed waits for
	// Run to see the same.
	noticeTimeout = 500 * time.Millisecond
	// maxTries is how often one call is made.
	maxTries = 4
)

// probes ask the CA's machine, below gRPC: a path that swallows packets is
// found out within 4 to 6 s.
var probes = net.KeepAliveConfig{Enable: true, Idle: 3 * time.Second, Interval: time.Second, Count: 3}

// link is one connection, with the calls that are on it.
type link struct {
	cc      *grpc.ClientConn
	address string
	dial    func(address string) (*grpc.ClientConn, error) // another replica
	calls   sync.WaitGroup
	reads   atomic.Uint64 // how often something came on it
}

// links is which connection calls use. It is safe for concurrent use.
type links struct {
	mu sync.Mutex
	// guarded by mu
	now     *link         // nil: not connected
	seeking bool          // the next one is being looked for, and near
	changed chan struct{} // closed when any of this changes

	retiring sync.WaitGroup
	ended    chan struct{} // closed by end
}

func newLinks() *links { return &links{changed: make(chan struct{}), ended: make(chan struct{})} }

// use makes l the connection that calls use; nil for none. The one before is
// closed when its last call has ended; all calls are bounded.
func (s *links) use(l *link) {
	s.mu.Lock()
	old := s.now
	s.now, s.seeking = l, l == nil
	s.wake()
	s.mu.Unlock()
	if old == nil || old == l {
		return
	}
	idle := make(chan struct{})
	go func() { // until the last call has ended, which is soon after its connection
		defer close(idle)
		old.calls.Wait()
	}()
	s.retiring.Go(func() {
		select {
		case <-idle:
		case <-s.ended:
		}
		old.cc.Close()
	})
}

// end closes all connections, and fails the calls on them: the agent ends, and must not
// wait for its CA. Call it once, and use not after it.
func (s *links) end() {
	s.use(nil)
	s.rest()
	close(s.ended)
	s.retiring.Wait()
}

// rest says that nobody looks for a connection for a while: calls need not
// wait for one.
func (s *links) rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seeking = false
	s.wake()
}

func (s *links) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// current is the connection that calls use, nil for none.
func (s *links) current() *link {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// take returns the current connection for one call, which ends with
// calls.Done. It waits while the next one is being looked for; nil means that
// there is none.
func (s *links) take(ctx context.Context) *link {
	for {
		s.mu.Lock()
		l, seeking, changed := s.now, s.seeking, s.changed
		if l != nil {
			l.calls.Add(1)
		}
		s.mu.Unlock()
		if l != nil || !seeking {
			return l
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// gone waits until failed is not the current connection any more, and says
// whether that is so. A replica can also fail a call for reasons of its own,
// on a connection that stays.
func (s *links) gone(ctx context.Context, failed *link) bool {
	ctx, cancel := context.WithTimeout(ctx, noticeTimeout)
	defer cancel()
	for {
		s.mu.Lock()
		l, changed := s.now, s.changed
		s.mu.Unlock()
		if l != failed {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		}
	}
}

// call runs f on the current connection, and again on the next one if that
// connection dies: everything that an agent calls may be done twice.
func (s *links) call(ctx context.Context, f func(context.Context, capb.NodeClient) error) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	for tries := 1; ; tries++ {
		l := s.take(ctx)
		if l == nil {
			return status.Error(codes.Unavailable, "the agent is not connected to the CA")
		}
		err := f(ctx, capb.NewNodeClient(l.cc))
		l.calls.Done()
		lost := status.Code(err) == codes.Unavailable ||
			status.Code(err) == codes.Canceled && ctx.Err() == nil // the connection was closed before the call was on it
		if !lost || tries == maxTries || asksForAnother(err) || !s.gone(ctx, l) {
			return err
		}
	}
}

// Sign implements cache.Authority.
func (c *Client) Sign(ctx context.Context, items []*capb.SignItem) (results []*capb.SignResult, err error) {
	err = c.links.call(ctx, func(ctx context.Context, node capb.NodeClient) error {
		answer, err := node.Sign(ctx, &capb.SignRequest{Items: items})
		results = answer.GetResults()
		return err
	})
	return results, err
}

// SignJWT implements cache.Authority.
func (c *Client) SignJWT(ctx context.Context, items []*capb.SignJWTItem) (results []*capb.SignJWTResult, err error) {
	err = c.anywhere(ctx, func(ctx context.Context, node capb.NodeClient) error {
		answer, err := node.SignJWT(ctx, &capb.SignJWTRequest{Items: items})
		results = answer.GetResults()
		return err
	})
	return results, err
}

// dial returns a connection that is opened by the first call on it. A call
// fails as soon as connecting fails; when to try again is decided by Run.
func dial(address string, creds credentials.TransportCredentials, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	dialer := &net.Dialer{KeepAliveConfig: probes}
	cc, err := grpc.NewClient("passthrough:///"+address, append([]grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: firstRetry, Multiplier: 1.3, Jitter: 0.3, MaxDelay: lastRetry},
			MinConnectTimeout: svid.HandshakeTimeout,
		}),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", address)
		}),
		// With windows of its own choice gRPC asks how far the CA is at each message, and
		// ten thousand agents ask a lot.
		grpc.WithInitialWindowSize(windowBytes), grpc.WithInitialConnWindowSize(windowBytes),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingInterval, Timeout: pingTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)),
	}, more...)...)
	if err != nil {
		return nil, fmt.Errorf("connect to the CA at %s: %w", address, err)
	}
	return cc, nil
}
