// Package agent is one node's agent: it proves the node to the CA, and answers
// for the workloads on it over a Unix socket. The CA may be away at any time,
// also at the start; the agent goes on with what it has.
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/caclient"
	"merlon.dev/agent/internal/datadir"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/extauthz"
	"merlon.dev/agent/internal/keeper"
	"merlon.dev/agent/internal/kubelet"
	"merlon.dev/agent/internal/local"
	"merlon.dev/agent/internal/policyfeed"
	"merlon.dev/agent/internal/sds"
	"merlon.dev/agent/internal/workload"
	"merlon.dev/agent/internal/workloadapi"
	"merlon.dev/ca/capb"
	"merlon.dev/policy/decisionlog"
	"merlon.dev/sdk/health"
	"merlon.dev/sdk/otel"
	"merlon.dev/sdk/seal"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/systemd"
	"merlon.dev/sdk/unixsock"
)

// Limits of the sockets. Whoever needs more streams opens them as another
// user.
const (
	maxStreamsPerUser = 1000
	// Opening a stream costs some 70 µs of CPU: who does nothing else takes a
	// seventh of a core, in the end.
	streamsPerSecond      = 2000
	streamsAtOnce         = 20_000
	maxConnectionsPerUser = 1000
	maxMessageBytes       = 1 << 20
	maxHeaderBytes        = 16 << 10
	bufferBytes           = 4 << 10 // of a connection, each way; an answer has 2 or 3 KiB
)

// Agent is a node's agent. Its methods are safe for concurrent use. Use New,
// then Run.
type Agent struct {
	cfg      Config
	log      *slog.Logger
	td       spiffeid.TrustDomain
	attestor *workload.Attestor
	dir      *datadir.Dir
	cache    *cache.Cache
	keeper   *keeper.Keeper
	client   *caclient.Client
	policy   *policyfeed.Feed
	local    *local.Server
	api      *workloadapi.Server
	sds      *sds.Server
	authz    *extauthz.Server
	health   *health.Server
	https    *http.Client // to the CA, as the agent
	// decisions are counted always, and written down where the settings say so.
	decisions   *decisionlog.Recorder
	decisionLog *decisionlog.Writer
	manager     *systemd.Manager // nil: none
	ready       chan struct{}

	mu            sync.Mutex
	healthAddress string // guarded by mu
}

// New checks the settings and reads what an earlier run left in the data
// directory. It does not touch the network.
func New(cfg Config) (*Agent, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	log, err := cfg.logger()
	if err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, log: log, td: td, health: health.New(log), ready: make(chan struct{})}
	if err := a.openDir(); err != nil {
		return nil, err
	}
	if err := a.openClient(); err != nil {
		return nil, err
	}
	if err := a.openCache(); err != nil {
		return nil, err
	}
	a.https = a.httpsClient()
	if err := a.openPolicy(); err != nil {
		return nil, err
	}
	if err := a.openDecisionLog(); err != nil {
		return nil, err
	}
	if a.attestor, err = workload.New(); err != nil {
		return nil, err
	}
	if err := a.openKubelet(); err != nil {
		return nil, err
	}
	a.buildServices()
	return a, nil
}

func (a *Agent) openDir() error {
	source, err := seal.FromSettings(a.cfg.KeyFile, a.cfg.KeyCredential, a.cfg.KeyPassphraseFile)
	if err != nil {
		return err
	}
	a.dir, err = datadir.Open(a.cfg.DataDir, a.td.Name(), source, a.log)
	return err
}

// openClient makes the connection to the CA.
func (a *Agent) openClient() (err error) {
	a.client, err = caclient.New(caclient.Config{
		TrustDomain: a.td, Addresses: a.cfg.CAAddress, DataDir: a.dir,
		Attestor: a.cfg.attestor(), Recover: a.cfg.goodOnce(), RootHash: a.cfg.RootHash,
		OnPolicyBundle:   func(pb *capb.PolicyBundle) { a.policy.Announce(pb) },
		PolicyGeneration: func() uint64 { return a.policy.Generation() },
		PolicySeen:       func() uint64 { return a.policy.Seen() },
		PolicyReports:    func() caclient.PolicyReports { return a.local },
		RevocationMaxAge: a.cfg.RevocationMaxAge, PolicyStaleAfter: a.cfg.PolicyStaleAfter,
		Durable: func() uint64 { return a.keeper.Revision() },
		Logger:  a.log, Registerer: a.health.Registry(),
	})
	return err
}

