// Package caclient is the agent's side of its connection to the CA: it proves
// the node, keeps the agent's own SVID fresh and on disk, receives what the CA
// pushes, and carries requests to sign. Of several replicas of the CA it
// follows one, and goes to another when that one fails or cannot reach its
// store. It looks for the CA as long as it runs and never gives up; what the
// node holds stays in use meanwhile.
package caclient

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"merlon.dev/agent/internal/attest"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/datadir"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// Config is what a Client needs. All fields are required but those that say
// otherwise.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Addresses are the gRPC ports of the CA's replicas, "host:port"; at least
	// one.
	Addresses []string
	DataDir   *datadir.Dir
	// Attestor makes the evidence that proves the node. It is asked at each
	// attempt.
	Attestor attest.Attestor
	// Recover lets the agent come back by its own SVID after its end: for nodes
	// whose evidence is good once.
	Recover bool
	// RootHash is the SHA-256 of the root's public key in hex. It is needed
	// until a trust bundle is held.
	RootHash string
	// OnPolicyBundle is told which policy bundle is to be active. It must not
	// block. Optional.
	OnPolicyBundle func(*capb.PolicyBundle)
	// PolicyGeneration is that of the active policy bundle, and PolicySeen the
	// highest that ever was active. Optional.
	PolicyGeneration, PolicySeen func() uint64
	// PolicyReports returns what is told of the policy on the node. Optional.
	PolicyReports func() PolicyReports
	// RevocationMaxAge and PolicyStaleAfter are how old what the CA said of either may
	// be. Optional: as old as it likes.
	RevocationMaxAge, PolicyStaleAfter time.Duration
	// Durable is the store revision up to which what the node holds is on disk.
	// Optional: all of it.
	Durable    func() uint64
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Client is safe for concurrent use. Use New, then Run.
type Client struct {
	cfg  Config
	caID spiffeid.ID

	own        atomic.Pointer[ownSVID]
	trust      *cache.Trust           // from the disk, for Run
	remembered storedSeen             // likewise
	opened     atomic.Pointer[[]byte] // what this run was told last of the CA's store
	// written is what seenFile holds; of one goroutine at a time.
	written     storedSeen
	seenFailing bool
	gotOwn      chan struct{}
	hurry       chan struct{} // the agent's own SVID is to be renewed sooner
	ackAgain    chan struct{}
	sawMore     chan struct{}
	links       *links
	logs        *logs
	successor   successor
	clockAhead  atomic.Pointer[time.Duration] // nil: not known yet
	endedSaid   atomic.Bool                   // the log says that the CA's certificate has ended
	notTaken    *x509svid.SVID                // of the agent, by which it does not come back; of one goroutine
	standing    *standing
	// firstWord is how long a replica may take to say something, where there
	// are others; lookAgain is about how often an agent of a stale replica looks
	// for another that is not.
	firstWord, lookAgain time.Duration

	saving sync.Mutex
	saved  uint64 // sequence number of the trust bundle on disk, guarded by saving
}

// ownSVID is the agent's own SVID.
type ownSVID struct {
	*x509svid.SVID
	renewAt time.Time
	// refused is why the CA does not take it any more; nil: it does.
	refused error
}

// valid says whether the SVID has not ended; the CA may refuse it all the same.
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
	if cfg.Durable == nil {
		cfg.Durable = func() uint64 { return math.MaxUint64 }
	}
	if cfg.PolicySeen == nil {
		cfg.PolicySeen = cfg.PolicyGeneration
	}
	c := &Client{
		cfg: cfg, caID: caID, firstWord: firstWord, lookAgain: lookForFresh, links: newLinks(),
		gotOwn: make(chan struct{}, 1), hurry: make(chan struct{}, 1), ackAgain: make(chan struct{}, 1), sawMore: make(chan struct{}, 1),
	}
	if c.trust, err = c.loadTrust(); err != nil {
		return nil, err
	}
	if c.trust != nil {
		c.saved = c.trust.Sequence
	}
	if c.remembered, err = c.loadSeen(); err != nil {
		return nil, err
	}
	c.written = c.remembered
	if c.logs, err = openLogs(cfg); err != nil {
		return nil, err
	}
	held, err := c.loadSVID()
	if err != nil {
		return nil, err
	}
	if held != nil && c.trust != nil {
		c.setOwn(held, held.Certificates[0].NotBefore)
		c.replaceOwn(c.trust, time.Now())
	}
	c.standing = newStanding(cfg.Addresses, cfg.Logger, cfg.Registerer)
	cfg.Registerer.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
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

