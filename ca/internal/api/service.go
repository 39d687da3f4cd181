// Package api is the CA's gRPC side: Node for agents, Admin for operators,
// Replica for other replicas of the CA, Nested for CAs below it.
// Every call passes one table that says who may make it; every issuance,
// refusal and administrative act leaves an audit record before its answer.
package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/oidc"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/report"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/rollout"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/otel"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/unixsock"
)

// Limits of a connection (SECURITY.md T38).
const (
	maxMessageBytes = 5 << 20 // a policy bundle has up to 4 MiB
	maxHeaderBytes  = 16 << 10
	maxStreams      = 100             // per connection
	pingInterval    = 2 * time.Minute // a peer whose machine is gone the kernel notices
	pingTimeout     = 10 * time.Second
	minClientPing   = 10 * time.Second
	maxIdle         = 5 * time.Minute // without a call: agents have their Sync
	readBufferBytes = 4 << 10         // of ten thousand connections: what comes in is short
)

// Keys is what the service needs of the CA's keys; *upstream.Keys has it. The
// authorities that it returns are immutable.
type Keys interface {
	X509() *authority.X509Authority
	JWT() *authority.JWTAuthority
	// HoldsJWT says whether a JWT key of that ID is here.
	HoldsJWT(kid string) bool
	// Anchors are the CA's own roots, which vouch for policy keys. It trusts them by
	// itself, not by what the store says.
	Anchors() []*x509.Certificate
	// HasUpstream says whether somebody else's CA signs our intermediates.
	HasUpstream() bool
}

// Authorities takes the steps of rotation. Refusals are *rotation.RefusedError,
// rotation.ErrUnknown or statuses.
type Authorities interface {
	// Prepare makes a key of the given kind and publishes it. It returns its ID.
	Prepare(ctx context.Context, kind rotation.Kind) (id string, revision uint64, err error)
	// Take takes one step of an authority that is there.
	Take(ctx context.Context, c rotation.Command) (revision uint64, err error)
	// TakeFor takes one step of a JWT key that is the named replica's, and of no
	// other authority.
	TakeFor(ctx context.Context, replica string, c rotation.Command) (revision uint64, err error)
}

// Options are the parts of a Service. All are required but UIDs, FourEyes, Attestors, Tokens,
// Root where the root's key is, and Realm and UpstreamAge on a nested CA.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Store       store.Store
	StoreKind   string  // "badger" or "etcd", for backups
	Opening     Opening // zero where others write the store, too
	Registry    *registry.Registry
	Keys        Keys
	Authorities Authorities
	// Domain is how the authorities are stored, Rotation how they are judged.
	Domain   trust.Domain
	Rotation rotation.Policy
	Releases *release.Publisher
	// Canary says when a canary is paused.
	Canary rollout.Limits
	// Statuses are what stock OPAs say of themselves; nil: none is taken.
	Statuses *report.Statuses
	// ReplicaName is the name of this replica.
	ReplicaName string
	// Root is nil on a replica that does not hold the root key.
	Root RootKeys
	// Realm is by what serial numbers and revocations name the store; 0 but on a
	// nested CA. There UpstreamAge says how long ago the CA above was heard.
	Realm       uint32
	UpstreamAge func(now time.Time) time.Duration
	// Reseal signs the current policy bundles that another replica's key signed
	// with our own, and returns the new heads.
	Reseal  func(context.Context, replica.PolicyKey) ([]*release.Head, error)
	Audit   *audit.Log
	Log     *slog.Logger
	Metrics prometheus.Registerer
	// UIDs are the roles of users on the admin socket, beside root and the CA's
	// own user.
	UIDs map[uint32]role.Role
	// FourEyes: acts on the CA's keys wait for a second administrator. Where one of
	// several replicas has it, all do so (package approval).
	FourEyes bool
	// Attestors prove nodes, beside join tokens.
	Attestors attest.Attestors
	// Tokens judges the tokens of OIDC issuers; nil: none is configured.
	Tokens *oidc.Verifier
	// Defaults for entries that name no TTL, and the TTL of agents.
	X509SVIDTTL, JWTSVIDTTL, AgentSVIDTTL time.Duration
	// AgentRecovery is how long after it was issued an agent's X509-SVID brings it
	// back, at most entry.MaxSVIDTTL.
	AgentRecovery time.Duration
	// JWTIssuer is what JWT-SVIDs say in iss; optional.
	JWTIssuer string
	// JWTMaxAudiences is how many audiences one JWT-SVID may have.
	JWTMaxAudiences int
	// IssueRate is how many SVIDs a second an agent without entries may have.
	IssueRate int
	// JWTKeyTTL is how long the JWT key of a new replica lives.
	JWTKeyTTL time.Duration
}

