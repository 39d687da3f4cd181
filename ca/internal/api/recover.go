// Recovery of agents whose own X509-SVID ended (attest.Recovered): the agent has
// proved itself by it, on a connection without a client certificate.

package api

import (
	"context"
	"errors"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/svid"
)

// recover gives an agent another SVID for the last one that it got. The
// revocations that can concern that are all there: they are kept for as long as
// any SVID can live, and one that was issued longer ago is refused.
func (s *Service) recover(ctx context.Context, req *capb.AttestRequest) (*capb.AttestResponse, error) {
	key, err := authority.PublicKeyFromCSR(req.GetCsr()) // not a new one, where an answer was lost
	if err != nil {
		return nil, s.refuseAttest(ctx, "csr", err)
	}
	former, err := s.proveFormer(ctx, req)
	if err != nil {
		return nil, s.refuseAttest(ctx, attestReason(err), err)
	}
	g := s.registry.Grounds(former)
	if fault := agentFault(g, former); fault != nil {
		err := attest.Withdrawn(fault)
		return nil, s.refuseAttest(ctx, attestReason(err), err)
	}
	ca := s.opts.Keys.X509()
	by := *g.Agent
	by.Attestation = attest.OwnSVID // for the record
	leaf, err := s.signAgent(ctx, ca, &by, g.Revision, key, audit.Attest, func(leaf *authority.Leaf) error {
		err := attest.Recovered(ctx, s.opts.Store, former, issuedTo(leaf, key))
		if errors.Is(err, attest.ErrCloned) {
			s.metrics.attestation.WithLabelValues(attest.OwnSVID + "_cloned").Inc()
			return s.cloned(ctx, &Caller{Name: former.ID.String(), Peer: former, Agent: g.Agent})
		}
		return err
	})
	if err != nil {
		return nil, s.toStatus(ctx, err)
	}
	return &capb.AttestResponse{X509Svid: chainOf(ca, leaf), TrustBundle: s.trustToProto(s.registry.Trust())}, nil
}

func (s *Service) proveFormer(ctx context.Context, req *capb.AttestRequest) (*svid.Peer, error) {
	if s.opts.AgentRecovery <= s.opts.AgentSVIDTTL {
		return nil, attest.NotTaken(attest.OwnSVID, "agent_recovery in its configuration is not longer than agent_svid_ttl: attest the node anew, with a join token")
	}
	statement, err := statementOf(ctx, req.GetCsr())
	if err != nil {
		return nil, err
	}
	own := req.GetOwnSvid()
	return attest.ProveFormer(own.GetChain(), own.GetSignature(), statement, s.registry, s.registry.Trust().Tainted, s.opts.AgentRecovery, time.Now())
}