// openCache takes up the picture of the node that an earlier run left.
func (a *Agent) openCache() error {
	ctx := context.Background()
	a.cache = cache.New(cache.Options{
		TrustDomain: a.td, Authority: a.client, Logger: a.log, Registerer: a.health.Registry(),
		OnIdentity: func(id spiffeid.ID) {
			if a.policy != nil { // there is none while what was kept is taken up
				a.policy.Need(id.String())
			}
		},
	})
	a.client.Recall(ctx, a.cache)
	a.keeper = keeper.New(keeper.Config{
		Dir: a.dir, Cache: a.cache, TrustDomain: a.td.Name(), AgentID: func() string { return a.client.ID().String() },
		Secrets: a.cfg.CacheKeys == keysSealed, Logger: a.log, Registerer: a.health.Registry(),
	})
	return a.keeper.Load(ctx)
}

func (a *Agent) openPolicy() (err error) {
	a.policy, err = policyfeed.New(context.Background(), policyfeed.Config{
		Name: a.cfg.PolicyBundle, TrustDomain: a.td.Name(), DataDir: a.dir,
		URLs: func(candidate bool) []string {
			if candidate {
				return a.httpsURLs("/v1/policy/candidates/" + a.cfg.PolicyBundle)
			}
			return a.httpsURLs("/v1/policy/bundles/" + a.cfg.PolicyBundle)
		},
		Destinations: a.destinations,
		Heard:        a.cache.Heard,
		StaleAfter:   a.cfg.PolicyStaleAfter, MaxAge: a.cfg.PolicyMaxAge, DenyStale: a.cfg.PolicyOnStale == onDeny,
		HTTP:     a.https,
		OnChange: a.policyChanged,
		Logger:   a.log, Registerer: a.health.Registry(),
	})
	return err
}

// destinations are the SPIFFE IDs whose calls this agent decides, each once: those of the
// node's services, and its own.
func (a *Agent) destinations() []string {
	ids := a.cache.Identities(time.Now())
	own := a.client.ID().String()
	if _, listed := slices.BinarySearch(ids, own); own == "" || listed {
		return ids
	}
	return append(ids, own)
}

// policyChanged has the CA told of it.
func (a *Agent) policyChanged() {
	a.client.AckAgain()
	if a.local != nil { // there is none while what was kept is taken up
		a.local.PolicyChanged()
	}
}

// openKubelet lets the attestor ask the kubelet, where there is one.
func (a *Agent) openKubelet() (err error) {
	if a.cfg.KubeletAddress == "" {
		return nil
	}
	a.attestor.Kubelet, err = kubelet.New(kubelet.Config{
		Address: a.cfg.KubeletAddress, TokenFile: a.cfg.KubeletTokenFile, CAFile: a.cfg.KubeletCAFile, Logger: a.log,
	})
	return err
}

// httpsURLs are where the CA has path: first at the replica that the agent follows,
// because it is the one that announces policy bundles.
func (a *Agent) httpsURLs(path string) []string {
	urls := make([]string, 0, len(a.cfg.CAHTTPSAddress))
	for _, host := range a.cfg.CAHTTPSAddress {
		urls = append(urls, (&url.URL{Scheme: "https", Host: host, Path: path}).String())
	}
	if i := slices.Index(a.cfg.CAAddress, a.client.Address()); i > 0 && i < len(urls) {
		urls[0], urls[i] = urls[i], urls[0]
	}
	return urls
}