// Service implements the Node, Admin, Replica and Nested services. It is safe for concurrent
// use.
type Service struct {
	capb.UnimplementedNodeServer
	capb.UnimplementedAdminServer
	capb.UnimplementedReplicaServer
	capb.UnimplementedNestedServer

	opts     Options
	registry *registry.Registry
	access   access // of the RPCs that the protos declare
	log      *slog.Logger
	metrics  *metrics
	calls    calls
	// readers came by for the trust bundle. judging holds a token for each document of
	// another trust domain that is judged.
	readers readers
	judging chan struct{}
	// shares bounds whose refusals are written down.
	shares *shares
	// quota bounds what is issued to whom.
	quota *quota
	// unread bounds what is on its way to whom.
	unread *unread
	// proving is held by who reads the whole log.
	proving   chan struct{}
	announced announcement
	// evidence bounds how often the log says that the store was put back.
	evidence *rate.Sometimes

	// These are the constants, but in tests.
	takeTimeout time.Duration
	roomBytes   int

	// keys knows whose the public keys are that were signed here.
	keys *authority.KeyUse

	unnoted *unnoted
	rollout *rollout.Board
	// keeping holds a token for each acknowledgement that is being written.
	keeping  chan struct{}
	reach    *reach
	pulse    pulse
	turns    *turns
	stopping chan struct{}
	stop     sync.Once
}

// New makes a service.
func New(o Options) *Service {
	keys := authority.NewKeyUse(authority.MaxKeys)
	s := &Service{
		opts: o, registry: o.Registry, access: accessTable(), log: o.Log,
		metrics:     newMetrics(o.Metrics, o.Registry, keys),
		keys:        keys,
		calls:       newCalls(),
		shares:      newShares(),
		quota:       newQuota(o.IssueRate),
		unread:      newUnread(),
		takeTimeout: takeTimeout,
		roomBytes:   roomBytes,
		proving:     make(chan struct{}, 1),
		judging:     make(chan struct{}, judgingAtOnce),
		evidence:    evidenceLog(),
		unnoted:     newUnnoted(),
		keeping:     make(chan struct{}, maxKeeping),
		reach:       newReach(),
		turns:       newTurns(),
		stopping:    make(chan struct{}),
		rollout:     rollout.NewBoard(),
	}
	s.policyMetrics(o.Metrics)
	return s
}

// StopStreams ends the Sync streams, so that a graceful stop of the servers
// ends.
func (s *Service) StopStreams() { s.stop.Do(func() { close(s.stopping) }) }

// TLSServer returns the server of the TLS port, on which agents and
// administrators with an SVID call.
func (s *Service) TLSServer(cfg *tls.Config) *grpc.Server {
	srv := grpc.NewServer(append(s.serverOptions(accessTable()), grpc.Creds(s.newServerCreds(cfg)),
		grpc.ReadBufferSize(readBufferBytes))...)
	capb.RegisterNodeServer(srv, s)
	capb.RegisterAdminServer(srv, s)
	capb.RegisterReplicaServer(srv, s)
	capb.RegisterNestedServer(srv, s)
	return srv
}

// SocketServer returns the server of the admin socket. The services that
// extra registers there are for operators, all of their RPCs; they change nothing
// of the CA's.
func (s *Service) SocketServer(extra ...func(grpc.ServiceRegistrar)) *grpc.Server {
	table := accessTable()
	srv := grpc.NewServer(append(s.serverOptions(table), grpc.Creds(unixsock.ServerCredentials()))...)
	capb.RegisterAdminServer(srv, s)
	for _, register := range extra {
		register(srv)
	}
	for name, info := range srv.GetServiceInfo() {
		if name == capb.Admin_ServiceDesc.ServiceName {
			continue
		}
		for _, m := range info.Methods {
			table["/"+name+"/"+m.Name] = rule{callers: []capb.Caller{capb.Caller_CALLER_ADMIN}, roles: []role.Name{role.Operator}, reads: true}
		}
	}
	return srv
}

// accessTable is a fresh one for each server, because one of them adds to it.
func accessTable() access {
	return accessOf(capb.File_ca_capb_node_proto, capb.File_ca_capb_admin_proto, capb.File_ca_capb_replica_proto, capb.File_ca_capb_nested_proto)
}

