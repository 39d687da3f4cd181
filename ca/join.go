// The way of a replica, or of a nested CA, to the CA that holds the root key: to join
// it, once, and to have the next intermediate signed. As with agents, nothing is said before the
// other side has proved that it is the CA: by the pinned root at first, by the
// root at hand later.

package ca

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/nested"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/svid"
)

const (
	rootHolderTimeout = 20 * time.Second
	maxAnswerBytes    = 1 << 20
)

var (
	errNoJoinToken = errors.New("join the CA: there is no join token")
	errJoinRefused = errors.New("join the CA: the token is refused")
	errJoinOther   = errors.New("join the CA: not like this, and the token stays good")
)

// rootHolder implements upstream.RootHolder over gRPC.
type rootHolder struct {
	cfg Config
	td  spiffeid.TrustDomain
	log *slog.Logger
	// mirror is where a nested CA puts down what comes with its certificates, before
	// those are put away; nil on a replica.
	mirror *nested.Mirror
	// published is the trust bundle when the CA was opened; nil: none yet.
	published *trust.Bundle
	// own is the CA's own X509-SVID, and the roots that it knows, once there are
	// any.
	own func() (*x509svid.SVID, []*x509.Certificate, error)
}

// Join implements upstream.RootHolder.
func (h *rootHolder) Join(ctx context.Context, keys upstream.KeyRequests) (*upstream.Certificates, error) {
	token, err := h.cfg.ReadJoinToken()
	switch {
	case err != nil:
		return nil, err
	case token == "":
		return nil, errNoJoinToken
	}
	// Before the token is used up.
	if err := h.checkStore(); err != nil {
		return nil, err
	}
	cfg := svid.TLS{}.Client()
	cfg.GetClientCertificate = nil
	var root *x509.Certificate
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		peer, err := svid.VerifyPinned(cs.PeerCertificates, h.td, h.cfg.RootHash, time.Now())
		if err != nil {
			return err
		}
		root = cs.PeerCertificates[len(cs.PeerCertificates)-1]
		return svid.AdmitID(entry.CAID(h.td))(peer)
	}
	var answer *capb.ReplicaCertificates
	err = h.call(ctx, cfg, func(ctx context.Context, ca capb.ReplicaClient) error {
		resp, err := ca.Join(ctx, &capb.ReplicaJoinRequest{Token: token, Keys: requestsToProto(keys), Name: h.cfg.ReplicaName, OwnStore: h.mirror != nil})
		answer = resp.GetCertificates()
		return err
	})
	if code := status.Code(err); code == codes.PermissionDenied || code == codes.AlreadyExists {
		return nil, fmt.Errorf("%w: %s", errJoinRefused, status.Convert(err).Message())
	}
	if status.Code(err) == codes.FailedPrecondition {
		return nil, fmt.Errorf("%w: %s", errJoinOther, status.Convert(err).Message())
	}
	if err != nil {
		return nil, fmt.Errorf("join the CA at %s: %w", h.address(), err)
	}
	got, err := certificates(answer, []*x509.Certificate{root})
	if err == nil {
		err = h.putDown(ctx, answer.GetState(), h.mirror.Join)
	}
	if err != nil {
		return nil, fmt.Errorf("join the CA at %s: %w", h.address(), err)
	}
	h.log.LogAttrs(ctx, slog.LevelInfo, "joined the CA", slog.String("replica", answer.GetName()),
		slog.String("address", h.address()), slog.Time("not_after", got.Intermediate.NotAfter))
	return got, nil
}

// checkStore: replicas share a store, and what belongs to the pinned root is
// there before the first of them joins.
func (h *rootHolder) checkStore() error {
	if h.mirror != nil {
		return nil // its own: what is in it is looked at once the answer is there
	}
	if h.published == nil {
		return fmt.Errorf("join the CA: %w: it is empty", trust.ErrOtherRoot)
	}
	for _, root := range h.published.Keys.X509Authorities() {
		if strings.EqualFold(svid.KeyHash(root), h.cfg.RootHash) {
			return nil
		}
	}
	return fmt.Errorf("join the CA: %w than root_hash says", trust.ErrOtherRoot)
}

func (h *rootHolder) address() string {
	_, address := h.cfg.RootHolder()
	return address
}

// putDown puts down what a nested CA keeps in its store.
func (h *rootHolder) putDown(ctx context.Context, p *capb.SharedState, do func(context.Context, nested.State) error) error {
	switch {
	case h.mirror == nil:
		return nil
	case p == nil:
		return errNoState
	}
	return do(ctx, stateOf(p))
}

// Certify implements upstream.RootHolder.
func (h *rootHolder) Certify(ctx context.Context, keys upstream.KeyRequests) (*upstream.Certificates, error) {
	own, roots, err := h.own()
	if err != nil {
		return nil, err
	}
	bundle := x509bundle.FromX509Authorities(h.td, roots)
	cfg := svid.TLS{SVIDs: own, Bundles: bundle, Admit: svid.AdmitID(entry.CAID(h.td))}.Client()
	var answer *capb.ReplicaCertificates
	err = h.call(ctx, cfg, func(ctx context.Context, ca capb.ReplicaClient) error {
		resp, err := ca.Certify(ctx, &capb.ReplicaCertifyRequest{Keys: requestsToProto(keys)})
		answer = resp.GetCertificates()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("certify at %s: %w", h.address(), err)
	}
	got, err := certificates(answer, roots)
	if err != nil {
		return nil, err
	}
	return got, h.putDown(ctx, answer.GetState(), func(ctx context.Context, s nested.State) error {
		_, err := h.mirror.Apply(ctx, s)
		return err
	})
}

func (h *rootHolder) call(ctx context.Context, cfg *tls.Config, do func(context.Context, capb.ReplicaClient) error) error {
	conn, err := grpc.NewClient(h.address(), grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswerBytes)), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, rootHolderTimeout)
	defer cancel()
	return do(ctx, capb.NewReplicaClient(conn))
}

func requestsToProto(k upstream.KeyRequests) *capb.ReplicaKeys {
	return &capb.ReplicaKeys{IntermediateCsr: k.Intermediate, PolicyCsr: k.Policy, JwtCsr: k.JWT}
}

// certificates reads an answer, whose root must be one of those that the
// connection was verified with. The rest is checked where it is taken over.
func certificates(answer *capb.ReplicaCertificates, roots []*x509.Certificate) (*upstream.Certificates, error) {
	if len(answer.GetIntermediate()) != 1 {
		return nil, fmt.Errorf("the answer holds %d intermediates; want 1", len(answer.GetIntermediate()))
	}
	var got upstream.Certificates
	for _, c := range []struct {
		what string
		der  []byte
		to   **x509.Certificate
	}{
		{"intermediate", answer.GetIntermediate()[0], &got.Intermediate},
		{"policy certificate", answer.GetPolicyCertificate(), &got.Policy},
		{"root", answer.GetRoot(), &got.Root},
	} {
		cert, err := x509.ParseCertificate(c.der)
		if err != nil {
			return nil, fmt.Errorf("the answer's %s does not parse: %w", c.what, err)
		}
		*c.to = cert
	}
	if !slices.ContainsFunc(roots, got.Root.Equal) {
		return nil, errors.New("the answer holds another root than the one that the CA has shown")
	}
	return &got, nil
}