func (a *Agent) buildServices() {
	callers := &endpoint.Callers{Attestor: a.attestor, Cache: a.cache}
	a.api = workloadapi.New(callers, a.td, a.log)
	a.sds = sds.New(callers, a.td, a.log)
	a.local = local.New(local.Options{
		Callers: callers, EngineOf: a.policy.Of, ExplainHeaders: a.cfg.ExplainHeaders, Decisions: a.decisions, AgentID: a.client.ID,
		Policy: a.policy.Now, PolicyChanged: a.policy.Changed, PolicyFault: a.policy.Fault, PolicyName: a.cfg.PolicyBundle,
		RevocationMaxAge: a.cfg.RevocationMaxAge, DenyStale: a.cfg.OnStale == onDeny, Status: a.status,
		PolicyAsOf: a.policy.AsOf, PolicyMaxAge: a.cfg.PolicyMaxAge, DenyStalePolicy: a.cfg.PolicyOnStale == onDeny,
		Logger: a.log, Registerer: a.health.Registry(),
	})
	a.authz = extauthz.New(extauthz.Options{
		Callers: callers, Decide: a.local.Decide, Refuse: a.local.Refuse, Logger: a.log, Registerer: a.health.Registry(),
	})
	a.health.Check("identity", a.client.Ready)
	a.health.Check("sync", func() error { return a.client.Following(a.cache) })
}

// Ready returns a channel that is closed once the agent answers for the node: its
// sockets are open, and it has the node's entries, from the CA or, after a
// restart, from its disk.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// Debug explains identities and decisions, as the admin socket does.
func (a *Agent) Debug() agentpb.DebugServer { return a.local }

// HealthAddress is where /live, /ready and /metrics are served, once Run has
// opened it; empty before, and when it is off.
func (a *Agent) HealthAddress() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.healthAddress
}

// Run serves until ctx ends, and returns nil then. It fails only if a socket
// cannot be opened; that the CA is away is no failure. Call it once.
func (a *Agent) Run(ctx context.Context) error {
	defer a.attestor.Close()
	lock, err := a.dir.Lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	passed, err := a.meetManager()
	if err != nil {
		return err
	}
	defer passed.Close()
	if a.cfg.Supervised { // one process has one exporter
		defer otel.Start(a.log, a.health.Registry())()
	}
	defer a.writeDecisions(ctx)()
	group, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, a.manager.Stopping)()
	// The sockets first: workloads may start before the CA answers.
	if err := a.serveSockets(ctx, group, passed); err != nil {
		// Whatever is served already ends with the group's context.
		group.Go(func() error { return err })
		return group.Wait()
	}
	group.Go(func() error { return a.cache.Run(ctx) })
	group.Go(func() error { return a.keeper.Run(ctx) })
	group.Go(func() error { return a.client.Run(ctx, a.cache) })
	group.Go(func() error { return a.policy.Run(ctx) })
	group.Go(func() error { return a.local.Run(ctx) })
	group.Go(func() error { a.announceReady(ctx); return nil })
	group.Go(func() error { a.manager.Watch(ctx, a.alive); return nil })
	group.Go(func() error { a.manager.Hangups(ctx); return nil })
	err = group.Wait()
	a.client.WriteSeen(context.WithoutCancel(ctx), a.cache) // what the keeper wrote last is on the disk now
	return err
}

func (a *Agent) serveSockets(ctx context.Context, group *errgroup.Group, passed systemd.Sockets) error {
	if !unixsock.Exact() {
		a.log.LogAttrs(ctx, slog.LevelWarn, "workloads are attested in a weaker mode: the kernel does not name the process at a socket (Linux 6.5 or later does), so one whose number is given to another before its connection is accepted is taken for the other")
	}
	public, err := listen(a.cfg.PublicSocket, unixsock.Public, passed)
	if err != nil {
		return fmt.Errorf("open the public socket: %w", err)
	}
	if err := unixsock.Passable(a.cfg.PublicSocket); err != nil && a.cfg.Supervised {
		a.log.LogAttrs(ctx, slog.LevelWarn, "the public socket is not for every user", slog.Any("err", err))
	}
	a.serve(ctx, group, a.publicServer, public)
	admin, err := listen(a.cfg.AdminSocket, adminAccess(a.cfg.AdminUIDs), passed)
	if err != nil {
		return fmt.Errorf("open the admin socket: %w", err)
	}
	a.serve(ctx, group, a.adminServer, admin)
	if a.cfg.HealthAddress != healthOff {
		lis, err := net.Listen("tcp", a.cfg.HealthAddress)
		if err != nil {
			return fmt.Errorf("open the health port: %w", err)
		}
		a.mu.Lock()
		a.healthAddress = lis.Addr().String()
		a.mu.Unlock()
		group.Go(func() error { return a.health.Serve(ctx, lis) })
	}
	a.log.LogAttrs(ctx, slog.LevelInfo, "agent serves", slog.String("trust_domain", a.td.Name()),
		slog.String("public_socket", a.cfg.PublicSocket), slog.String("admin_socket", a.cfg.AdminSocket))
	return nil
}

