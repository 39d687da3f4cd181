// Keys that never leave this process: where its registration entry lets it, the
// process makes its key itself and shows the agent a CSR, for each X509-SVID a new
// one.

package sdk

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy/denial"
)

// errKeysByAgent says that the Workload API has this process's X509-SVID.
var errKeysByAgent = errors.New("the agent makes the key")

// The agent's reasons (google.rpc.ErrorInfo) by which the two ways point to each
// other.
const (
	reasonByAgent    = "KEY_DELIVERY_AGENT"
	reasonByWorkload = "KEY_DELIVERY_WORKLOAD"
)

// keysByWorkload says that the agent hands no key out, now that the registration
// entry says so: holdKeys has the next one. It is no withdrawal.
func keysByWorkload(err error) bool { return reasonIs(err, reasonByWorkload) }

func reasonIs(err error, reason string) bool {
	info, found := denial.Info(status.Convert(err))
	return found && info.GetReason() == reason
}

// heldKeys are those of this process.
type heldKeys struct {
	stream   agentpb.Local_HoldKeysClient
	current  *ecdsa.PrivateKey // that of the X509-SVID in use
	next     *ecdsa.PrivateKey // that of the last CSR
	answered uint64            // the last wish for a CSR
}

// holdKeys is one stream of X509-SVIDs for keys of this process. It returns
// errKeysByAgent where there is no such thing, and to agents that know none.
func (id *Identity) holdKeys(ctx context.Context, progress func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := id.agent.local.HoldKeys(ctx)
	if err != nil {
		return byAgent(err)
	}
	h := &heldKeys{stream: stream}
	for {
		res, err := stream.Recv()
		if err = byAgent(err); status.Code(err) == codes.PermissionDenied && !errors.Is(err, errKeysByAgent) {
			id.withdraw(ctx, err)
		}
		if err != nil {
			return err
		}
		if len(res.GetIdentities()) == 0 {
			return fmt.Errorf("%w: it has no identity", errBadAnswer)
		}
		first := res.GetIdentities()[0] // the default identity, as with the Workload API
		if first.GetByAgent() {
			return errKeysByAgent
		}
		if err := h.show(first); err != nil {
			return err
		}
		if len(first.GetX509Svid()) == 0 {
			if first.GetRefusal() != "" {
				id.ready.fail(identityFeed, errors.New(first.GetRefusal()))
			}
			continue // what is held stays until it expires
		}
		own, err := h.withKey(first, res.GetBundles())
		if err != nil {
			return fmt.Errorf("%w: %w", errBadAnswer, err)
		}
		if err := id.take(ctx, own); err != nil {
			return err
		}
		progress()
	}
}

// byAgent tells the answers that point to the Workload API from others.
func byAgent(err error) error {
	if status.Code(err) == codes.Unimplemented || reasonIs(err, reasonByAgent) {
		return errKeysByAgent
	}
	return err
}

// show makes a key and shows its CSR, when one is wanted.
func (h *heldKeys) show(identity *agentpb.HeldIdentity) error {
	if wish := identity.GetCsrWanted(); wish == 0 || wish == h.answered {
		return nil
	}
	h.answered = identity.GetCsrWanted()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return fmt.Errorf("make a CSR: %w", err)
	}
	h.next = key
	if err := h.stream.Send(&agentpb.HoldKeysRequest{SpiffeId: identity.GetSpiffeId(), Csr: csr}); err != nil {
		_, err = h.stream.Recv() // Send says only that the stream has ended
		return err
	}
	return nil
}

// withKey is the identity as the Workload API would have it, had it the key.
func (h *heldKeys) withKey(identity *agentpb.HeldIdentity, bundles map[string][]byte) (*workload.X509SVIDResponse, error) {
	certs, err := x509.ParseCertificates(identity.GetX509Svid())
	if err != nil || len(certs) == 0 {
		return nil, fmt.Errorf("the X509-SVID of %s does not parse: %w", identity.GetSpiffeId(), err)
	}
	if h.next != nil && h.next.PublicKey.Equal(certs[0].PublicKey) {
		h.current, h.next = h.next, nil
	}
	if h.current == nil || !h.current.PublicKey.Equal(certs[0].PublicKey) {
		return nil, fmt.Errorf("the X509-SVID of %s has a key that is not of this process", identity.GetSpiffeId())
	}
	key, err := x509.MarshalPKCS8PrivateKey(h.current)
	if err != nil {
		return nil, err
	}
	parsed, err := spiffeid.FromString(identity.GetSpiffeId())
	if err != nil {
		return nil, err
	}
	own := parsed.TrustDomain().IDString()
	res := &workload.X509SVIDResponse{
		Svids: []*workload.X509SVID{{
			SpiffeId: identity.GetSpiffeId(), X509Svid: identity.GetX509Svid(), X509SvidKey: key, Bundle: bundles[own], Hint: identity.GetHint(),
		}},
		FederatedBundles: make(map[string][]byte),
	}
	for td, bundle := range bundles {
		if td != own {
			res.FederatedBundles[td] = bundle
		}
	}
	return res, nil
}