// door is what every call on one server passes.
type door struct {
	*Service
	access access
}

func (s *Service) serverOptions(table access) []grpc.ServerOption {
	d := door{s, table}
	return append(otel.ServerOptions(),
		grpc.ConnectionTimeout(svid.HandshakeTimeout),
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingInterval, Timeout: pingTimeout, MaxConnectionIdle: maxIdle}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minClientPing, PermitWithoutStream: true}),
		grpc.InTapHandle(s.tap),
		grpc.StatsHandler(watcher{s}),
		grpc.ChainUnaryInterceptor(d.unary),
		grpc.ChainStreamInterceptor(d.stream),
		grpc.WaitForHandlers(true),
	)
}

func (s door) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := s.admit(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	var resp any
	if err := s.act(ctx, info.FullMethod, req, func(ctx context.Context) (err error) {
		resp, err = handler(ctx, req)
		return err
	}); err != nil {
		return nil, err
	}
	return resp, nil
}

func (s door) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := s.admit(stream.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	return s.act(ctx, info.FullMethod, nil, func(ctx context.Context) error {
		return handler(srv, &admittedStream{stream, ctx})
	})
}

type admittedStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (a *admittedStream) Context() context.Context { return a.ctx }

// admit lets the caller of ctx through to method, or refuses.
func (s door) admit(ctx context.Context, method string) (context.Context, error) {
	judged(ctx)
	caller := s.callerOf(ctx)
	if err := s.Standing(); err != nil && !strings.HasPrefix(method, "/grpc.health.") {
		return nil, err
	}
	if err := s.access.authorize(caller, method); err != nil {
		return nil, s.refuse(ctx, caller, audit.Record{Detail: method}, err)
	}
	return context.WithValue(ctx, callerKey{}, caller), nil
}

// refuse records that caller was not let through to what it wanted, which about
// says, and returns cause.
func (s *Service) refuse(ctx context.Context, caller *Caller, about audit.Record, cause error) error {
	s.metrics.refused.WithLabelValues(status.Code(cause).String()).Inc()
	if !s.writesDown(caller) {
		return cause
	}
	if a := actFrom(ctx); a != nil {
		about.Act, a.ended = a.id, true
	}
	about.Type, about.Actor, about.Role, about.Reason = audit.Refuse, caller.Name, caller.roleUsed(), status.Convert(cause).Message()
	s.record(ctx, about)
	return cause
}

// Permits says whether caller may do over REST what the RPC called method does.
func (s *Service) Permits(caller *Caller, method string) bool {
	return s.access.authorize(caller, method) == nil
}

// TrustDomain is the one that the service issues for.
func (s *Service) TrustDomain() spiffeid.TrustDomain { return s.opts.TrustDomain }

// Refused records that caller was not let through to what it wanted, outside
// of gRPC.
func (s *Service) Refused(ctx context.Context, caller *Caller, what, reason string) {
	_ = s.refuse(ctx, caller, audit.Record{Detail: what}, status.Error(codes.PermissionDenied, reason)) // returns its last argument
}

// audit appends records, also when the caller is gone by now: what was done
// was done. On a full disk refusals are only counted.
func (s *Service) audit(ctx context.Context, records ...audit.Record) error {
	return s.write(ctx, s.opts.Audit.Append, records)
}

// issued is audit for SVIDs that leave once it returns.
func (s *Service) issued(ctx context.Context, records ...audit.Record) error {
	return s.write(ctx, s.opts.Audit.Issue, records)
}

func (s *Service) write(ctx context.Context, to func(context.Context, ...audit.Record) error, records []audit.Record) error {
	ctx = context.WithoutCancel(ctx)
	err := to(ctx, records...)
	if !errors.Is(err, audit.ErrFull) {
		return err
	}
	acts := slices.DeleteFunc(slices.Clone(records), func(r audit.Record) bool { return r.Type == audit.Refuse })
	if len(acts) == len(records) {
		return err
	}
	s.metrics.unrecorded.Add(float64(len(records) - len(acts)))
	if len(acts) == 0 {
		return nil
	}
	return to(ctx, acts...)
}

// KeyFault says why the keys at hand sign nothing.
func (s *Service) KeyFault() error {
	return errors.Join(s.opts.Keys.X509().Fault(), s.opts.Keys.JWT().Fault())
}

