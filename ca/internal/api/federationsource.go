// Admin: where trust bundles of other trust domains are to be had, and invites.

package api

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

// SetFederationSource implements capb.AdminServer.
func (s *Service) SetFederationSource(ctx context.Context, req *capb.SetFederationSourceRequest) (*capb.SetFederationSourceResponse, error) {
	td, err := entry.ParseTrustDomain("trust_domain", req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	src, err := sourceOf(td, req.GetSource())
	if err != nil {
		return nil, err
	}
	b, err := s.follow(ctx, src, req.GetDocument())
	if err != nil {
		return nil, err
	}
	return &capb.SetFederationSourceResponse{FederatedBundle: b}, nil
}

func sourceOf(td spiffeid.TrustDomain, p *capb.FederationSource) (*federation.Source, error) {
	src := &federation.Source{
		TrustDomain: td, URL: p.GetUrl(), Profile: federation.Profile(p.GetProfile()), Authorities: p.GetWebAuthorities(), SetAt: time.Now().UTC(),
	}
	if text := p.GetEndpointSpiffeId(); text != "" {
		id, err := spiffeid.FromString(text)
		if err != nil {
			return nil, &entry.InvalidError{Field: "endpoint_spiffe_id", Reason: err.Error()}
		}
		src.EndpointID = id
	}
	if err := src.Check(); err != nil {
		return nil, &entry.InvalidError{Field: "source", Reason: err.Error()}
	}
	return src, nil
}

// AcceptFederationInvite implements capb.AdminServer.
func (s *Service) AcceptFederationInvite(ctx context.Context, req *capb.AcceptFederationInviteRequest) (*capb.AcceptFederationInviteResponse, error) {
	now := time.Now()
	token, err := federation.ParseToken(req.GetToken(), now)
	if err != nil {
		return nil, &entry.InvalidError{Field: "token", Reason: err.Error()}
	}
	src, err := token.Source(s.opts.TrustDomain, now)
	if err != nil {
		return nil, &entry.InvalidError{Field: "token", Reason: err.Error()}
	}
	b, err := s.follow(ctx, src, token.Bundle)
	if err != nil {
		return nil, err
	}
	return &capb.AcceptFederationInviteResponse{FederatedBundle: b}, nil
}

// follow keeps src, with the trust bundle to begin with where one comes, and fetches for
// the first time. That this fails is not an error: what was kept is tried again, and
// the answer says why.
func (s *Service) follow(ctx context.Context, src *federation.Source, document []byte) (*capb.FederatedBundle, error) {
	td := src.TrustDomain
	if td == s.opts.TrustDomain {
		return nil, &entry.InvalidError{Field: "trust_domain", Reason: fmt.Sprintf("%s is this CA's own: its trust bundle is made here and nowhere else", td)}
	}
	held, cmp, err := s.heldFederated(ctx, td)
	if err != nil && !errors.Is(err, trust.ErrNoFederated) {
		return nil, err
	}
	put, err := src.Put()
	if err != nil {
		return nil, err
	}
	ops, verifier := []store.Op{put}, held
	if len(document) > 0 {
		b, err := s.newFederated(&capb.SetFederatedBundleRequest{TrustDomain: td.Name(), Document: document})
		if err != nil {
			return nil, err
		}
		if err := b.CheckFollows(held); err != nil {
			return nil, err
		}
		op, err := b.Put()
		if err != nil {
			return nil, err
		}
		ops, verifier = append(ops, op), b
	}
	if err := s.checkVerifier(ctx, src, verifier); err != nil {
		return nil, err
	}
	if err := s.checkRoom(ctx, td); err != nil {
		return nil, err
	}
	detail := fmt.Sprintf("follow the trust bundle of %s at %s (%s)", td, src.URL, src.Profile)
	if err := s.commitFederated(ctx, cmp, detail, ops...); err != nil {
		return nil, err
	}
	if _, err := s.fetch(ctx, td); err != nil && ctx.Err() != nil {
		return nil, err
	}
	return s.describeFederated(ctx, td)
}

// checkVerifier refuses a https_spiffe server that nothing known verifies: what works
// now would be replaced by what never can. own is the trust bundle of src's trust
// domain, or nil.
func (s *Service) checkVerifier(ctx context.Context, src *federation.Source, own *trust.Federated) error {
	td := src.EndpointID.TrustDomain()
	switch {
	case src.Profile != federation.SPIFFE:
		return nil
	case td == src.TrustDomain && own == nil:
		return &entry.InvalidError{Field: "document", Reason: fmt.Sprintf("is missing: the first trust bundle of %s has to be handed over, since by it %s is verified", td, src.EndpointID)}
	case td != src.TrustDomain:
		var err error
		if own, _, err = s.heldFederated(ctx, td); err != nil && !errors.Is(err, trust.ErrNoFederated) {
			return err
		}
	}
	if own == nil || len(own.X509) == 0 {
		return &entry.InvalidError{Field: "endpoint_spiffe_id", Reason: fmt.Sprintf("%s cannot be verified: there is no X.509 authority of %s here, whose trust bundle has to come first", src.EndpointID, td)}
	}
	return nil
}

// checkRoom refuses one trust domain too many.
func (s *Service) checkRoom(ctx context.Context, td spiffeid.TrustDomain) error {
	known, err := s.federations(ctx)
	if err != nil {
		return err
	}
	if _, ok := known[td]; !ok && len(known) >= trust.MaxFederated {
		return &entry.InvalidError{Field: "trust_domain", Reason: fmt.Sprintf("this CA federates with %d trust domains already, which is the most", trust.MaxFederated)}
	}
	return nil
}

// CreateFederationInvite implements capb.AdminServer.
func (s *Service) CreateFederationInvite(ctx context.Context, req *capb.CreateFederationInviteRequest) (*capb.CreateFederationInviteResponse, error) {
	td, err := entry.ParseTrustDomain("trust_domain", req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	if td == s.opts.TrustDomain {
		return nil, &entry.InvalidError{Field: "trust_domain", Reason: "is this CA's own; name the other side's"}
	}
	own := s.registry.Trust()
	if own == nil {
		return nil, status.Error(codes.Unavailable, "this CA has published no trust bundle yet")
	}
	// The reader's part comes behind it.
	at := strings.TrimRight(req.GetUrl(), "/")
	if u, err := url.Parse(at); err == nil && (u.RawQuery != "" || u.ForceQuery) {
		return nil, &entry.InvalidError{Field: "url", Reason: "has a query, which the URL of this CA's trust bundle has not"}
	}
	now := time.Now()
	held, unchanged, err := s.heldInvite(ctx, td)
	if err != nil {
		return nil, err
	}
	invite := federation.NewInvite(td, now, held)
	token := federation.Token{
		For: td.Name(), TrustDomain: own.TrustDomain.Name(), URL: at + "/" + invite.Reader, Profile: federation.Profile(req.GetProfile()),
		Authorities: req.GetWebAuthorities(), Bundle: own.JWKS, Expires: now.Add(federation.InviteTTL).UTC().Truncate(time.Second),
	}
	if token.Profile == federation.SPIFFE {
		token.EndpointID = entry.CAID(s.opts.TrustDomain).String()
	}
	if _, err := token.Source(td, now); err != nil { // as the other side will read it
		return nil, &entry.InvalidError{Field: "url", Reason: err.Error()}
	}
	if err := s.checkRoom(ctx, td); err != nil {
		return nil, err
	}
	put, err := invite.Put()
	if err != nil {
		return nil, err
	}
	text, err := token.String()
	if err != nil {
		return nil, err
	}
	if err := s.commitFederated(ctx, unchanged, fmt.Sprintf("invite %s to follow this trust bundle at %s (%s)", td, at, token.Profile), put); err != nil {
		return nil, err
	}
	return &capb.CreateFederationInviteResponse{Token: text, ExpiresAt: timestamp(token.Expires)}, nil
}

// heldInvite is the invite of td that there is, or nil, and the comparison that holds
// until somebody else changes it. One that cannot be read can be replaced.
func (s *Service) heldInvite(ctx context.Context, td spiffeid.TrustDomain) (*federation.Invite, store.Cmp, error) {
	key := federation.InvitePrefix + td.Name()
	kv, _, err := s.opts.Store.Get(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		return nil, store.Cmp{Key: key}, nil
	}
	if err != nil {
		return nil, store.Cmp{}, fmt.Errorf("read the invite of %s: %w", td, err)
	}
	held, err := federation.DecodeInvite(kv)
	if err != nil {
		held = nil
	}
	return held, store.Cmp{Key: key, ModRevision: kv.ModRevision}, nil
}

// RefreshFederatedBundle implements capb.AdminServer.
func (s *Service) RefreshFederatedBundle(ctx context.Context, req *capb.RefreshFederatedBundleRequest) (*capb.RefreshFederatedBundleResponse, error) {
	td, err := entry.ParseTrustDomain("trust_domain", req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	if _, err := s.fetch(ctx, td); err != nil {
		if errors.Is(err, errNoSource) {
			if _, _, err := s.heldFederated(ctx, td); err != nil { // nothing was handed over either
				return nil, err
			}
			return nil, status.Errorf(codes.NotFound, "%s: %v", td, err)
		}
		return nil, status.Errorf(codes.FailedPrecondition, "the trust bundle of %s was not fetched: %v; what was known stays", td, err)
	}
	b, err := s.describeFederated(ctx, td)
	if err != nil {
		return nil, err
	}
	return &capb.RefreshFederatedBundleResponse{FederatedBundle: b}, nil
}

// federations reads all that there is. A record that cannot be read is said so, and can
// be set anew or removed.
func (s *Service) federations(ctx context.Context) (map[spiffeid.TrustDomain]federation.Relationship, error) {
	all := make(map[spiffeid.TrustDomain]federation.Relationship)
	for _, b := range s.registry.Federated() {
		all[b.TrustDomain] = federation.Relationship{Bundle: b}
	}
	for _, k := range s.registry.SharedKeys() {
		for _, td := range k.TrustDomains {
			if r, ok := all[td]; ok { // the own one is not among them
				r.Shared = append(r.Shared, k)
				all[td] = r
			}
		}
	}
	type read func(*federation.Relationship, store.KV) error
	for prefix, read := range map[string]read{
		federation.SourcePrefix: func(r *federation.Relationship, kv store.KV) (err error) {
			r.Source, err = federation.DecodeSource(kv)
			return err
		},
		federation.InvitePrefix: func(r *federation.Relationship, kv store.KV) (err error) {
			r.Invite, err = federation.DecodeInvite(kv)
			return err
		},
	} {
		kvs, err := s.listUnder(ctx, prefix)
		if err != nil {
			return nil, err
		}
		for _, kv := range kvs {
			td, err := spiffeid.TrustDomainFromString(strings.TrimPrefix(kv.Key, prefix))
			if err != nil {
				continue // nobody can name it
			}
			r := all[td]
			if err := read(&r, kv); err != nil {
				r.Unreadable = err
			}
			all[td] = r
		}
	}
	return all, nil
}

// listUnder reads the records below prefix, of which there are few.
func (s *Service) listUnder(ctx context.Context, prefix string) ([]store.KV, error) {
	kvs, _, _, err := s.opts.Store.List(ctx, prefix, "", 2*trust.MaxFederated, 0)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", prefix, err)
	}
	return kvs, nil
}

// describeFederated is all that there is about td.
func (s *Service) describeFederated(ctx context.Context, td spiffeid.TrustDomain) (*capb.FederatedBundle, error) {
	all, err := s.federations(ctx)
	if err != nil {
		return nil, err
	}
	r, ok := all[td]
	if !ok {
		return nil, trust.ErrNoFederated
	}
	return s.relationshipToProto(td, r), nil
}

// relationshipToProto is r with td for administrators.
func (s *Service) relationshipToProto(td spiffeid.TrustDomain, r federation.Relationship) *capb.FederatedBundle {
	p := &capb.FederatedBundle{TrustBundle: &capb.TrustBundle{TrustDomain: td.Name()}}
	if r.Bundle != nil {
		p = federatedToProto(r.Bundle)
	}
	if src := r.Source; src != nil {
		p.Source = &capb.FederationSource{
			Url: src.URL, Profile: string(src.Profile), WebAuthorities: src.Authorities,
			TriedAt: timestamp(src.TriedAt), FetchedAt: timestamp(src.FetchedAt), Ignored: src.Ignored,
			Failure: src.Failure, Reason: src.Reason, FailingSince: timestamp(src.FailingSince),
		}
		if !src.EndpointID.IsZero() {
			p.Source.EndpointSpiffeId = src.EndpointID.String()
		}
	}
	if r.Unreadable != nil {
		p.Source = &capb.FederationSource{Failure: "what was kept of it cannot be read: " + r.Unreadable.Error()}
	}
	if r.Invite != nil {
		p.Reader = &capb.FederationReader{InvitedAt: timestamp(r.Invite.InvitedAt), FetchedAt: timestamp(r.Invite.FetchedAt), Sequence: r.Invite.Sequence}
	}
	health := r.Health(td, s.ownHint(), time.Now())
	p.Health = &capb.FederationHealth{Theirs: health.Theirs, Ours: health.Ours, Problems: health.Problems}
	return p
}

// ownHint is how often others are to come for our trust bundle.
func (s *Service) ownHint() time.Duration {
	if own := s.registry.Trust(); own != nil {
		return own.Hint()
	}
	return trust.RefreshHint
}
