// Package extauthz answers Envoy's external authorization (ext_authz, v3): may this
// request pass? The kernel says whose Envoy asks, and with that which service is
// called; the Envoy says who calls, by the certificate that it has verified; the
// decision is made and recorded like every other of this node (package local).
// Whatever is missing, unknown or ambiguous is a denial with a reason, and an answer:
// an error could be let through by the Envoy's configuration.
package extauthz

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/policy"
	"merlon.dev/sdk/svid"
)

// patience bounds one answer: what a check that waits holds is the request of
// somebody who waits too.
const patience = 2 * time.Second

// Options are what a Server needs. All fields are required.
type Options struct {
	Callers *endpoint.Callers
	// Decide decides a call to one of the services that the entries are of, and Refuse
	// denies one for a reason that stands before any policy. Both record it.
	Decide     func(context.Context, *policy.Input, []*cache.Entry) policy.Decision
	Refuse     func(*policy.Input, policy.Reason) policy.Decision
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Server implements ext_authz. It is safe for concurrent use.
type Server struct {
	authv3.UnimplementedAuthorizationServer

	o      Options
	cache  *cache.Cache
	peers  peers
	lines  *endpoint.Rate
	checks *prometheus.CounterVec
	took   prometheus.Histogram
}

// How many lines the log gets of the refusals of one user's Envoys: whoever calls them
// can cause them.
const (
	linesPerSecond = 1
	linesAtOnce    = 20
)

// New returns a Server.
func New(o Options) *Server {
	s := &Server{
		o: o, cache: o.Callers.Cache, lines: endpoint.NewRate(linesPerSecond, linesAtOnce),
		checks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_agent_ext_authz_checks_total", Help: "Requests that Envoys asked about, by protocol (http, grpc; none: the Envoy does not say) and reason of the decision.",
		}, []string{"protocol", "reason"}),
		took: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "merlon_agent_ext_authz_check_seconds", Help: "How long Envoys waited for a decision.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .05, .25, 1, 2.5},
		}),
	}
	o.Registerer.MustRegister(s.checks, s.took)
	return s
}

// Check decides one request that arrived at the caller, an Envoy. The destination is
// one of the caller's own SPIFFE IDs and never another.
func (s *Server) Check(ctx context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c := read(req.GetAttributes())
	d, err := s.decide(ctx, &c, req.GetAttributes())
	if err == nil {
		// What was decided for a process that has ended goes to nobody.
		err = s.o.Callers.Alive(ctx)
	}
	if err != nil {
		return nil, err
	}
	protocol := string(c.in.Protocol)
	if protocol == "" {
		protocol = "none"
	}
	s.checks.WithLabelValues(protocol, string(d.Reason)).Inc()
	s.took.Observe(time.Since(begun).Seconds())
	return answer(&c, d), nil
}

// decide puts c to the policy of the caller's node, unless something stands before
// that. It is an error only where nobody hears the answer.
func (s *Server) decide(ctx context.Context, c *call, a *authv3.AttributeContext) (policy.Decision, error) {
	p, entries, err := s.o.Callers.Entitled(ctx)
	if err != nil {
		if code := status.Code(err); code == codes.Canceled || code == codes.Internal {
			return policy.Decision{}, err
		}
		// Who proves to be nobody's service leaves no record: there is no service that
		// it would be of.
		d := policy.Deny(policy.AgentUnavailable)
		s.log(ctx, c, d, err)
		return d, nil
	}
	c.in.Destination = entries[0].SPIFFEID.String()
	destination, ok := choose(entries, a.GetDestination().GetPrincipal())
	if ok {
		c.in.Destination = destination
	}
	peer, unknown := s.peers.of(a.GetSource())
	if peer != nil {
		c.in.Source, c.in.SourceSerial = peer.ID.String(), peer.SerialHex
	}
	switch {
	case c.fault != nil:
		return s.refuse(ctx, c, c.fault.reason, c.fault.err), nil
	case !ok:
		err := fmt.Errorf("the Envoy shows %.200q, which is no SPIFFE ID of its process; hint: merlon explain identity --pid %d", a.GetDestination().GetPrincipal(), p.PID)
		return s.refuse(ctx, c, policy.Error, err), nil
	case unknown != nil:
		return s.refuse(ctx, c, policy.NoIdentity, unknown), nil
	}
	if reason := s.outdated(peer, time.Now()); reason != "" {
		return s.refuse(ctx, c, reason, nil), nil
	}
	return s.o.Decide(ctx, c.in, entries), nil
}

// choose returns the named one of the caller's SPIFFE IDs, or the first where none is
// named.
func choose(entries []*cache.Entry, named string) (id string, ok bool) {
	for _, e := range entries {
		if id := e.SPIFFEID.String(); named == "" || named == id {
			return id, true
		}
	}
	return "", false
}

// outdated says why peer is not to be believed any more; empty where it is. Of a peer
// without its certificate only the SPIFFE ID is known, which is left to Decide: then
// each record that names the ID concerns it.
func (s *Server) outdated(peer *svid.Peer, now time.Time) policy.Reason {
	if peer.Leaf == nil {
		return ""
	}
	if !now.Before(peer.NotAfter) || now.Before(peer.NotBefore) {
		return policy.Expired
	}
	if _, revoked := s.cache.Revocations().Concerning(peer); revoked {
		return policy.Revoked
	}
	return ""
}

func (s *Server) refuse(ctx context.Context, c *call, reason policy.Reason, why error) policy.Decision {
	d := s.o.Refuse(c.in, reason)
	if why != nil {
		s.log(ctx, c, d, why)
	}
	return d
}

// log says why no policy was asked.
func (s *Server) log(ctx context.Context, c *call, d policy.Decision, why error) {
	if s.lines.Admit(ctx, "lines", "") != nil {
		return
	}
	s.o.Logger.LogAttrs(ctx, slog.LevelWarn, "Envoy's request refused", slog.String("reason", string(d.Reason)),
		slog.String("decision_id", d.DecisionID.String()), slog.String("source", c.in.Source), slog.String("destination", c.in.Destination),
		slog.String("method", c.in.Method), slog.String("path", c.in.Path), slog.Any("err", why))
}
