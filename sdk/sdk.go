// The handle: an identity, opened once, kept current, closed.

package sdk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/sdk/internal/telemetry"
	"merlon.dev/sdk/svid"
)

// Identity is this process as the node's agent knows it: its X509-SVID, kept
// fresh; the trust bundles to check others with; revocations; decisions; and
// the table of its live connections. It is safe for concurrent use.
//
// It is an x509svid.Source, an x509bundle.Source and a policy.Authorizer, so
// it also fits into programs that use go-spiffe.
type Identity struct {
	log   *slog.Logger
	agent *agent
	conns *connTable
	certs peerCerts
	dial  func(ctx context.Context, network, address string) (net.Conn, error) // nil: as net does

	current     atomic.Pointer[current]
	revocations atomic.Pointer[svid.Revocations]
	pruned      time.Time // when they were looked through last; of the goroutine that follows them
	tainted     atomic.Pointer[taint]
	programs    atomic.Pointer[programs]
	report      *report
	calls       *liveCalls
	audit       audit
	// Of what the agent says is in use: the active policy, its candidate, and the
	// versions of both.
	generation, candidate atomic.Uint64
	news                  news
	// The rest in nanoseconds, or in Unix nanoseconds of the steady clock.
	revocationsAsOf atomic.Int64
	denyAfter       atomic.Int64 // 0: the age of revocations does not matter
	denyPolicyAfter atomic.Int64 // 0: the age of the policy does not matter
	closed          atomic.Bool
	tellSource      bool // metrics and traces name the caller

	ready     readiness
	decisions condition
	denials   limitedLog
	refusals  limitedLog

	mu       sync.Mutex // guards rotated
	rotated  map[int]func()
	nextHook int

	life       context.Context // ends with Close
	cancel     context.CancelFunc
	goroutines sync.WaitGroup
	closeOnce  sync.Once
	untold     []func() // end what is told of the identity, in turn
}

// current is the immutable result of the last good message of the agent.
type current struct {
	svid    *x509svid.SVID // nil: no identity, and err says why
	err     error
	bundles *x509bundle.Set
	trust   *svid.Trust                              // of bundles
	changes uint64                                   // generation of bundles: how often they changed in this process
	roots   map[spiffeid.TrustDomain]map[string]bool // subject key IDs, hex
	ignored error                                    // federated bundles that were malformed
	// authorities vouch for svid, as in svid.Peer.
	authorities []string

	notBefore, notAfter time.Time // the SVID's, with its whole chain
}

// trusts says whether one of the authorities that vouched for the peer is
// still in the trust bundle of its trust domain.
func (c *current) trusts(peer *svid.Peer) bool {
	roots := c.roots[peer.ID.TrustDomain()]
	return slices.ContainsFunc(peer.AuthorityIDs, func(id string) bool { return roots[id] })
}

// Open connects to the node's agent and returns once this process has an
// identity and trust bundles. Where it gets none in time (10 s, or
// [WithStartupTimeout]) or ctx ends, the error is a *[NotReadyError] that
// names the cause. With [WithoutWaiting] it returns at once, and [Identity.Ready]
// does the waiting. Close the Identity after the servers that use it.
//
// From then on the Identity keeps itself current. While the agent is away it
// keeps the last SVID until that expires, and decides by the last policy until
// that ends; where the policy is not compiled for this service, calls are denied
// with AGENT_UNAVAILABLE, but for those that it has decided before.
func Open(ctx context.Context, opts ...Option) (*Identity, error) {
	o := options{StartupTimeout: defaultStartupTimeout, Log: slog.Default()}
	for _, opt := range opts {
		opt(&o)
	}
	address := agentAddress(o.Address)
	path, err := socketPath(address)
	if err != nil {
		return nil, &NotReadyError{Reason: BadAddress, Hint: "set " + SocketEnv + " to unix:///path/of/the/agent's/api.sock", Err: err}
	}
	id := &Identity{
		log:        o.Log,
		conns:      newConnTable(o.Log),
		dial:       o.Dial,
		rotated:    make(map[int]func()),
		report:     newReport(),
		calls:      newLiveCalls(),
		tellSource: o.TellSource,
	}
	if err := id.audit.set(&o, time.Now()); err != nil {
		return nil, &NotReadyError{Reason: BadOption, Hint: "correct sdk.WithAuditUntil and sdk.WithPlaintextUntil", Err: err}
	}
	id.agent, err = dialAgent(path, &o)
	if err != nil {
		return nil, &NotReadyError{Reason: AgentUnavailable, Hint: "this is a bug in the SDK", Err: err}
	}
	id.ready.init()
	id.current.Store(&current{err: errors.New("the agent has not given an identity yet"), bundles: x509bundle.NewSet(), trust: new(svid.Trust)})
	id.start(context.WithoutCancel(ctx))
	if o.WithoutWaiting {
		return id, nil
	}
	if err := id.waitReady(ctx, o.StartupTimeout); err != nil {
		id.Close()
		return nil, err
	}
	return id, nil
}

