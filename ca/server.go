// The CA's life: open everything, serve, and on the way out stop taking work,
// drain, and close the store last.

package ca

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"

	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/files"
	"merlon.dev/ca/internal/nested"
	"merlon.dev/ca/internal/opening"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/report"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/ca/internal/web"
	"merlon.dev/sdk/durable"
	"merlon.dev/sdk/health"
	"merlon.dev/sdk/otel"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/unixsock"
)

const (
	// maxConnections is per port: 10 000 agents with a second connection while
	// they renew.
	maxConnections = 25_000
	drainTimeout   = 5 * time.Second
	// storePatience is how long a CA that starts waits for a store that cannot be
	// reached, before it fails and says so.
	storePatience = time.Minute
	storeAttempt  = 4 * time.Second
	storeRetry    = 2 * time.Second
)

// Server is a CA. Its methods are safe for concurrent use.
type Server struct {
	cfg   Config
	td    spiffeid.TrustDomain
	log   *slog.Logger
	ready chan struct{}

	alone bool // the process is the CA's: it has the exporter of metrics and traces
	// Set before ready is closed.
	address, httpsAddress, healthAddress net.Addr
	bundleAddress                        net.Addr // nil: there is no bundle endpoint
	root                                 *x509.Certificate
}

// New makes a CA from cfg. It opens nothing: Run does.
func New(cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	cfg = cfg.WithDefaults()
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("configuration: trust_domain: %w", err)
	}
	return &Server{cfg: cfg, td: td, log: cfg.Logger, ready: make(chan struct{})}, nil
}

// Ready is closed once the CA serves on all its addresses.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Address is where gRPC is served. Call it after Ready.
func (s *Server) Address() net.Addr { return s.address }

// HTTPSAddress is where bundles are served. Call it after Ready.
func (s *Server) HTTPSAddress() net.Addr { return s.httpsAddress }

// BundleAddress is where the bundle endpoint is served; nil: there is none. Call it
// after Ready.
func (s *Server) BundleAddress() net.Addr { return s.bundleAddress }

// HealthAddress is where health and metrics are served. Call it after Ready.
func (s *Server) HealthAddress() net.Addr { return s.healthAddress }

// AdminSocket is the absolute path of the admin socket.
func (s *Server) AdminSocket() string { return s.cfg.AdminSocket }

// Root is the root certificate. Call it after Ready.
func (s *Server) Root() *x509.Certificate { return s.root }

// Run serves until ctx ends and returns nil after a clean stop. Call it once.
func (s *Server) Run(ctx context.Context) (err error) {
	p, err := s.open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	if s.alone {
		defer otel.Start(s.log, p.health.Registry())()
	}
	l, err := s.listen()
	if err != nil {
		return err
	}
	return s.serve(ctx, p, l)
}

// parts are what the CA is made of once it is open.
type parts struct {
	store    store.Store
	opening  api.Opening
	audit    *audit.Log
	newLog   bool // it held no record at the start
	keysLock io.Closer
	keys     *upstream.Keys
	domain   trust.Domain
	registry *registry.Registry
	policy   *policyKeys
	// authorities takes the steps of rotation.
	authorities *authorities
	releases    *release.Publisher
	statuses    report.Statuses
	decisions   *report.Log
	service     *api.Service
	own         *ownSVID
	publicTLS   *tls.Config // of the bundle endpoint, where there is one
	// mirror, realm and above are a nested CA's.
	mirror  *nested.Mirror
	realm   uint32
	above   *above
	health  *health.Server
	log     *slog.Logger
	overdue overdue // of the leader
	// storeFault is what the last look at the store said.
	storeFault atomic.Pointer[error]

	x509SVIDTTL, intermediateTTL time.Duration
}

// close closes the store last: everything else may still want to write.
func (p *parts) close() error {
	var errs []error
	if p.keys != nil {
		errs = append(errs, p.keys.Close())
	}
	if p.keysLock != nil {
		errs = append(errs, p.keysLock.Close())
	}
	if p.audit != nil {
		errs = append(errs, p.audit.Close())
	}
	if p.store != nil {
		errs = append(errs, p.store.Close())
	}
	return errors.Join(errs...)
}

