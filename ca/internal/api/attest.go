// Attest: evidence about a node for the SVID of the agent on it. Kinds of
// evidence that the CA is not configured for are refused.

package api

import (
	"context"
	"crypto"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/sdk/possession"
)

// proveTimeout bounds the check of evidence, with all that others are asked for.
const proveTimeout = 10 * time.Second

// Attest implements capb.NodeServer. The CSR is judged before the evidence, so
// that a bad one costs no token.
func (s *Service) Attest(ctx context.Context, req *capb.AttestRequest) (*capb.AttestResponse, error) {
	if req.GetOwnSvid() != nil {
		return s.recover(ctx, req)
	}
	key, err := s.attestKey(req.GetCsr())
	if err != nil {
		return nil, s.refuseAttest(ctx, "csr", err)
	}
	now := time.Now()
	ca := s.opts.Keys.X509()
	notAfter := now.Add(s.opts.AgentSVIDTTL)
	if end := ca.NotAfter(); end.Before(notAfter) {
		notAfter = end
	}
	agent, err := s.enroll(ctx, req, now, notAfter)
	if err != nil {
		return nil, s.refuseAttest(ctx, attestReason(err), err)
	}
	// The record's own revision: a revocation that comes while the SVID is being
	// signed concerns it.
	leaf, err := s.signAgent(ctx, ca, agent, agent.Revision, key, audit.Attest, func(*authority.Leaf) error { return nil })
	if err != nil {
		return nil, err
	}
	// The agent's next call must find the record.
	if err := s.registry.Wait(ctx, agent.Revision); err != nil {
		return nil, err
	}
	return &capb.AttestResponse{X509Svid: chainOf(ca, leaf), TrustBundle: s.trustToProto(s.registry.Trust())}, nil
}

func (s *Service) attestKey(csr []byte) (crypto.PublicKey, error) {
	key, err := authority.PublicKeyFromCSR(csr)
	if err != nil {
		return nil, err
	}
	if id, err := authority.IdentifyKey(key); err != nil || s.keys.Held(id, time.Now()) {
		return nil, &entry.InvalidError{Field: "csr", Reason: "has a key that has an SVID already: make a new one"}
	}
	return key, nil
}

// enroll checks the evidence of req and makes the agent live. A join token is
// used up by that; other evidence proves a node, which is then enrolled.
func (s *Service) enroll(ctx context.Context, req *capb.AttestRequest, now, notAfter time.Time) (*attest.Agent, error) {
	if token, ok := req.GetEvidence().(*capb.AttestRequest_JoinToken); ok {
		return attest.RedeemJoinToken(ctx, s.opts.Store, s.opts.TrustDomain, token.JoinToken, now, notAfter)
	}
	bounded, cancel := context.WithTimeout(ctx, proveTimeout)
	defer cancel()
	node, err := s.prove(bounded, req, now)
	if err != nil {
		return nil, err
	}
	return attest.Enroll(ctx, s.opts.Store, node, now, notAfter)
}

func (s *Service) prove(ctx context.Context, req *capb.AttestRequest, now time.Time) (*attest.Node, error) {
	switch evidence := req.GetEvidence().(type) {
	case *capb.AttestRequest_X509Pop:
		if s.opts.Attestors.POP == nil {
			return nil, attest.NotTaken(attest.X509POP, "set node_attestors.x509pop in its configuration, or attest with a join token")
		}
		statement, err := statementOf(ctx, req.GetCsr())
		if err != nil {
			return nil, err
		}
		return s.opts.Attestors.POP.Prove(evidence.X509Pop.GetChain(), evidence.X509Pop.GetSignature(), statement, now)
	case *capb.AttestRequest_K8S:
		cluster, ok := s.opts.Attestors.Clusters[evidence.K8S.GetCluster()]
		if !ok {
			return nil, attest.NotTaken(attest.K8s, "set the cluster in node_attestors.k8s in its configuration, under the name that the agent has as k8s_cluster")
		}
		return cluster.Prove(ctx, evidence.K8S.GetToken(), now)
	case *capb.AttestRequest_GcpToken:
		if s.opts.Attestors.GCP == nil {
			return nil, attest.NotTaken(attest.GCPKind, "set node_attestors.gcp in its configuration")
		}
		return s.opts.Attestors.GCP.Prove(ctx, evidence.GcpToken, now)
	case *capb.AttestRequest_AzureToken:
		if s.opts.Attestors.Azure == nil {
			return nil, attest.NotTaken(attest.AzureKind, "set node_attestors.azure in its configuration")
		}
		return s.opts.Attestors.Azure.Prove(ctx, evidence.AzureToken, now)
	case *capb.AttestRequest_AwsDocument:
		if s.opts.Attestors.AWS == nil {
			return nil, attest.NotTaken(attest.AWSKind, "set node_attestors.aws in its configuration")
		}
		d := evidence.AwsDocument
		return s.opts.Attestors.AWS.Prove(attest.AWSDocument{Document: d.GetDocument(), SignedAttributes: d.GetSignedAttributes(), Signature: d.GetSignature()}, now)
	default:
		return nil, &entry.InvalidError{Field: "evidence", Reason: "is missing, or of a kind that this CA does not know"}
	}
}

// statementOf is what a node signs to prove that it holds a key: on the
// connection of ctx, for csr.
func statementOf(ctx context.Context, csr []byte) ([]byte, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(tlsInfo); ok {
			return possession.Statement(info.State, csr)
		}
	}
	return nil, status.Error(codes.FailedPrecondition, "attest by x509pop: this is no TLS connection")
}

func attestReason(err error) string {
	if e, ok := errors.AsType[*attest.RefusedError](err); ok {
		return e.Kind + "_" + string(e.Reason)
	}
	if _, ok := errors.AsType[*entry.InvalidError](err); ok {
		return "no_evidence"
	}
	switch {
	case errors.Is(err, attest.ErrUnknownToken):
		return "unknown_token"
	case errors.Is(err, attest.ErrExpiredToken):
		return "expired_token"
	case errors.Is(err, attest.ErrAttestedOnce):
		return "attested_once"
	case errors.Is(err, attest.ErrUsedEvidence):
		return "used_evidence"
	case errors.Is(err, attest.ErrBanned):
		return "banned_agent"
	default:
		return "internal"
	}
}

// attestStatus is the answer to evidence that is refused. What it is checked with
// may be there the next time.
func attestStatus(e *attest.RefusedError) error {
	if e.Reason == attest.Unavailable {
		return status.Error(codes.Unavailable, e.Error())
	}
	return status.Error(codes.PermissionDenied, e.Error())
}

func (s *Service) refuseAttest(ctx context.Context, reason string, err error) error {
	s.metrics.attestation.WithLabelValues(reason).Inc()
	return s.refuse(ctx, callerFrom(ctx), audit.Record{Detail: "attest"}, s.toStatus(ctx, err))
}
