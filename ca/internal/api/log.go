// What the log holds, for auditors.

package api

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/checkpoint"
)

// maxProofs bounds the work of one call and its answer, which is below 2 MiB.
const maxProofs = 1000

// ProveIssuances implements capb.AdminServer. One at a time: each reads the
// whole log.
func (s *Service) ProveIssuances(ctx context.Context, req *capb.ProveIssuancesRequest) (*capb.ProveIssuancesResponse, error) {
	if n := len(req.GetSerials()); n == 0 || n > maxProofs {
		return nil, status.Errorf(codes.InvalidArgument, "serials: %d given; 1 to %d", n, maxProofs)
	}
	select {
	case s.proving <- struct{}{}:
		defer func() { <-s.proving }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	proofs, under, begins, err := s.opts.Audit.Prove(ctx, req.GetSerials()...)
	if err != nil {
		return nil, err
	}
	chain, err := s.opts.Audit.Chain()
	if err != nil {
		return nil, err
	}
	resp := &capb.ProveIssuancesResponse{
		Checkpoint: under.Note, Certificates: chain, ReplicaName: s.opts.ReplicaName, Issuers: s.issuers(),
		FirstIndex: begins.Index, BeginsAt: timestamp(begins.At),
	}
	for _, p := range proofs {
		resp.Proofs = append(resp.Proofs, &capb.IssuanceProof{
			Serial: p.Serial, Index: p.Index, Entry: p.Entry, Hashes: checkpoint.HashesToBytes(p.Hashes),
		})
	}
	return resp, nil
}

// issuers are the authorities that replicas have, or had lately.
func (s *Service) issuers() (issuers []*capb.Issuer) {
	for _, r := range s.registry.Replicas() {
		for _, a := range r.Authorities {
			issuers = append(issuers, &capb.Issuer{AuthorityId: a.ID, ReplicaName: r.Name})
		}
	}
	return issuers
}

// LogName is the name of this replica's log below /log/.
func (s *Service) LogName() string { return s.opts.ReplicaName }