func (s *Server) open(ctx context.Context) (_ *parts, err error) {
	p := &parts{log: s.log, overdue: make(overdue), x509SVIDTTL: s.cfg.X509SVIDTTL, intermediateTTL: s.cfg.IntermediateTTL} // no named result: the returns below would make it nil before close
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	if err := openDataDir(s.cfg.DataDir); err != nil {
		return nil, err
	}
	if err := opening.CheckOwners(s.cfg); err != nil {
		return nil, err
	}
	if p.store, err = s.openStore(ctx); err != nil {
		return nil, err
	}
	if p.opening, err = openingOf(ctx, s.cfg, p.store); err != nil {
		return nil, err
	}
	if err := p.openAudit(s.cfg); err != nil {
		return nil, err
	}
	if err := p.settleEpoch(ctx, s.cfg); err != nil {
		return nil, err
	}
	if err := s.openKeys(ctx, p); err != nil {
		return nil, err
	}
	if err := p.noteStore(ctx, s.cfg); err != nil {
		return nil, err
	}
	if err := p.recordFirst(ctx, time.Now()); err != nil {
		return nil, err
	}
	if err := p.publishLog(s.td); err != nil {
		return nil, err
	}
	if p.registry, err = registry.Open(ctx, p.store, s.log); err != nil {
		return nil, err
	}
	p.authorities.registry = p.registry
	p.policy = &policyKeys{realm: p.realm, trustDomain: s.td.Name(), keys: p.keys, registry: p.registry}
	p.releases = s.publisher(p.store, p.policy)
	p.resealFormer(ctx, time.Now())
	p.enterEpoch(ctx, time.Now())
	return p, s.assemble(ctx, p)
}

// openDataDir makes the folder of the keys, and refuses one that others can
// write: they could put their own keys there.
func openDataDir(dir string) error {
	if err := durable.MakeDir(dir, 0o700); err != nil {
		return fmt.Errorf("make data_dir: %w", err)
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("open data_dir: %w", err)
	}
	if fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("open data_dir: %s has mode %04o, which lets others write: chmod it to 0700", dir, fi.Mode().Perm())
	}
	return nil
}

// openStore keeps trying while an etcd cannot be reached: machines of a rack
// start in any order.
func (s *Server) openStore(ctx context.Context) (store.Store, error) {
	deadline := time.Now().Add(storePatience)
	for {
		attempt, cancel := context.WithTimeout(ctx, storeAttempt)
		st, err := opening.Served(attempt, s.cfg)
		cancel()
		if !unreachable(err) || ctx.Err() != nil {
			return st, err
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%w: it could not be reached for %s: %v", store.ErrUnavailable, storePatience, err)
		}
		s.log.LogAttrs(ctx, slog.LevelWarn, "store cannot be reached yet, the CA waits for it",
			slog.Any("err", err), slog.Time("until", deadline))
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(storeRetry):
		}
	}
}