// AuditFault says why the audit log takes no records; without them nothing is
// issued.
func (s *Service) AuditFault() error { return s.opts.Audit.Fault() }

// record writes an audit record that nothing hangs on: that of a refusal,
// which stands also when it cannot be written down.
func (s *Service) record(ctx context.Context, r audit.Record) {
	r.Time = time.Now()
	if err := s.audit(ctx, r); err != nil {
		s.log.LogAttrs(ctx, slog.LevelError, "audit record not written", slog.String("type", string(r.Type)), slog.Any("err", err))
	}
}

// shortage says what there is too little of: all of it to those who are known.
func shortage(ctx context.Context, err error) string {
	if c, ok := ctx.Value(callerKey{}).(*Caller); ok && len(c.Kinds) > 1 {
		return err.Error()
	}
	return "the CA takes no writes now"
}

// toStatus is the one place where errors become gRPC statuses.
func (s *Service) toStatus(ctx context.Context, err error) error {
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	if e, ok := errors.AsType[*entry.InvalidError](err); ok {
		return status.Error(codes.InvalidArgument, e.Error())
	}
	if e, ok := errors.AsType[*authority.InvalidError](err); ok {
		return status.Error(codes.InvalidArgument, e.Error())
	}
	if e, ok := errors.AsType[*attest.RefusedError](err); ok {
		return attestStatus(e)
	}
	if e, ok := errors.AsType[*release.RefusedError](err); ok {
		return status.Error(codes.InvalidArgument, e.Error())
	}
	if e, ok := errors.AsType[*release.StateError](err); ok {
		return status.Error(codes.FailedPrecondition, e.Error())
	}
	if e, ok := errors.AsType[*rotation.RefusedError](err); ok {
		return status.Error(codes.FailedPrecondition, e.Error())
	}
	if e, ok := errors.AsType[*trust.OrderError](err); ok {
		return status.Error(codes.FailedPrecondition, e.Error())
	}
	if e, ok := errors.AsType[*trust.WithdrawnError](err); ok {
		return status.Error(codes.FailedPrecondition, e.Error()+": move data_dir/keys away, and join with other keys")
	}
	if e, ok := errors.AsType[*attest.StandingError](err); ok {
		return status.Error(codes.FailedPrecondition, e.Error())
	}
	if e, ok := errors.AsType[*approval.RefusedError](err); ok {
		return approvalStatus(e)
	}
	if errors.Is(err, attest.ErrBanned) {
		return refused(codes.PermissionDenied, refusalOf(err), err.Error())
	}
	if errors.Is(err, store.ErrUnavailable) {
		err = errUnreachable
	}
	for _, known := range []struct {
		is   error
		code codes.Code
	}{
		{registry.ErrNoEntry, codes.NotFound},
		{release.ErrNone, codes.NotFound},
		{attest.ErrUnknownAgent, codes.NotFound},
		{rotation.ErrUnknown, codes.NotFound},
		{trust.ErrNoFederated, codes.NotFound},
		{attest.ErrEvicted, codes.Unauthenticated},
		{attest.ErrUnknownToken, codes.PermissionDenied},
		{attest.ErrExpiredToken, codes.PermissionDenied},
		{attest.ErrAttestedOnce, codes.PermissionDenied},
		{attest.ErrUsedEvidence, codes.PermissionDenied},
		{store.ErrTooLarge, codes.InvalidArgument},
		{trust.ErrContended, codes.Aborted},
		{approval.ErrEnded, codes.Aborted},
		{store.ErrClosed, codes.Unavailable},
		{store.ErrReplaced, codes.Unavailable},
		{errUnreachable, codes.Unavailable},
	} {
		if errors.Is(err, known.is) {
			return status.Error(known.code, known.is.Error())
		}
	}
	if errors.Is(err, registry.ErrBehind) {
		return status.Error(codes.Unavailable, "the change is stored, but "+registry.ErrBehind.Error()+"; its /ready says why")
	}
	if errors.Is(err, store.ErrUncertain) {
		return status.Error(codes.Unavailable, shortage(ctx, err))
	}
	if errors.Is(err, store.ErrReadOnly) || errors.Is(err, audit.ErrFull) {
		return status.Error(codes.ResourceExhausted, shortage(ctx, err))
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	s.log.LogAttrs(ctx, slog.LevelError, "request failed", slog.Any("err", err))
	return status.Error(codes.Internal, "internal error")
}
