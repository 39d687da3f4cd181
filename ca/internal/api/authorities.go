// The authorities as operators see them: what signs, what will, what each step
// waits for; and the steps that they take by hand.

package api

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/sdk/svid"
)

// ListAuthorities implements capb.AdminServer.
func (s *Service) ListAuthorities(context.Context, *capb.ListAuthoritiesRequest) (*capb.ListAuthoritiesResponse, error) {
	resp := &capb.ListAuthoritiesResponse{Authorities: s.authorities(time.Now())}
	for _, rec := range s.registry.Replicas() {
		resp.Authorities = append(resp.Authorities, intermediatesToProto(rec, time.Now())...)
	}
	slices.SortStableFunc(resp.Authorities, func(a, b *capb.CAAuthority) int {
		return cmp.Or(-strings.Compare(a.GetKind(), b.GetKind()), strings.Compare(a.GetReplica(), b.GetReplica()))
	})
	return resp, nil
}

// authorities are the roots and JWT keys, each with its next step.
func (s *Service) authorities(now time.Time) (all []*capb.CAAuthority) {
	set, view := s.registry.Rotation(now, registry.Viewer{Replica: s.opts.ReplicaName, X509SVID: s.opts.X509SVIDTTL, JWTSVID: s.opts.JWTSVIDTTL})
	pending := make(map[string]rotation.Pending)
	for _, p := range rotation.Waiting(set, view, s.opts.Rotation, now) {
		pending[p.ID] = p
	}
	for _, a := range set.All() {
		p := authorityToProto(a)
		if step, ok := pending[a.ID]; ok {
			p.Pending = &capb.PendingStep{
				Step: string(step.Next), Ready: step.Wait.Over(now), Agents: step.Wait.Agents, Replicas: step.Wait.Replicas, SilentReplicas: step.Wait.Silent,
				NotBefore: timestamp(step.Wait.Until), LastCall: timestamp(step.Wait.Latest),
			}
		}
		all = append(all, p)
	}
	return all
}

func authorityToProto(a rotation.Authority) *capb.CAAuthority {
	p := &capb.CAAuthority{
		AuthorityId: a.ID, Kind: string(a.Kind), State: string(a.State), Replica: a.Replica,
		NotBefore: timestamp(a.NotBefore), NotAfter: timestamp(a.NotAfter), Since: make(map[string]*timestamppb.Timestamp),
	}
	if cert, err := x509.ParseCertificate(a.Certificate); err == nil {
		p.RootHash = svid.KeyHash(cert)
	}
	for state, t := range a.Since {
		p.Since[string(state)] = timestamp(t)
	}
	return p
}

// intermediatesToProto lists what the replica issues under, and has issued under
// and is not over.
func intermediatesToProto(rec *replica.Record, now time.Time) (all []*capb.CAAuthority) {
	for _, a := range rec.Authorities {
		state := rotation.Old
		if a.ID == rec.Current().ID {
			state = rotation.Active
		}
		if state == rotation.Old && !now.Before(a.NotAfter) {
			continue
		}
		all = append(all, &capb.CAAuthority{
			AuthorityId: a.ID, Kind: string(rotation.Intermediate), State: string(state), Replica: rec.Name,
			NotAfter: timestamp(a.NotAfter), RootAuthorityId: a.Root,
		})
	}
	return all
}

// PrepareAuthority implements capb.AdminServer.
func (s *Service) PrepareAuthority(ctx context.Context, req *capb.PrepareAuthorityRequest) (*capb.PrepareAuthorityResponse, error) {
	id, revision, err := s.opts.Authorities.Prepare(ctx, rotation.Kind(req.GetKind()))
	if err != nil {
		return nil, err
	}
	a, err := s.stepped(ctx, "prepare authority, "+req.GetKind(), id, revision)
	if err != nil {
		return nil, err
	}
	return &capb.PrepareAuthorityResponse{Authority: a}, nil
}

// ActivateAuthority implements capb.AdminServer.
func (s *Service) ActivateAuthority(ctx context.Context, req *capb.ActivateAuthorityRequest) (*capb.ActivateAuthorityResponse, error) {
	a, err := s.step(ctx, rotation.Command{Verb: rotation.Activate, ID: req.GetAuthorityId(), Force: req.GetForce()})
	if err != nil {
		return nil, err
	}
	return &capb.ActivateAuthorityResponse{Authority: a}, nil
}

// TaintAuthority implements capb.AdminServer.
func (s *Service) TaintAuthority(ctx context.Context, req *capb.TaintAuthorityRequest) (*capb.TaintAuthorityResponse, error) {
	a, err := s.step(ctx, rotation.Command{Verb: rotation.Taint, ID: req.GetAuthorityId()})
	if err != nil {
		return nil, err
	}
	return &capb.TaintAuthorityResponse{Authority: a}, nil
}

// RevokeAuthority implements capb.AdminServer.
func (s *Service) RevokeAuthority(ctx context.Context, req *capb.RevokeAuthorityRequest) (*capb.RevokeAuthorityResponse, error) {
	a, err := s.step(ctx, rotation.Command{Verb: rotation.Revoke, ID: req.GetAuthorityId(), Force: req.GetForce()})
	if err != nil {
		return nil, err
	}
	return &capb.RevokeAuthorityResponse{Authority: a}, nil
}

// takesStep says why an authority takes no steps, and what to do instead.
func (s *Service) takesStep(c rotation.Command) error {
	if c.ID == "" {
		return &entry.InvalidError{Field: "authority_id", Reason: "is missing"}
	}
	if _, ok := s.registry.Authorities().Get(c.ID); ok {
		return nil
	}
	rec, ok := s.registry.ReplicaOf(c.ID)
	if !ok {
		return status.Errorf(codes.NotFound, "%s %.80q: %v", c.Verb, c.ID, rotation.ErrUnknown)
	}
	instead := "it signs from when it is made, and is renewed by itself"
	if c.Verb != rotation.Activate {
		instead = "it is renewed by itself, and ends within a day; to replace all that is under its root, " + string(c.Verb) +
			" the root; to revoke what it has signed, merlon revoke --authority " + c.ID + "; where its key is in wrong hands, evict the replica"
	}
	return status.Errorf(codes.FailedPrecondition, "%s %s: it is an intermediate, of replica %s: %s", c.Verb, c.ID, rec.Name, instead)
}

// step takes one step and records it.
func (s *Service) step(ctx context.Context, c rotation.Command) (*capb.CAAuthority, error) {
	if len(c.ID) > maxAuthorityBytes {
		return nil, &entry.InvalidError{Field: "authority_id", Reason: "is too long"}
	}
	what := string(c.Verb) + " authority"
	if c.Force {
		what += " by force"
	}
	if err := s.takesStep(c); err != nil {
		return nil, err
	}
	revision, err := s.opts.Authorities.Take(ctx, c)
	if err != nil {
		return nil, err
	}
	return s.stepped(ctx, what, c.ID, revision)
}

// stepped records what was done, and returns the authority once the picture has
// it.
func (s *Service) stepped(ctx context.Context, what, id string, revision uint64) (*capb.CAAuthority, error) {
	if err := s.done(ctx, audit.Record{Detail: what, AuthorityID: id}); err != nil {
		return nil, err
	}
	if err := s.registry.Wait(ctx, revision); err != nil {
		return nil, err
	}
	for _, a := range s.authorities(time.Now()) {
		if a.GetAuthorityId() == id {
			return a, nil
		}
	}
	return nil, fmt.Errorf("%s %s: %w", what, id, rotation.ErrUnknown)
}
