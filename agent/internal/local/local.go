// Package local is the agent's own API for programs on its node: for those that
// the kernel names, their compiled policy, decisions where there is none, and the
// feed of policy generations and revocations; and for operators the explanation
// of both identities and decisions.
package local

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/policyfeed"
	"merlon.dev/policy"
	"merlon.dev/policy/decisionlog"
	"merlon.dev/policy/engine"
	"merlon.dev/sdk/svid"
)

// heartbeat is how often a Watch says something, also without a change; the
// contract allows 15 s.
const heartbeat = 10 * time.Second

// Options are what a Server needs. All fields are required but those that say
// otherwise.
type Options struct {
	Callers *endpoint.Callers
	// EngineOf returns the policy of a generation that was active some time ago. The
	// error says why it cannot be had.
	EngineOf func(ctx context.Context, generation uint64) (*engine.Engine, error)
	// ExplainHeaders names the headers whose values are kept with the last
	// decisions.
	ExplainHeaders []string
	// Policy returns what decides now, PolicyChanged a channel that is closed when
	// that is another, PolicyFault why it is not what the CA announces, empty for
	// nothing. PolicyName is the bundle that is followed.
	Policy        func() *policyfeed.Snapshot
	PolicyChanged func() <-chan struct{}
	PolicyFault   func() string
	PolicyName    string
	// AgentID is the agent's SPIFFE ID; zero before the node is attested.
	AgentID func() spiffeid.ID
	// RevocationMaxAge is how long the CA may be silent before revocations
	// count as stale.
	RevocationMaxAge time.Duration
	// Decisions counts decisions, and keeps those that are to be written down.
	Decisions *decisionlog.Recorder
	// Status is what the agent says of itself.
	Status func(context.Context) *agentpb.StatusResponse
	// DenyStale denies every call with STALE_REVOCATIONS then; otherwise what
	// is known stays in force.
	DenyStale bool
	// PolicyAsOf is until when the policy in use is known to be the one in force.
	// Where DenyStalePolicy is set, calls are denied STALE_POLICY when that is longer
	// ago than PolicyMaxAge.
	PolicyAsOf      func() time.Time
	PolicyMaxAge    time.Duration
	DenyStalePolicy bool
	Logger          *slog.Logger
	Registerer      prometheus.Registerer
}

// Server implements agentpb.Local and agentpb.Debug. It is safe for concurrent
// use.
type Server struct {
	agentpb.UnimplementedLocalServer
	agentpb.UnimplementedDebugServer

	o         Options
	cache     *cache.Cache
	decisions *decisions
	counted   *prometheus.CounterVec
	csrs      *endpoint.Rate
	// unrecorded are denials that services counted and did not report.
	unrecorded prometheus.Counter
	compared   *comparer
	processes  *processes
	told       counted // with the last PolicyReport
}

// New returns a Server.
func New(o Options) *Server {
	s := &Server{
		o: o, cache: o.Callers.Cache, csrs: endpoint.NewRate(csrsPerSecond, csrsBurst), decisions: newDecisions(o.ExplainHeaders),
		compared: newComparer(o.Registerer), processes: newProcesses(),
		counted: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_agent_decisions_total", Help: "Decisions for workloads, by reason.",
		}, []string{"reason"}),
		unrecorded: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "merlon_agent_denials_not_recorded_total", Help: "Denials that a workload decided itself and had no room to report; merlon explain decision does not know them.",
		}),
	}
	o.Registerer.MustRegister(s.counted, s.unrecorded)
	return s
}

// Run compares the decisions with what a candidate says, until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	s.compared.run(ctx)
	return nil
}

// Authorize decides one call that arrived at the caller. The destination is
// the caller's own SPIFFE ID and never another.
func (s *Server) Authorize(ctx context.Context, req *agentpb.AuthorizeRequest) (*agentpb.AuthorizeResponse, error) {
	_, entries, err := s.o.Callers.Entitled(ctx)
	if err != nil {
		return nil, err
	}
	destination, ok := pickDestination(entries, req.GetDestination())
	if !ok {
		return nil, s.o.Callers.NotAmong("the caller is not entitled to the destination that it names")
	}
	in := inputOf(req, destination)
	d := s.decide(ctx, in, entries)
	d.LetThrough = req.GetAuditMode() && !d.Allow && d.Reason.Auditable()
	s.record(in, d)
	if err := s.o.Callers.Alive(ctx); err != nil {
		return nil, err
	}
	return &agentpb.AuthorizeResponse{Decision: decisionToPB(d)}, nil
}

// Decide decides a call to one of the services that the entries called are of, and
// records the decision.
func (s *Server) Decide(ctx context.Context, in *policy.Input, called []*cache.Entry) policy.Decision {
	d := s.decide(ctx, in, called)
	s.record(in, d)
	return d
}

