// Package caclient is the agent's side of its connection to the CA: it proves
// the node, keeps the agent's own SVID fresh and on disk, receives what the CA
// pushes, and carries requests to sign. It looks for the CA as long as it runs
// and never gives up; what the node holds stays in use meanwhile.
package caclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

const (
	// callTimeout bounds one unary call.
	callTimeout = 15 * time.Second
	// maxMessageBytes bounds one message from the CA; a listing comes in
	// several.
	maxMessageBytes = 16 << 20

	firstRetry = 50 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// Config is what a Client needs. All fields are required but those that say
// otherwise.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Address is the CA's gRPC port, "host:port".
	Address string
	// DataDir exists and belongs to the agent alone.
	DataDir string
	// JoinToken returns the join token, or "" for none. It is asked again at
	// each attempt, so that an operator can put one there while the agent runs.
	JoinToken func() (string, error)
	// RootHash is the SHA-256 of the root's public key in hex. It is needed
	// until a trust bundle is held.
	RootHash string
	// OnPolicyBundle is told which policy bundle is to be active. It must not
	// block. Optional.
	OnPolicyBundle func(*capb.PolicyBundle)
	// PolicyGeneration is that of the active policy bundle. Optional.
	PolicyGeneration func() uint64
	Logger           *slog.Logger
	Registerer       prometheus.Registerer
}

// Client is safe for concurrent use. Use New, then Run.
type Client struct {
	cfg  Config
	caID spiffeid.ID

	own      atomic.Pointer[ownSVID]
	trust    *cache.Trust // from the disk, for Run
	gotOwn   chan struct{}
	ackAgain chan struct{}
	connects prometheus.Counter

	retiring sync.WaitGroup
	mu       sync.Mutex
	link     *link // guarded by mu; nil: not connected
}

// ownSVID is the agent's own SVID.
type ownSVID struct {
	*x509svid.SVID
	renewAt time.Time
}

func (o *ownSVID) valid(now time.Time) bool { return now.Before(o.notAfter()) }

// notAfter is the earliest end of the chain.
func (o *ownSVID) notAfter() time.Time {
	end := o.Certificates[0].NotAfter
	for _, cert := range o.Certificates[1:] {
		if cert.NotAfter.Before(end) {
			end = cert.NotAfter
		}
	}
	return end
}

// link is one connection, with the calls that are on it.
type link struct {
	cc    *grpc.ClientConn
	calls sync.WaitGroup
}

// New reads what an earlier run left in the data directory.
func New(cfg Config) (*Client, error) {
	caID, err := spiffeid.FromPath(cfg.TrustDomain, "/ca")
	if err != nil {
		return nil, err
	}
	if cfg.OnPolicyBundle == nil {
		cfg.OnPolicyBundle = func(*capb.PolicyBundle) {}
	}
	if cfg.PolicyGeneration == nil {
		cfg.PolicyGeneration = func() uint64 { return 0 }
	}
	c := &Client{cfg: cfg, caID: caID, gotOwn: make(chan struct{}, 1), ackAgain: make(chan struct{}, 1)}
	if c.trust, err = c.loadTrust(); err != nil {
		return nil, err
	}
	held, err := c.loadSVID()
	if err != nil {
		return nil, err
	}
	if held != nil && c.trust != nil {
		c.setOwn(held, held.Certificates[0].NotBefore)
	}
	c.connects = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "merlon_agent_sync_connects_total", Help: "Sync streams opened to the CA.",
	})
	cfg.Registerer.MustRegister(c.connects, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "merlon_agent_own_svid_expiry_timestamp_seconds", Help: "When the agent's own SVID ends, in Unix time; 0 without one.",
	}, func() float64 {
		if own := c.own.Load(); own != nil {
			return float64(own.notAfter().Unix())
		}
		return 0
	}))
	return c, nil
}

func (c *Client) setOwn(s *x509svid.SVID, from time.Time) {
	o := &ownSVID{SVID: s}
	o.renewAt = cache.RenewAt(from, o.notAfter())
	c.own.Store(o)
	signal(c.gotOwn)
}

// ID is the agent's SPIFFE ID; zero before the node was attested.
func (c *Client) ID() spiffeid.ID {
	if own := c.own.Load(); own != nil {
		return own.ID
	}
	return spiffeid.ID{}
}

// Ready says what keeps the agent from obtaining SVIDs, as far as its own
// identity goes.
func (c *Client) Ready() error {
	switch own := c.own.Load(); {
	case own == nil:
		return errors.New("the node is not attested yet")
	case !own.valid(time.Now()):
		return errors.New("the agent's own SVID has expired")
	}
	return nil
}

// GetX509SVID implements x509svid.Source: the agent's own SVID.
func (c *Client) GetX509SVID() (*x509svid.SVID, error) {
	own := c.own.Load()
	if own == nil {
		return nil, errors.New("the agent has no SVID yet")
	}
	return own.SVID, nil
}

// AckAgain makes the client look at what it has to acknowledge.
func (c *Client) AckAgain() { signal(c.ackAgain) }