// serve runs a server, whose connections are limited, on lis until ctx ends.
func (a *Agent) serve(ctx context.Context, group *errgroup.Group, server func(*endpoint.Limit) *grpc.Server, lis net.Listener) {
	connections := endpoint.NewLimit(maxConnectionsPerUser)
	group.Go(func() error { return endpoint.Serve(ctx, server(connections), lis, connections.Cut, a.log) })
}

func (a *Agent) publicServer(connections *endpoint.Limit) *grpc.Server {
	s := grpc.NewServer(slices.Concat(limits(), otel.ServerOptions(), []grpc.ServerOption{
		grpc.Creds(connections.Credentials(a.attestor.Meet)),
		grpc.InTapHandle(endpoint.NewLimit(maxStreamsPerUser).Tap(endpoint.NewRate(streamsPerSecond, streamsAtOnce))),
		grpc.ChainUnaryInterceptor(endpoint.Unary),
		grpc.ChainStreamInterceptor(endpoint.Stream),
	})...)
	workloadpb.RegisterSpiffeWorkloadAPIServer(s, a.api)
	secretv3.RegisterSecretDiscoveryServiceServer(s, a.sds)
	authv3.RegisterAuthorizationServer(s, a.authz)
	agentpb.RegisterLocalServer(s, a.local)
	healthgrpc.RegisterHealthServer(s, a.health.GRPC())
	reflection.Register(s)
	return s
}

func (a *Agent) adminServer(connections *endpoint.Limit) *grpc.Server {
	unary, stream := endpoint.Admins(a.cfg.AdminUIDs)
	s := grpc.NewServer(slices.Concat(limits(), otel.ServerOptions(), []grpc.ServerOption{
		// Where admin_uids are set, others can connect and are refused call by call.
		grpc.Creds(connections.Credentials(func(*unixsock.Peer) {})),
		grpc.InTapHandle(endpoint.NewLimit(maxStreamsPerUser).Tap(nil)),
		grpc.ChainUnaryInterceptor(unary), grpc.ChainStreamInterceptor(stream),
	})...)
	agentpb.RegisterDebugServer(s, a.local)
	healthgrpc.RegisterHealthServer(s, a.health.GRPC())
	reflection.Register(s)
	return s
}

func limits() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		// Each process has a connection, and most of them nothing to say.
		grpc.ReadBufferSize(bufferBytes), grpc.WriteBufferSize(bufferBytes),
		grpc.MaxConcurrentStreams(maxStreamsPerUser),
		grpc.ConnectionTimeout(svid.HandshakeTimeout),
	}
}

// announceReady closes ready when the agent is in sync for the first time.
func (a *Agent) announceReady(ctx context.Context) {
	sub := a.cache.Subscribe()
	defer sub.Close()
	for {
		if s := a.cache.State(); s.Synced {
			close(a.ready)
			a.manager.Ready(fmt.Sprintf("serving %d entries of %s", s.Entries, a.td.Name()))
			a.log.LogAttrs(ctx, slog.LevelInfo, "agent ready", slog.Int("entries", s.Entries))
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-sub.Woken():
		}
	}
}

// adminAccess lets other users reach the admin socket only where some of them
// are administrators; the server then asks each who it is.
func adminAccess(uids []uint32) unixsock.Access {
	if len(uids) > 0 {
		return unixsock.Shared
	}
	return unixsock.Private
}