// Refuse is the denial, for a reason that stands before any policy, of a call to a
// service of this node. It is recorded.
func (s *Server) Refuse(in *policy.Input, reason policy.Reason) policy.Decision {
	d := policy.Deny(reason)
	s.record(in, d)
	return d
}

func (s *Server) record(in *policy.Input, d policy.Decision) {
	now := time.Now()
	s.decisions.add(in, d, now, false)
	s.o.Decisions.Record(in, &d, now)
	s.counted.WithLabelValues(string(d.Reason)).Inc()
}

// pickDestination returns the named one of the caller's SPIFFE IDs, or the
// first.
func pickDestination(entries []*cache.Entry, named string) (id string, ok bool) {
	for _, e := range entries {
		if id := e.SPIFFEID.String(); named == "" || named == id {
			return id, true
		}
	}
	return "", false
}

// decide asks what stands before any policy, and then the policy. called are the
// entries of the service that in is a call to.
func (s *Server) decide(ctx context.Context, in *policy.Input, called []*cache.Entry) policy.Decision {
	source, err := spiffeid.FromString(in.Source)
	if err != nil {
		return policy.Deny(policy.NoIdentity)
	}
	if _, revoked := s.cache.Revocations().Concerning(svid.PeerBySerial(source, in.SourceSerial)); revoked {
		return policy.Deny(policy.Revoked)
	}
	if s.o.DenyStale && s.stale(time.Now()) {
		return policy.Deny(policy.StaleRevocations)
	}
	if s.o.DenyStalePolicy && time.Since(s.o.PolicyAsOf()) > s.o.PolicyMaxAge {
		return policy.Deny(policy.StalePolicy)
	}
	now := s.o.Policy()
	choice := now.For(s.o.AgentID().String(), in.Destination)
	if choice.Decides == nil {
		return policy.Deny(policy.NoBundle)
	}
	if choice.Decides.ReadsJWT() || choice.Beside != nil && choice.Beside.ReadsJWT() {
		in.JWT = s.claimsOf(ctx, in, called)
	}
	d := choice.Decides.Authorize(ctx, in)
	s.compared.offer(now, choice, in, d)
	return d
}

// stale says whether the CA has been silent for too long.
func (s *Server) stale(now time.Time) bool {
	heard := s.cache.Heard()
	return heard.IsZero() || now.Sub(heard) > s.o.RevocationMaxAge
}

// Watch streams the generation of the active policy and the revocations to who
// has an identity: everything at once, then each change. The caller is looked at
// again for each message; one whose entries end gets what was revoked with them.
func (s *Server) Watch(_ *agentpb.WatchRequest, stream grpc.ServerStreamingServer[agentpb.WatchResponse]) error {
	ctx := stream.Context()
	who := s.follow()
	defer who.sub.Close()
	if err := who.awaitEntries(ctx); err != nil {
		return err
	}
	var cursor cache.Cursor
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	for {
		gone, err := who.withdrawn(ctx)
		if err != nil {
			return err
		}
		// The channels before what they announce, so that nothing is missed.
		policyChanged := s.o.PolicyChanged()
		m := &agentpb.WatchResponse{}
		records, reset, next, more := s.cache.RevocationsSince(cursor)
		cursor, m.Reset_ = next, reset
		for _, r := range records {
			m.Revocations = append(m.Revocations, revocationToPB(r))
		}
		now := s.o.Policy()
		m.PolicyVersion = now.Version
		m.PolicyGeneration, m.CandidateGeneration = now.Generations()
		if heard := s.cache.Heard(); !heard.IsZero() {
			m.RevocationsAsOf = timestamppb.New(heard)
		}
		if after := s.denyAfter(); after > 0 {
			m.DenyAfter = durationpb.New(after)
		}
		if trust := s.cache.Trust(); trust != nil {
			m.TaintedAuthorityIds = trust.Tainted
		}
		if asOf := s.o.PolicyAsOf(); !asOf.IsZero() {
			m.PolicyAsOf = timestamppb.New(asOf)
		}
		if s.o.DenyStalePolicy {
			m.DenyPolicyAfter = durationpb.New(s.o.PolicyMaxAge)
		}
		if err := s.o.Callers.Alive(ctx); err != nil {
			return err
		}
		if err := endpoint.Deliver(ctx, endpoint.Patience, func() error { return stream.Send(m) }); err != nil {
			return err
		}
		if gone {
			return endpoint.NoEntry(who.first.PID)
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-who.sub.Woken():
		case <-policyChanged:
		case <-more:
		case <-beat.C:
		}
	}
}