// TLS is how the agent speaks to the CA, with the given ALPN protocols.
func (c *Client) TLS(picture *cache.Cache, protocols ...string) svid.TLS {
	return svid.TLS{SVIDs: c, Bundles: bundles{picture}, Admit: svid.AdmitID(c.caID), NextProtos: protocols}
}

// bundles is the held trust bundle as go-spiffe's source.
type bundles struct{ picture *cache.Cache }

func (b bundles) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	trust := b.picture.Trust()
	if trust == nil {
		return nil, errors.New("no trust bundle is held yet")
	}
	return trust.Bundle.GetX509BundleForTrustDomain(td)
}

// Run connects and stays connected until ctx ends, feeding picture.
func (c *Client) Run(ctx context.Context, picture *cache.Cache) error {
	if c.trust != nil {
		picture.SetTrust(ctx, c.trust)
	}
	var renewing sync.WaitGroup
	defer c.retiring.Wait()
	defer c.setLink(nil)
	defer renewing.Wait()
	renewing.Go(func() { c.keepRenewed(ctx, picture) })
	failures := 0
	for ctx.Err() == nil {
		heard, err := c.session(ctx, picture)
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, errRenewed) {
			failures = 0
			continue
		}
		c.setLink(nil)
		if heard {
			failures = 0
		}
		wait := retryIn(failures)
		level := slog.LevelWarn
		if failures > 0 && failures%20 != 0 {
			level = slog.LevelDebug // said already
		}
		failures++
		c.cfg.Logger.LogAttrs(ctx, level, "no connection to the CA",
			slog.String("address", c.cfg.Address), slog.Duration("retry_in", wait), slog.Any("err", err))
		if pause(ctx, wait) != nil {
			break
		}
	}
	return nil
}

// session attests the node if need be and then follows one Sync stream to its
// end. heard says that the CA answered.
func (c *Client) session(ctx context.Context, picture *cache.Cache) (heard bool, err error) {
	if own := c.own.Load(); own == nil || !own.valid(time.Now()) {
		if err := c.attest(ctx, picture); err != nil {
			return false, err
		}
	}
	cc, err := c.dial(credentials.NewTLS(c.TLS(picture).Client()))
	if err != nil {
		return false, err
	}
	l := &link{cc: cc}
	c.setLink(l)
	// The stream belongs to this SVID; a newer one opens its own.
	drain(c.gotOwn)
	return c.follow(ctx, picture, capb.NewNodeClient(cc))
}

// dial returns a connection that is opened by the first call on it. A call
// fails as soon as connecting fails; when to try again is decided by Run.
func (c *Client) dial(creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	cc, err := grpc.NewClient("passthrough:///"+c.cfg.Address,
		grpc.WithTransportCredentials(creds),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: firstRetry, Multiplier: 1.3, Jitter: 0.3, MaxDelay: lastRetry},
			MinConnectTimeout: svid.HandshakeTimeout,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to the CA at %s: %w", c.cfg.Address, err)
	}
	return cc, nil
}

// setLink makes l the connection that calls use. The one before is closed when
// its last call has ended; all calls are bounded.
func (c *Client) setLink(l *link) {
	c.mu.Lock()
	old := c.link
	c.link = l
	c.mu.Unlock()
	if old == nil {
		return
	}
	c.retiring.Go(func() {
		old.calls.Wait()
		old.cc.Close()
	})
}

// call runs f on the current connection.
func (c *Client) call(ctx context.Context, f func(context.Context, capb.NodeClient) error) error {
	c.mu.Lock()
	l := c.link
	if l == nil {
		c.mu.Unlock()
		return status.Error(codes.Unavailable, "the agent is not connected to the CA")
	}
	l.calls.Add(1)
	c.mu.Unlock()
	defer l.calls.Done()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return f(ctx, capb.NewNodeClient(l.cc))
}

// Sign implements cache.Authority.
func (c *Client) Sign(ctx context.Context, items []*capb.SignItem) (results []*capb.SignResult, err error) {
	err = c.call(ctx, func(ctx context.Context, node capb.NodeClient) error {
		answer, err := node.Sign(ctx, &capb.SignRequest{Items: items})
		results = answer.GetResults()
		return err
	})
	return results, err
}

// SignJWT implements cache.Authority.
func (c *Client) SignJWT(ctx context.Context, entryID string, audience []string) (token string, err error) {
	err = c.call(ctx, func(ctx context.Context, node capb.NodeClient) error {
		answer, err := node.SignJWT(ctx, &capb.SignJWTRequest{EntryId: entryID, Audience: audience})
		token = answer.GetToken()
		return err
	})
	return token, err
}

// retryIn is how long to wait after so many failures in a row: about a third of
// the time that the CA has been away, so that one that restarts is found soon
// and one that is down is left alone.
func retryIn(failures int) time.Duration {
	d := firstRetry
	for range failures {
		if d = d * 13 / 10; d >= lastRetry {
			d = lastRetry
			break
		}
	}
	return time.Duration(float64(d) * (0.7 + 0.6*rand.Float64())) //nolint:gosec // jitter
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func drain(ch chan struct{}) {
	select {
	case <-ch:
	default:
	}
}