// assemble makes what serves.
func (s *Server) assemble(ctx context.Context, p *parts) error {
	p.health = health.New(s.log)
	uids, err := s.cfg.UIDRoles()
	if err != nil {
		return err
	}
	tokens, err := s.cfg.AdminTokens(s.log)
	if err != nil {
		return err
	}
	attestors, err := s.cfg.NodeAttestors.Open(s.td, s.log)
	if err != nil {
		return err
	}
	options := api.Options{
		TrustDomain: s.td, Store: p.store, StoreKind: s.cfg.Store, Opening: p.opening, Registry: p.registry, Keys: p.keys, Releases: p.releases, Audit: p.audit,
		ReplicaName: p.keys.Name(), Reseal: p.reseal,
		Authorities: p.authorities, Domain: p.domain, Rotation: s.cfg.Rotation(), JWTKeyTTL: s.cfg.JWTKeyTTL,
		Log: s.log, Metrics: p.health.Registry(), UIDs: uids, FourEyes: s.cfg.FourEyes, Tokens: tokens, Attestors: attestors,
		X509SVIDTTL: s.cfg.X509SVIDTTL, JWTSVIDTTL: s.cfg.JWTSVIDTTL, AgentSVIDTTL: s.cfg.AgentSVIDTTL, AgentRecovery: s.cfg.AgentRecovery,
		JWTIssuer: s.cfg.JWTIssuer, JWTMaxAudiences: s.cfg.JWTMaxAudiences, IssueRate: s.cfg.AgentIssueRate, Realm: p.realm, Canary: s.cfg.CanaryLimits(), Statuses: &p.statuses,
	}
	if p.keys.HoldsRoot() && !p.keys.HasUpstream() {
		options.Root = p.keys
	}
	if p.mirror != nil {
		p.above = s.above(p)
		options.UpstreamAge = p.above.age
	}
	if err := p.askForSecond(ctx, s.cfg.FourEyes); err != nil {
		return err
	}
	p.service = api.New(options)
	p.service.RememberKeys(ctx, time.Now())
	p.authorities.caughtUp = p.service.NoteRenewals
	p.own = &ownSVID{
		realm: p.realm, td: s.td, dnsNames: s.cfg.DNSNames, keys: p.keys, registry: p.registry, audit: p.audit, standing: p.service.Standing,
	}
	if err := p.own.renew(ctx, time.Now()); err != nil {
		return err
	}
	if p.above != nil {
		p.above.own, p.authorities.above = p.own, p.above
		p.above.watch(p.health)
	}
	if s.cfg.BundleEndpoint.Address != "" {
		if p.publicTLS, err = s.cfg.EndpointTLS(s.log); err != nil {
			return err
		}
	}
	if err := p.openReports(s.cfg); err != nil {
		return err
	}
	p.checkReadiness()
	p.authorities.lastCalls = newLastCalls(p.health.Registry())
	watchKeys(p.health.Registry(), p.keys)
	p.health.Registry().MustRegister(pendingSteps{p.authorities}, federations{p.registry})
	s.root = p.keys.X509().Root
	return nil
}

// listeners are the bound addresses; public is nil where there is no bundle endpoint.
type listeners struct{ grpc, https, public, health, admin net.Listener }

func (s *Server) listen() (l *listeners, err error) {
	l = &listeners{}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	for _, tcp := range []struct {
		key, address string
		to           *net.Listener
	}{
		{"address", s.cfg.Address, &l.grpc},
		{"https_address", s.cfg.HTTPSAddress, &l.https},
		{"health_address", s.cfg.HealthAddress, &l.health},
	} {
		lis, err := net.Listen("tcp", tcp.address)
		if err != nil {
			return l, fmt.Errorf("%s: %w", tcp.key, err)
		}
		*tcp.to = netutil.LimitListener(files.Keep(noticing{lis}, files.Kept, s.log), maxConnections)
	}
	if err := s.listenPublic(l); err != nil {
		return l, err
	}
	if l.admin, err = unixsock.Listen(s.cfg.AdminSocket, s.cfg.AdminAccess()); err != nil {
		return l, fmt.Errorf("admin_socket: %w", err)
	}
	l.admin = files.Keep(l.admin, files.Kept/2, s.log)
	s.address, s.httpsAddress, s.healthAddress = l.grpc.Addr(), l.https.Addr(), l.health.Addr()
	return l, nil
}

// listenPublic is for the bundle endpoint, where there is one.
func (s *Server) listenPublic(l *listeners) error {
	address := s.cfg.BundleEndpoint.Address
	if address == "" {
		return nil
	}
	lis, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("bundle_endpoint.address: %w", err)
	}
	l.public = files.Keep(noticing{lis}, files.Kept, s.log) // web bounds them, by address, too
	s.bundleAddress = lis.Addr()
	return nil
}

func (l *listeners) close() {
	for _, lis := range []net.Listener{l.grpc, l.https, l.public, l.health, l.admin} {
		if lis != nil {
			lis.Close()
		}
	}
}

