// Package sds serves Envoy's Secret Discovery Service, v3, to the Envoys of this
// node: what the Workload API gives to a process, as the secrets that Envoy asks
// for by name. The kernel says who calls; the node's picture (package cache)
// says what he may have.
package sds

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/workload"
)

// fetchWait is how long FetchSecrets is held while the agent cannot tell.
// Streams are held without end.
const fetchWait = 10 * time.Second

// How many requests on open streams one user may make: each costs a look at his
// process. An Envoy acknowledges each of its secrets when the trust bundle
// changes.
const (
	requestsPerSecond = 400
	requestsBurst     = 4000
)

// Server implements SDS. It is safe for concurrent use.
type Server struct {
	callers  *endpoint.Callers
	cache    *cache.Cache
	requests *endpoint.Rate
	td       spiffeid.TrustDomain
	log      *slog.Logger
}

// New returns a Server for the Envoys of trust domain td.
func New(callers *endpoint.Callers, td spiffeid.TrustDomain, logger *slog.Logger) *Server {
	return &Server{
		callers: callers, cache: callers.Cache, td: td, log: logger,
		requests: endpoint.NewRate(requestsPerSecond, requestsBurst),
	}
}

// StreamSecrets answers with every secret that was asked for and exists,
// whenever one of them changed (state of the world).
func (s *Server) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	return follow(stream.Context(), s, stream.Recv, (*watch).stateOfTheWorld, func(h holdings, w *watch, a answer) error {
		m, err := state(h, w, a)
		if err != nil {
			return s.internal(stream.Context(), err)
		}
		return endpoint.Deliver(stream.Context(), endpoint.Patience, func() error { return stream.Send(m) })
	})
}

// DeltaSecrets answers with what changed, and with the names that stand for
// nothing or not any more.
func (s *Server) DeltaSecrets(stream secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	return follow(stream.Context(), s, stream.Recv, (*watch).delta, func(h holdings, w *watch, a answer) error {
		m, err := delta(h, w, a)
		if err != nil {
			return s.internal(stream.Context(), err)
		}
		return endpoint.Deliver(stream.Context(), endpoint.Patience, func() error { return stream.Send(m) })
	})
}

// FetchSecrets answers once, when everything asked for is known. Who has no
// entry gets PermissionDenied, as from the Workload API.
func (s *Server) FetchSecrets(ctx context.Context, req *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	w := newWatch()
	if _, err := w.stateOfTheWorld(req); err != nil {
		return nil, err
	}
	sub := s.cache.Subscribe()
	defer sub.Close()
	patience := time.NewTimer(fetchWait)
	defer patience.Stop()
	for {
		p, err := s.callers.Attest(ctx)
		if err != nil {
			return nil, err
		}
		h := s.holdings(sub, p, w)
		if len(h.view.Entries) == 0 && h.view.Current {
			return nil, endpoint.NoEntry(p.PID)
		}
		if a := w.compare(h); !a.unsure {
			if err := s.callers.Alive(ctx); err != nil {
				return nil, err
			}
			m, err := state(h, w, a)
			if err != nil {
				return nil, s.internal(ctx, err)
			}
			return m, nil
		}
		select {
		case <-sub.Woken():
		case <-patience.C:
			return nil, endpoint.Unsynced()
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

// follow serves one stream: it takes requests, and says what there is to say
// after each and after each change. Each round looks at the process again.
// Nothing that is asked for ends the stream, since another Envoy than the one
// whose name is wrong would lose its secrets with it.
func follow[Req any](ctx context.Context, s *Server, recv func() (Req, error), take func(*watch, Req) (string, error), say func(holdings, *watch, answer) error) error {
	requests, ended := receive(ctx, recv)
	sub := s.cache.Subscribe()
	defer sub.Close()
	w, notes := newWatch(), newNotes(s.log)
	var first *workload.Process
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
		if w.begun {
			h := s.holdings(sub, p, w)
			a := w.compare(h)
			if a.news() {
				if err := s.callers.Alive(ctx); err != nil {
					return err
				}
				notes.missing(ctx, p, w, a)
				if err := say(h, w, a); err != nil {
					return err
				}
			}
			sub.Delivered(a.trust())
		}
		select {
		case <-sub.Woken():
		case req := <-requests:
			if err := s.requests.Admit(ctx, "SDS requests", "ask for a name once: what changes is sent"); err != nil {
				return err
			}
			refusal, err := take(w, req)
			if err != nil {
				return err
			}
			notes.refused(ctx, p, w, refusal)
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// receive hands on what recv returns, until it fails or ctx ends, which is when
// the RPC is over.
func receive[Req any](ctx context.Context, recv func() (Req, error)) (<-chan Req, <-chan error) {
	requests, ended := make(chan Req), make(chan error, 1)
	go func() {
		for {
			req, err := recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				return
			}
		}
	}()
	return requests, ended
}

func (s *Server) holdings(sub *cache.Subscription, p *workload.Process, w *watch) holdings {
	return holdings{view: sub.ViewOf(p.Proof(), w.certificates), td: s.td, plain: w.plain}
}

// state is the answer in the one dialect.
func state(h holdings, w *watch, a answer) (*discoveryv3.DiscoveryResponse, error) {
	m := &discoveryv3.DiscoveryResponse{TypeUrl: secretType, VersionInfo: version(a.present), ResourceErrors: reasons(a.gone)}
	for _, r := range a.present {
		secret, err := h.pack(r)
		if err != nil {
			return nil, err
		}
		m.Resources = append(m.Resources, secret)
	}
	m.Nonce = w.tell(a)
	return m, nil
}

// delta is the answer in the other.
func delta(h holdings, w *watch, a answer) (*discoveryv3.DeltaDiscoveryResponse, error) {
	m := &discoveryv3.DeltaDiscoveryResponse{
		TypeUrl: secretType, SystemVersionInfo: version(a.present),
		RemovedResources: a.gone, ResourceErrors: reasons(a.gone),
	}
	for _, r := range a.changed {
		secret, err := h.pack(r)
		if err != nil {
			return nil, err
		}
		m.Resources = append(m.Resources, &discoveryv3.Resource{Name: r.name, Version: r.version(), Resource: secret})
	}
	m.Nonce = w.tell(a)
	return m, nil
}

// version sums up those of several resources.
func version(all []resource) string {
	if len(all) == 1 {
		return all[0].version()
	}
	sum := sha256.New()
	for _, r := range all {
		fmt.Fprintf(sum, "%q %s\n", r.name, r.version())
	}
	return hex.EncodeToString(sum.Sum(nil)[:8])
}

// reasons say why names stand for nothing, to who can read it (Envoy does not,
// yet).
func reasons(gone []string) (errs []*discoveryv3.ResourceError) {
	for _, name := range gone {
		errs = append(errs, &discoveryv3.ResourceError{
			ResourceName: &discoveryv3.ResourceName{Name: name},
			ErrorDetail:  &statuspb.Status{Code: int32(codes.NotFound), Message: "this process has no such secret; hint: merlon explain identity --pid PID"},
		})
	}
	return errs
}

func (s *Server) internal(ctx context.Context, err error) error {
	s.log.LogAttrs(ctx, slog.LevelError, "SDS request failed", slog.Any("err", err))
	return status.Error(codes.Internal, "internal error")
}
