// Policy bundles over gRPC: pushed by operators, announced to agents.

package api

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/release"
)

// PushPolicy implements capb.AdminServer.
func (s *Service) PushPolicy(ctx context.Context, req *capb.PushPolicyRequest) (*capb.PushPolicyResponse, error) {
	name := bundleName(req.GetName())
	if req.GetCandidate() {
		head, err := s.opts.Releases.PublishCandidate(ctx, name, req.GetBundle())
		_, err = s.changed(ctx, head, err, func() string {
			return fmt.Sprintf("push candidate %d of policy bundle %s", head.Candidate.Generation, name)
		})
		if err != nil {
			return nil, err
		}
		return &capb.PushPolicyResponse{Name: name, Generation: head.Candidate.Generation, Etag: head.Candidate.ETag()}, nil
	}
	head, err := s.publish(ctx, name, req.GetBundle())
	if err != nil {
		return nil, err
	}
	return &capb.PushPolicyResponse{Name: name, Generation: head.Generation, Etag: head.ETag()}, nil
}

// Publish is PushPolicy for uploads over REST, which come by no interceptor, by a
// caller who was found to be allowed to. Errors are statuses.
func (s *Service) Publish(ctx context.Context, caller *Caller, name string, unsigned []byte) (head *release.Head, err error) {
	if err := s.Standing(); err != nil {
		return nil, err
	}
	ctx = context.WithValue(ctx, callerKey{}, caller)
	err = door{s, s.access}.act(ctx, capb.Admin_PushPolicy_FullMethodName, &capb.PushPolicyRequest{Name: name}, func(ctx context.Context) error {
		head, err = s.publish(ctx, name, unsigned)
		return err
	})
	return head, err
}

// publish makes unsigned the next generation of the policy bundle called name.
func (s *Service) publish(ctx context.Context, name string, unsigned []byte) (*release.Head, error) {
	head, err := s.opts.Releases.Publish(ctx, name, unsigned)
	_, err = s.changed(ctx, head, err, func() string { return fmt.Sprintf("push policy bundle %s, generation %d", name, head.Generation) })
	return head, err
}

// GetPolicy implements capb.AdminServer. Before the first push it answers
// generation 0 and the keys.
func (s *Service) GetPolicy(_ context.Context, req *capb.GetPolicyRequest) (*capb.GetPolicyResponse, error) {
	head, err := s.policyHead(req.GetName())
	if errors.Is(err, release.ErrNone) {
		return &capb.GetPolicyResponse{PolicyBundle: s.policyBundle(&release.Head{Name: bundleName(req.GetName())})}, nil
	}
	if err != nil {
		return nil, err
	}
	return &capb.GetPolicyResponse{PolicyBundle: s.policyBundle(head), Etag: head.ETag()}, nil
}

// FetchPolicy implements capb.AdminServer.
func (s *Service) FetchPolicy(ctx context.Context, req *capb.FetchPolicyRequest) (*capb.FetchPolicyResponse, error) {
	name := bundleName(req.GetName())
	signed, r, candidate, err := s.opts.Releases.Kept(ctx, name, req.GetGeneration())
	if err != nil {
		return nil, err
	}
	if r == nil {
		return nil, status.Errorf(codes.NotFound, "generation %d of policy bundle %s is not kept", req.GetGeneration(), name)
	}
	return &capb.FetchPolicyResponse{Bundle: signed, Keys: s.policyBundle(&release.Head{Name: name}).GetKeys(), Candidate: candidate}, nil
}

func (s *Service) policyBundle(h *release.Head) *capb.PolicyBundle {
	b := &capb.PolicyBundle{Name: h.Name, Generation: h.Generation, Candidate: candidateToProto(h.Candidate)}
	for _, k := range s.opts.Releases.Keys() {
		b.Keys = append(b.Keys, &capb.PolicyKey{Kid: k.KID, PublicKey: k.PKIX})
	}
	return b
}