// serve runs everything. The inner group, what the servers rest on, ends after
// the servers have: a call that is being drained still waits for the registry.
func (s *Server) serve(ctx context.Context, p *parts, l *listeners) error {
	inner, stopInner := context.WithCancel(context.WithoutCancel(ctx))
	defer stopInner()
	base, inner := errgroup.WithContext(inner)
	base.Go(func() error { return p.registry.Run(inner) })
	base.Go(func() error { return p.own.run(inner, s.log) })
	base.Go(func() error { return p.watchStore(inner) })
	base.Go(func() error { return p.maintain(inner) })
	base.Go(func() error { p.decisions.Run(inner); return nil })
	base.Go(func() error { return p.lead(inner) })
	base.Go(func() error { return p.tendRollouts(inner) })
	base.Go(func() error { p.service.KeepReaders(inner); return nil })
	if s.cfg.Store == config.Etcd { // Badger's is locked
		base.Go(func() error { return p.holdName(inner, store.CampaignTTL) })
		base.Go(func() error { return p.beHeard(inner, heardTTL(s.cfg.AgentSVIDTTL)) })
	}
	base.Go(func() error { return p.authorities.run(inner, p.service.Standing) })
	if p.above != nil {
		base.Go(func() error { return p.above.run(inner) })
	}

	outer, stopOuter := context.WithCancel(ctx)
	defer stopOuter()
	stopWithBase := context.AfterFunc(inner, stopOuter) // a part that fails ends all
	defer stopWithBase()
	servers, outer := errgroup.WithContext(outer)
	s.startServers(outer, servers, p, l)
	close(s.ready)
	s.log.LogAttrs(ctx, slog.LevelInfo, "CA serves", slog.String("trust_domain", s.td.Name()),
		slog.String("address", s.address.String()), slog.String("https_address", s.httpsAddress.String()),
		slog.String("admin_socket", s.cfg.AdminSocket))
	err := servers.Wait()
	stopInner()
	return errors.Join(err, base.Wait())
}

func (s *Server) startServers(ctx context.Context, g *errgroup.Group, p *parts, l *listeners) {
	tlsGRPC := s.tlsConfig(p, "h2")
	extra := append([]func(grpc.ServiceRegistrar){func(r grpc.ServiceRegistrar) {
		healthgrpc.RegisterHealthServer(r, p.health.GRPC())
	}}, s.cfg.AdminServices...)
	serveGRPC(ctx, g, p, p.service.TLSServer(tlsGRPC), l.grpc)
	serveGRPC(ctx, g, p, p.service.SocketServer(extra...), l.admin)
	pages := web.New(web.Options{
		Service: p.service, Registry: p.registry, Store: p.store, Audit: p.audit, Log: s.log, Statuses: &p.statuses, Decisions: p.decisions,
		Bundles: bundles{p.releases, p.registry, p.service, &shares{policy: p.policy}}.handler(s.log),
	})
	g.Go(func() error { return pages.Serve(ctx, l.https, s.tlsConfig(p, "h2", "http/1.1")) })
	if l.public != nil {
		public := &web.Public{Registry: p.registry, Issuer: s.cfg.JWTIssuer, Service: p.service, Log: s.log}
		g.Go(func() error { return public.Serve(ctx, l.public, p.publicTLS) })
	}
	g.Go(func() error { return p.health.Serve(ctx, l.health) })
}

func (s *Server) tlsConfig(p *parts, protos ...string) *tls.Config {
	return svid.TLS{
		SVIDs: p.own, Bundles: p.registry, Verifier: p.registry,
		// Whoever has an SVID of the trust domain may connect; each call is
		// judged by itself.
		Admit:          func(*svid.Peer) error { return nil },
		AnonymousPeers: true, IncludeRoot: true, NextProtos: protos,
	}.Server()
}

// serveGRPC serves until ctx ends, then ends the streams, lets calls finish
// and after a while cuts them.
func serveGRPC(ctx context.Context, g *errgroup.Group, p *parts, srv *grpc.Server, lis net.Listener) {
	g.Go(func() error {
		if err := srv.Serve(lis); !errors.Is(err, grpc.ErrServerStopped) { // the stop was faster
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		p.service.StopStreams()
		p.health.Stop()
		cut := time.AfterFunc(drainTimeout, srv.Stop)
		defer cut.Stop()
		srv.GracefulStop()
		return nil
	})
}
