// How an agent comes by its own SVID: by the one token, by its last SVID, and by
// renewal.

package fakeca

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/possession"
)

// Attest implements capb.NodeServer.
func (ca *CA) Attest(ctx context.Context, req *capb.AttestRequest) (*capb.AttestResponse, error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.attests++
	if own := req.GetOwnSvid(); own != nil {
		return ca.recover(ctx, req)
	}
	if req.GetJoinToken() != Token || ca.tokenUsed {
		return nil, status.Error(codes.PermissionDenied, "the join token is unknown or was used")
	}
	ca.tokenUsed = true
	if ca.loseAttest {
		return nil, status.Error(codes.Unavailable, "killed between consume and reply")
	}
	chain, err := ca.sign(req.GetCsr(), ca.td.IDString()+"/agent/n1", ca.agentTTL)
	if err != nil {
		return nil, err
	}
	ca.lastAgent = chain[0]
	return &capb.AttestResponse{X509Svid: chain, TrustBundle: ca.trustBundle()}, nil
}

// recover takes the last SVID that the agent got, ended or not. mu is held.
func (ca *CA) recover(ctx context.Context, req *capb.AttestRequest) (*capb.AttestResponse, error) {
	chain := req.GetOwnSvid().GetChain()
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	p, _ := peer.FromContext(ctx)
	statement, err := possession.Statement(p.AuthInfo.(credentials.TLSInfo).State, req.GetCsr())
	if err != nil {
		return nil, err
	}
	if !possession.Verify(leaf.PublicKey, statement, req.GetOwnSvid().GetSignature()) || !bytes.Equal(chain[0], ca.lastAgent) {
		return nil, status.Error(codes.PermissionDenied, "this one was copied")
	}
	answer, err := ca.sign(req.GetCsr(), ca.td.IDString()+"/agent/n1", ca.agentTTL)
	if err != nil {
		return nil, err
	}
	ca.lastAgent, ca.recovered = answer[0], ca.recovered+1
	return &capb.AttestResponse{X509Svid: answer, TrustBundle: ca.trustBundle()}, nil
}

// Recovered says how often the agent came back by its own SVID.
func (ca *CA) Recovered() int {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.recovered
}

// Renew implements capb.NodeServer.
func (ca *CA) Renew(ctx context.Context, req *capb.RenewRequest) (*capb.RenewResponse, error) {
	if err := requireAgent(ctx); err != nil {
		return nil, err
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	chain, err := ca.sign(req.GetCsr(), ca.td.IDString()+"/agent/n1", ca.agentTTL)
	if err != nil {
		return nil, err
	}
	ca.lastAgent = chain[0]
	return &capb.RenewResponse{X509Svid: chain, TrustBundle: ca.trustBundle()}, nil
}

// requireAgent refuses callers without the agent's SVID.
func requireAgent(ctx context.Context) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return errors.New("no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return status.Error(codes.Unauthenticated, "an agent's SVID is needed")
	}
	id, err := x509svid.IDFromCert(info.State.PeerCertificates[0])
	if err != nil || id.Path() != "/agent/n1" {
		return status.Error(codes.PermissionDenied, fmt.Sprintf("%v is no agent", id))
	}
	return nil
}
