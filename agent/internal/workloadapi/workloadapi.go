// Package workloadapi serves the SPIFFE Workload API, exactly as the standard
// has it and nothing more, to the processes of this node. The kernel says who
// calls; the node's picture (package cache) says what he may have.
package workloadapi

import (
	"context"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	attested "merlon.dev/agent/internal/workload"
)

// Server implements the Workload API. The WIT-SVID profile answers
// Unimplemented (Workload API §7). It is safe for concurrent use.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer

	callers  *endpoint.Callers
	cache    *cache.Cache
	signing  *endpoint.Rate
	patience time.Duration // with a reader that takes nothing
	td       spiffeid.TrustDomain
	log      *slog.Logger
}

// New returns a Server for the workloads of trust domain td.
func New(callers *endpoint.Callers, td spiffeid.TrustDomain, logger *slog.Logger) *Server {
	return &Server{
		callers: callers, cache: callers.Cache, signing: endpoint.NewRate(jwtPerSecond, jwtBurst),
		patience: endpoint.Patience, td: td, log: logger,
	}
}

// FetchX509SVID streams the caller's X509-SVIDs, with keys and trust bundle.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(stream.Context(), s, true, stream.Send, x509SVIDs)
}

// FetchX509Bundles streams the trust bundles with which the caller verifies
// X509-SVIDs.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(stream.Context(), s, false, stream.Send, func(v cache.View) *workload.X509BundlesResponse {
		m := &workload.X509BundlesResponse{Bundles: x509Federated(v)}
		m.Bundles[s.td.IDString()] = v.Trust.X509
		return m
	})
}

// FetchJWTBundles streams the keys with which the caller verifies JWT-SVIDs.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return follow(stream.Context(), s, false, stream.Send, func(v cache.View) *workload.JWTBundlesResponse {
		m := &workload.JWTBundlesResponse{Bundles: map[string][]byte{s.td.IDString(): v.Trust.JWKS}}
		for _, f := range v.Federated {
			if len(f.JWKS) > 0 {
				m.Bundles[f.TrustDomain.IDString()] = f.JWKS
			}
		}
		return m
	})
}

// follow sends what make makes of the caller's view, at once and whenever it
// came out differently. It holds the stream while there is nothing certain to
// say, and ends it with PermissionDenied only if no entry is for the caller,
// because clients then drop the SVIDs that they have. Each round looks at the
// process again.
func follow[M proto.Message](ctx context.Context, s *Server, svids bool, send func(M) error, build func(cache.View) M) error {
	sub := s.cache.Subscribe()
	defer sub.Close()
	var first *attested.Process
	var last proto.Message
	for {
		p, err := s.callers.Attest(ctx)
		if err != nil {
			return err
		}
		if first == nil {
			first = p
		} else if !p.Same(first) {
			return endpoint.Changed()
		}
		view := sub.View(p.Proof(), svids)
		if len(view.Entries) == 0 && view.Current {
			return endpoint.NoEntry(p.PID)
		}
		if svids && view.Withheld && len(view.SVIDs) == 0 && !view.Pending && view.Current {
			return endpoint.KeyWithheld()
		}
		if complete(view, svids, last != nil) {
			if m := build(view); last == nil || !proto.Equal(m, last) {
				if err := s.callers.Alive(ctx); err != nil {
					return err
				}
				if err := endpoint.Deliver(ctx, s.patience, func() error { return send(m) }); err != nil {
					return err
				}
				last = m
			}
			sub.Delivered(view.Trust.Sequence)
		}
		select {
		case <-sub.Woken():
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// complete says whether the view makes a message. The first waits for the SVIDs
// that are on their way; later ones must not delay what was taken away.
func complete(v cache.View, svids, sent bool) bool {
	if len(v.Entries) == 0 || v.Trust == nil {
		return false
	}
	return !svids || len(v.SVIDs) > 0 && (sent || !v.Pending)
}

func x509SVIDs(v cache.View) *workload.X509SVIDResponse {
	m := &workload.X509SVIDResponse{FederatedBundles: x509Federated(v)}
	var hints uniqueHints
	for _, held := range v.SVIDs {
		m.Svids = append(m.Svids, &workload.X509SVID{
			SpiffeId:    held.Peer.ID.String(),
			X509Svid:    held.Chain,
			X509SvidKey: held.Key,
			Bundle:      v.Trust.X509,
			Hint:        hints.next(held.Entry.Hint),
		})
	}
	return m
}

// x509Federated are the X.509 authorities of the other trust domains that the
// caller federates with, by trust domain.
func x509Federated(v cache.View) map[string][]byte {
	m := make(map[string][]byte)
	for _, f := range v.Federated {
		if len(f.X509) > 0 {
			m[f.TrustDomain.IDString()] = f.X509
		}
	}
	return m
}

// uniqueHints lets each hint pass once: clients pick identities by it (§5.2.1).
type uniqueHints map[string]bool

func (u *uniqueHints) next(hint string) string {
	if (*u)[hint] {
		return ""
	}
	if *u == nil {
		*u = uniqueHints{}
	}
	(*u)[hint] = true
	return hint
}

// sameCaller attests again at the end of a call that took time: the answer is
// for who asked.
func (s *Server) sameCaller(ctx context.Context, asked *attested.Process) (*attested.Process, error) {
	p, err := s.callers.Attest(ctx)
	if err != nil {
		return nil, err
	}
	if !p.Same(asked) {
		return nil, endpoint.Changed()
	}
	return p, nil
}

// unavailable hides what went wrong at the CA from workloads, but for a
// request that can never succeed.
func (s *Server) unavailable(ctx context.Context, e *cache.Entry, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	s.log.LogAttrs(ctx, slog.LevelWarn, "JWT-SVID not issued",
		slog.String("spiffe_id", e.SPIFFEID.String()), slog.String("entry_id", e.ID), slog.Any("err", err))
	if status.Code(err) == codes.InvalidArgument {
		return status.Errorf(codes.InvalidArgument, "the CA refused: %s", status.Convert(err).Message())
	}
	return endpoint.Error(codes.Unavailable, endpoint.CAUnavailable, "the CA did not issue the JWT-SVID; the agent's log says why", "")
}
