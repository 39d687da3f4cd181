// The one connection to the agent: only to a socket that a trusted user
// serves, reconnected for ever, and with the reasons of failures kept so that
// Open can name them.

package sdk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy/denial"
	"merlon.dev/sdk/unixsock"
)

// Waiting times between attempts, before jitter. The socket is local: trying
// again is cheap, and with what follows an attempt, a second is what a restarted
// agent may be missed.
const (
	minWait        = 50 * time.Millisecond
	maxWait        = 800 * time.Millisecond
	maxWaitRefused = 2 * time.Second  // the agent answered, and would answer the same
	neverWait      = 30 * time.Second // the agent does not know the call
)

// maxMessageBytes bounds one message of the agent. The first one about revocations has
// all of them, some hundred bytes each; gRPC's own limit is 4 MiB.
const maxMessageBytes = 256 << 20

// The two feeds, as logs name them.
const (
	identityFeed   = "X509-SVID"
	revocationFeed = "revocations"
)

type agent struct {
	connect  func(context.Context) (net.Conn, error)
	conn     *grpc.ClientConn
	workload workload.SpiffeWorkloadAPIClient
	local    agentpb.LocalClient

	mu      sync.Mutex // guards connErr
	connErr error      // why the last attempt to connect failed; nil after one that worked
}

func dialAgent(path string, o *options) (*agent, error) {
	a := &agent{connect: o.Agent}
	creds := insecure.NewCredentials()
	if a.connect == nil {
		a.connect = func(ctx context.Context) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", path)
		}
		creds = unixsock.ClientCredentials(o.UIDs...)
	}
	conn, err := grpc.NewClient("passthrough:///agent",
		grpc.WithContextDialer(a.dial),
		grpc.WithTransportCredentials(&notingCreds{creds, a}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: minWait, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxWait / 2},
			MinConnectTimeout: 2 * time.Second,
		}),
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)),
		grpc.WithIdleTimeout(0),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(withHeader(ctx), method, req, reply, cc, opts...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return open(withHeader(ctx), desc, cc, method, opts...)
		}),
	)
	if err != nil {
		return nil, err
	}
	a.conn = conn
	a.workload = workload.NewSpiffeWorkloadAPIClient(conn)
	a.local = agentpb.NewLocalClient(conn)
	return a, nil
}

// withHeader adds the metadata that keeps browsers and the like from calling
// by mistake (SPIFFE Workload Endpoint, section 6).
func withHeader(ctx context.Context) context.Context {
	return metadata.NewOutgoingContext(ctx, metadata.Pairs("workload.spiffe.io", "true"))
}

func (a *agent) close() { _ = a.conn.Close() } // it only reports a second close

// reconnect tries to connect at once. A call that is made while gRPC still remembers
// the last failure would fail by that, so there is a moment to forget it.
func (a *agent) reconnect(ctx context.Context) {
	a.conn.ResetConnectBackoff()
	ctx, cancel := context.WithTimeout(ctx, minWait)
	defer cancel()
	a.conn.WaitForStateChange(ctx, connectivity.TransientFailure)
}

func (a *agent) dial(ctx context.Context, _ string) (net.Conn, error) {
	conn, err := a.connect(ctx)
	a.note(err)
	return conn, err
}

func (a *agent) note(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.connErr = err
}

func (a *agent) lastConnErr() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.connErr
}

// errNotTrusted marks the refusal of the socket's owner.
var errNotTrusted = errors.New("the agent's socket is not trusted")

// notingCreds keeps the reason of a failed handshake as an error; in gRPC's
// status only its text survives.
type notingCreds struct {
	credentials.TransportCredentials
	agent *agent
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *notingCreds) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		err = fmt.Errorf("%w: %w", errNotTrusted, err)
	}
	c.agent.note(err)
	return conn, info, err
}

// Clone implements credentials.TransportCredentials.
func (c *notingCreds) Clone() credentials.TransportCredentials {
	return &notingCreds{c.TransportCredentials.Clone(), c.agent}
}

// keepTrying runs session until ctx ends, with growing, jittered waits in
// between. session calls its argument whenever it has made progress.
func (id *Identity) keepTrying(ctx context.Context, what string, session func(context.Context, func()) error) {
	var state condition
	wait := minWait
	for {
		err := session(ctx, func() {
			wait = minWait
			state.fine(ctx, id.log, "agent answers again")
		})
		if ctx.Err() != nil {
			return
		}
		id.ready.fail(what, err)
		state.trouble(ctx, id.log, "agent does not answer", fmt.Errorf("%s: %w", what, err))
		longest := maxWait
		switch status.Code(err) {
		case codes.PermissionDenied:
			longest = maxWaitRefused
		case codes.Unimplemented, codes.InvalidArgument:
			wait, longest = neverWait, neverWait
		}
		if !sleep(ctx, wait/2+rand.N(wait/2)) { //nolint:gosec // jitter is no secret
			return
		}
		wait = min(wait*2, longest)
		id.agent.reconnect(ctx)
	}
}

