// A policy's candidate over gRPC: staged, put into force, taken away; and the way back
// to an earlier policy.

package api

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/release"
)

// maxCanaryDestinations bounds what travels with each announcement.
const maxCanaryDestinations = 100

// bundleName is the policy bundle that is meant by name.
func bundleName(name string) string { return cmp.Or(name, release.DefaultName) }

// StageCandidate implements capb.AdminServer.
func (s *Service) StageCandidate(ctx context.Context, req *capb.StageCandidateRequest) (*capb.StageCandidateResponse, error) {
	canary, err := canaryOf(req.GetCanary())
	if err != nil {
		return nil, err
	}
	head, err := s.opts.Releases.Stage(ctx, bundleName(req.GetName()), req.GetGeneration(), canary)
	b, err := s.changed(ctx, head, err, func() string {
		c := head.Candidate
		if c.Canary.Shadow() {
			return fmt.Sprintf("candidate %d of policy bundle %s back to shadow", c.Generation, head.Name)
		}
		return fmt.Sprintf("candidate %d of policy bundle %s decides for %d per mille and %q", c.Generation, head.Name, c.Canary.PerMille, c.Canary.Destinations)
	})
	return &capb.StageCandidateResponse{PolicyBundle: b}, err
}

func canaryOf(pb *capb.PolicyCanary) (release.Canary, error) {
	c := release.Canary{PerMille: pb.GetPerMille(), Destinations: slices.Clone(pb.GetDestinations())}
	if c.PerMille > 1000 {
		return c, &entry.InvalidError{Field: "per_mille", Reason: fmt.Sprintf("%d is more than all", c.PerMille)}
	}
	if len(c.Destinations) > maxCanaryDestinations {
		return c, &entry.InvalidError{Field: "destinations", Reason: fmt.Sprintf("has %d SPIFFE IDs; at most %d", len(c.Destinations), maxCanaryDestinations)}
	}
	for _, d := range c.Destinations {
		if id, err := spiffeid.FromString(d); err != nil || id.Path() == "" {
			return c, &entry.InvalidError{Field: "destinations", Reason: fmt.Sprintf("%.200q is not the SPIFFE ID of a service", d)}
		}
	}
	slices.Sort(c.Destinations)
	c.Destinations = slices.Compact(c.Destinations)
	return c, nil
}

// PromoteCandidate implements capb.AdminServer.
func (s *Service) PromoteCandidate(ctx context.Context, req *capb.PromoteCandidateRequest) (*capb.PromoteCandidateResponse, error) {
	head, err := s.opts.Releases.Promote(ctx, bundleName(req.GetName()), req.GetGeneration())
	b, err := s.changed(ctx, head, err, func() string {
		return fmt.Sprintf("promote candidate %d of policy bundle %s, generation %d", head.Of, head.Name, head.Generation)
	})
	return &capb.PromoteCandidateResponse{PolicyBundle: b}, err
}

// AbortCandidate implements capb.AdminServer.
func (s *Service) AbortCandidate(ctx context.Context, req *capb.AbortCandidateRequest) (*capb.AbortCandidateResponse, error) {
	head, err := s.opts.Releases.Abort(ctx, bundleName(req.GetName()), req.GetGeneration())
	b, err := s.changed(ctx, head, err, func() string { return "abort the candidate of policy bundle " + head.Name })
	return &capb.AbortCandidateResponse{PolicyBundle: b}, err
}

// RollBackPolicy implements capb.AdminServer.
func (s *Service) RollBackPolicy(ctx context.Context, req *capb.RollBackPolicyRequest) (*capb.RollBackPolicyResponse, error) {
	head, err := s.opts.Releases.RollBack(ctx, bundleName(req.GetName()), req.GetTo())
	b, err := s.changed(ctx, head, err, func() string {
		return fmt.Sprintf("roll policy bundle %s back to the content of generation %d, generation %d", head.Name, head.Of, head.Generation)
	})
	return &capb.RollBackPolicyResponse{PolicyBundle: b}, err
}

// changed records what was done to a head, and waits until agents hear of it.
func (s *Service) changed(ctx context.Context, head *release.Head, err error, what func() string) (*capb.PolicyBundle, error) {
	if err != nil {
		return nil, err
	}
	if err := s.done(ctx, audit.Record{Detail: what()}); err != nil {
		return nil, err
	}
	return s.policyBundle(head), s.registry.Wait(ctx, head.Revision)
}

// ListPolicyGenerations implements capb.AdminServer.
func (s *Service) ListPolicyGenerations(_ context.Context, req *capb.ListPolicyGenerationsRequest) (*capb.ListPolicyGenerationsResponse, error) {
	head, err := s.policyHead(req.GetName())
	if err != nil {
		return nil, err
	}
	resp := &capb.ListPolicyGenerationsResponse{}
	for i, r := range append([]release.Release{head.Release}, head.History...) {
		resp.Generations = append(resp.Generations, &capb.PolicyGeneration{
			Generation: r.Generation, IssuedAt: timestamp(r.IssuedAt), How: cmp.Or(r.How, release.Pushed), Of: r.Of,
			SizeBytes: uint32(r.SizeBytes), Active: i == 0,
		})
	}
	return resp, nil
}

// policyHead is the head of the bundle called name, "" for the default.
func (s *Service) policyHead(name string) (*release.Head, error) {
	name = bundleName(name)
	if err := release.CheckName(name); err != nil {
		return nil, err
	}
	head, ok := s.registry.PolicyHead(name)
	if !ok {
		return nil, release.ErrNone
	}
	return head, nil
}

func candidateToProto(c *release.Candidate) *capb.PolicyCandidate {
	if c == nil {
		return nil
	}
	pb := &capb.PolicyCandidate{
		Generation: c.Generation, Stage: capb.PolicyStage_POLICY_STAGE_SHADOW, Step: c.Step, Since: timestamp(c.Since),
	}
	if !c.Canary.Shadow() {
		pb.Stage = capb.PolicyStage_POLICY_STAGE_CANARY
		pb.Canary = &capb.PolicyCanary{Destinations: c.Canary.Destinations, PerMille: c.Canary.PerMille}
	}
	if a := c.Alarm; a != nil {
		pb.Alarm = &capb.PolicyAlarm{At: timestamp(a.At), Destination: a.Destination, Allowed: a.Allowed, Denied: a.Denied}
	}
	return pb
}