func (id *Identity) start(ctx context.Context) {
	ctx, id.cancel = context.WithCancel(ctx)
	id.life = ctx
	exported := telemetry.Export(id.log)
	id.untold = []func(){exported, telemetry.Watch(id.gauges)}
	id.goroutines.Go(func() { id.keepTrying(ctx, identityFeed, id.followSVIDs) })
	id.goroutines.Go(func() { id.keepTrying(ctx, revocationFeed, id.followRevocations) })
	id.goroutines.Go(func() { id.keepTrying(ctx, policyFeed, id.followPolicy) })
	id.goroutines.Go(func() { id.keepTrying(ctx, reportFeed, id.sendReports) })
	id.goroutines.Go(func() { id.followCalls(ctx) })
	id.startAudit(ctx)
	id.goroutines.Go(func() { id.conns.run(ctx.Done()) })
}

// Close stops the Identity: it lets nobody in any more, cuts every connection
// that is still open (nothing would watch over them), tells the agent of the last
// decisions, for at most 300 ms, and waits for its goroutines. Closing twice is
// harmless.
func (id *Identity) Close() {
	id.closeOnce.Do(func() {
		id.closed.Store(true)
		id.cancel()
		id.goroutines.Wait()
		id.agent.close()
		for _, stop := range id.untold {
			stop()
		}
	})
}

// ID is this process's SPIFFE ID; the zero ID after the agent withdrew it.
func (id *Identity) ID() spiffeid.ID {
	if own := id.current.Load().svid; own != nil {
		return own.ID
	}
	return spiffeid.ID{}
}

// GetX509SVID gives the current X509-SVID, as x509svid.Source demands. It is
// an error when the agent withdrew it or it expired.
func (id *Identity) GetX509SVID() (*x509svid.SVID, error) {
	return id.present(id.current.Load())
}

var errClosed = errors.New("the identity is closed")

// present gives the X509-SVID of now, if it may still be shown.
func (id *Identity) present(now *current) (*x509svid.SVID, error) {
	switch {
	case id.closed.Load():
		return nil, errClosed
	case now.svid == nil:
		return nil, now.err
	}
	if err := now.goodAt(time.Now()); err != nil {
		return nil, err
	}
	return now.svid, nil
}

// goodAt says why the X509-SVID may not be shown at a time.
func (c *current) goodAt(now time.Time) error {
	switch {
	case now.Before(c.notBefore):
		return fmt.Errorf("the X509-SVID of %s is not valid before %s: compare the clocks of this machine and of the CA", c.svid.ID, c.notBefore.Format(time.RFC3339))
	case !now.Before(c.notAfter):
		return fmt.Errorf("the X509-SVID of %s expired at %s and the agent has not renewed it", c.svid.ID, c.notAfter.Format(time.RFC3339))
	}
	return nil
}

// GetX509BundleForTrustDomain gives the trust bundle of the own or a federated
// trust domain, as x509bundle.Source demands.
func (id *Identity) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return id.current.Load().bundles.GetX509BundleForTrustDomain(td)
}

// OnRotate has f called after each new X509-SVID, for pools which should not
// go on with connections of the old one. f runs on a goroutine of the
// Identity, so it must not block or call Close. stop ends the calls.
func (id *Identity) OnRotate(f func()) (stop func()) {
	id.mu.Lock()
	defer id.mu.Unlock()
	n := id.nextHook
	id.nextHook++
	id.rotated[n] = f
	return func() {
		id.mu.Lock()
		defer id.mu.Unlock()
		delete(id.rotated, n)
	}
}

func (id *Identity) callRotated() {
	id.mu.Lock()
	hooks := make([]func(), 0, len(id.rotated))
	for _, f := range id.rotated {
		hooks = append(hooks, f)
	}
	id.mu.Unlock()
	for _, f := range hooks {
		f()
	}
}