// sleep says whether it slept to the end.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// readiness tells Open when both feeds have brought their first message, and
// until then what was last in the way of each.
type readiness struct {
	identity, revocations chan struct{} // closed at the first message
	identityOnce, revOnce sync.Once

	mu   sync.Mutex // guards errs
	errs map[string]error
}

func (r *readiness) init() {
	r.identity, r.revocations = make(chan struct{}), make(chan struct{})
	r.errs = make(map[string]error)
}

func (r *readiness) haveIdentity()    { r.identityOnce.Do(func() { close(r.identity) }) }
func (r *readiness) haveRevocations() { r.revOnce.Do(func() { close(r.revocations) }) }

// isReady says whether the revocation feed has brought its first message.
func (r *readiness) isReady() bool {
	select {
	case <-r.revocations:
		return true
	default:
		return false
	}
}

func (r *readiness) fail(feed string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.errs[feed] = err
}

// lastErr is what is in the way of the first feed that is not there yet; nil
// when it was never answered.
func (r *readiness) lastErr() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-r.identity:
		return r.errs[revocationFeed]
	default:
		return r.errs[identityFeed]
	}
}

// Ready waits until this process has had its first identity and revocations, as Open
// does without [WithoutWaiting]. Where ctx ends before, the error is a *[NotReadyError]
// that names the cause. [Identity.GetX509SVID] says whether there still is an identity.
func (id *Identity) Ready(ctx context.Context) error {
	return id.waitReady(ctx, math.MaxInt64)
}

// waitReady blocks until there is an identity, for as long as timeout and ctx allow.
func (id *Identity) waitReady(ctx context.Context, timeout time.Duration) error {
	waiting, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for _, feed := range []chan struct{}{id.ready.identity, id.ready.revocations} {
		select {
		case <-feed:
			continue // whatever ctx is
		default:
		}
		select {
		case <-feed:
		case <-id.life.Done():
			return errClosed
		case <-waiting.Done():
			e := id.notReady()
			if ctx.Err() != nil {
				e.Err = fmt.Errorf("%w while waiting: %w", ctx.Err(), e.Err)
			}
			return e
		}
	}
	return nil
}

// notReady names the cause, from the socket upwards.
func (id *Identity) notReady() *NotReadyError {
	err, connErr := id.ready.lastErr(), id.agent.lastConnErr()
	start := "start the agent, or set " + SocketEnv + " to its socket"
	switch {
	case errors.Is(connErr, fs.ErrNotExist):
		return &NotReadyError{SocketAbsent, start, connErr}
	case errors.Is(connErr, syscall.ECONNREFUSED):
		return &NotReadyError{SocketDead, "the agent has stopped: start it again", connErr}
	case errors.Is(connErr, fs.ErrPermission):
		return &NotReadyError{SocketForbidden, "give this user the right to enter the socket's directory", connErr}
	case errors.Is(connErr, errNotTrusted):
		return &NotReadyError{AgentNotTrusted, "somebody else may have put this socket here; if the agent does run as that user, use sdk.WithAgentUID", connErr}
	case connErr != nil:
		return &NotReadyError{AgentUnavailable, start, connErr}
	case err == nil:
		return &NotReadyError{AgentNotSynced, "the agent runs and has not answered yet: see that it reaches the CA", errors.New("no answer from the agent in time")}
	}
	if errors.Is(err, errBadAnswer) {
		return &NotReadyError{BadAnswer, "compare the clocks and trust bundles of agent and CA", err}
	}
	if st, ok := status.FromError(err); ok {
		if info, found := denial.Info(st); found && info.GetReason() == string(AgentNotSynced) {
			return &NotReadyError{AgentNotSynced, "see that the agent reaches the CA", err}
		}
		switch st.Code() {
		case codes.PermissionDenied:
			return &NotReadyError{NoMatchingEntry, fmt.Sprintf("create a registration entry for this process; merlon explain identity --pid %d says what it lacks", os.Getpid()), err}
		case codes.Unimplemented, codes.InvalidArgument:
			return &NotReadyError{BadAnswer, "what listens there is no Merlon agent, or a very old one", err}
		}
	}
	return &NotReadyError{AgentUnavailable, "look at the agent's log", err}
}