// NotAfter is the end of the agent's own SVID, zero for none.
func (c *Client) NotAfter() time.Time {
	if own := c.own.Load(); own != nil {
		return own.notAfter()
	}
	return time.Time{}
}

// ClockAhead is by how much the node's clock was ahead of the CA's when that
// spoke last; at least, where delay could be all there is.
func (c *Client) ClockAhead() (ahead time.Duration, known bool) {
	if d := c.clockAhead.Load(); d != nil {
		return *d, true
	}
	return 0, false
}

// Ready says what keeps the agent from obtaining SVIDs, as far as its own
// identity goes.
func (c *Client) Ready() error {
	switch own := c.own.Load(); {
	case own == nil:
		return errors.New("the node is not attested yet")
	case !own.valid(time.Now()):
		return errors.New("the agent's own SVID has expired")
	case own.refused != nil:
		return own.refused
	}
	return nil
}

// Following says why no changes arrive from the CA, nil if they do.
func (c *Client) Following(picture *cache.Cache) error { return c.standing.fault(picture.State()) }

// Address is that of the replica that calls go to; "" while there is none.
func (c *Client) Address() string {
	if l := c.links.current(); l != nil {
		return l.address
	}
	return ""
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

// toCA is how the agent speaks to the CA's gRPC port: by TLS, and says so where clocks
// keep it from that.
func (c *Client) toCA(picture *cache.Cache) *tls.Config {
	cfg := c.TLS(picture).Client()
	cfg.VerifyConnection = c.timed(func(cs tls.ConnectionState, now time.Time) error {
		by := c.TLS(picture)
		by.Now = func() time.Time { return now }
		return by.Client().VerifyConnection(cs)
	})
	return cfg
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
	c.Recall(ctx, picture)
	var aside sync.WaitGroup
	defer c.links.end()
	aside.Go(func() { c.keepRenewed(ctx, picture) })
	aside.Go(func() { c.keepSeen(ctx, picture) })
	aside.Go(func() { c.logs.keep(ctx) })
	defer aside.Wait()
	t := newTour(c.cfg.Addresses)
	for ctx.Err() == nil {
		joined, err := c.session(ctx, picture, t.address(), t.patient())
		if ctx.Err() != nil {
			break
		}
		c.heedBan(ctx, picture, err)
		address := t.address()
		wait := t.next(joined, err)
		failures := max(t.failures-1, 0) // before this one
		if !onGoodTerms(err) {
			c.standing.parted(ctx, address, err, failures, wait)
		}
		if wait == 0 {
			continue
		}
		if failures > 0 {
			c.links.rest() // it takes longer: calls need not wait for it
		}
		if pause(ctx, wait) != nil {
			break
		}
	}
	return nil
}

// onGoodTerms says that a session ended although its connection is good: calls
// stay on it until there is another.
func onGoodTerms(err error) bool {
	return errors.Is(err, errRenewed) || errors.Is(err, errStale) || errors.Is(err, errLook)
}

// session attests the node if need be and then follows one Sync stream to its
// end. joined says that the CA answered and was in order.
func (c *Client) session(ctx context.Context, picture *cache.Cache, address string, patient bool) (joined bool, err error) {
	refused, err := c.prove(ctx, picture, address)
	if err != nil {
		return false, err
	}
	l := &link{address: address, dial: func(other string) (*grpc.ClientConn, error) {
		return dial(other, credentials.NewTLS(c.toCA(picture)))
	}}
	cc, err := dial(address, listening{credentials.NewTLS(c.toCA(picture)), &l.reads})
	if err != nil {
		return false, err
	}
	l.cc = cc
	// The stream belongs to this SVID; a newer one opens its own.
	drain(c.gotOwn)
	st := stream{Client: c, picture: picture, node: capb.NewNodeClient(cc), link: l, patient: patient, clock: newClock()}
	err = st.follow(ctx)
	st.stopLooking()
	c.heed(err)
	if refused != nil && err != nil && !st.joined {
		err = fmt.Errorf("%w; and %w", err, refused)
	}
	switch {
	case !st.joined:
		cc.Close()
	case !onGoodTerms(err):
		c.links.use(nil)
	}
	if errors.Is(err, errHangs) {
		cc.Close() // calls that wait for it are made again on the next one
	}
	return st.joined, err
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
