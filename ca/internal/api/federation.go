// Admin: trust bundles of other trust domains, as administrators set them.

package api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

// SetFederatedBundle implements capb.AdminServer.
func (s *Service) SetFederatedBundle(ctx context.Context, req *capb.SetFederatedBundleRequest) (*capb.SetFederatedBundleResponse, error) {
	b, err := s.newFederated(req)
	if err != nil {
		return nil, err
	}
	held, cmp, err := s.heldFederated(ctx, b.TrustDomain)
	if err != nil && !errors.Is(err, trust.ErrNoFederated) {
		return nil, err
	}
	if !req.GetForce() {
		if err := b.CheckFollows(held); err != nil {
			return nil, err
		}
	}
	if held == nil && len(s.registry.Federated()) >= trust.MaxFederated {
		return nil, &entry.InvalidError{Field: "trust_domain", Reason: fmt.Sprintf("this CA federates with %d trust domains already, which is the most", trust.MaxFederated)}
	}
	op, err := b.Put()
	if err != nil {
		return nil, err
	}
	detail := fmt.Sprintf("set federated bundle of %s: sequence %d, sha256 %s", b.TrustDomain, b.Sequence, b.Digest())
	if err := s.commitFederated(ctx, cmp, op, detail); err != nil {
		return nil, err
	}
	return &capb.SetFederatedBundleResponse{FederatedBundle: federatedToProto(b), Ignored: b.Ignored}, nil
}

// newFederated is the trust bundle that the request brings, if it may be taken
// whatever is known.
func (s *Service) newFederated(req *capb.SetFederatedBundleRequest) (*trust.Federated, error) {
	td, err := entry.ParseTrustDomain("trust_domain", req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	b, err := trust.NewFederated(s.opts.TrustDomain, td, req.GetDocument(), time.Now())
	if err != nil {
		return nil, &entry.InvalidError{Field: "document", Reason: err.Error()}
	}
	if err := s.checkUnshared(b); err != nil {
		return nil, err
	}
	return b, nil
}

// checkUnshared refuses a key that vouches for another trust domain already.
func (s *Service) checkUnshared(b *trust.Federated) error {
	refuse := func(what string, with spiffeid.TrustDomain) error {
		return &entry.InvalidError{Field: "document", Reason: fmt.Sprintf("%s is in the trust bundle of %s too, and no key vouches for two trust domains", what, with)}
	}
	if own := s.registry.Trust(); own != nil {
		keys := &trust.Document{X509: own.Keys.X509Authorities(), JWT: own.Keys.JWTAuthorities()}
		if what, shared := b.SharedKey(keys); shared {
			return refuse(what, own.TrustDomain)
		}
	}
	for _, other := range s.registry.Federated() {
		if other.TrustDomain == b.TrustDomain {
			continue
		}
		if what, shared := b.SharedKey(other.Document); shared {
			return refuse(what, other.TrustDomain)
		}
	}
	return nil
}

// heldFederated reads what is known of td, and the comparison that holds until
// somebody else changes it. ErrNoFederated comes with a comparison, too; a record
// that cannot be read is nothing to compare with, and can be replaced.
func (s *Service) heldFederated(ctx context.Context, td spiffeid.TrustDomain) (*trust.Federated, store.Cmp, error) {
	key := trust.FederatedPrefix + td.Name()
	kv, _, err := s.opts.Store.Get(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		return nil, store.Cmp{Key: key}, trust.ErrNoFederated
	}
	if err != nil {
		return nil, store.Cmp{}, fmt.Errorf("read the trust bundle of %s: %w", td, err)
	}
	held, err := trust.DecodeFederated(kv)
	if err != nil {
		return nil, store.Cmp{Key: key, ModRevision: kv.ModRevision}, nil //nolint:nilerr // see above
	}
	return held, store.Cmp{Key: key, ModRevision: kv.ModRevision}, nil
}

// commitFederated writes, unless somebody else did meanwhile, and returns when
// every stream of this replica is about to hear of it.
func (s *Service) commitFederated(ctx context.Context, cmp store.Cmp, op store.Op, detail string) error {
	res, err := s.opts.Store.Txn(ctx, []store.Cmp{cmp}, []store.Op{op}, nil)
	if err != nil {
		return fmt.Errorf("write %s: %w", cmp.Key, err)
	}
	if !res.Succeeded {
		return status.Error(codes.Aborted, "somebody else changed the trust bundle meanwhile: look at it, and try again")
	}
	if err := s.done(ctx, audit.Record{Detail: detail}); err != nil {
		return err
	}
	return s.registry.Wait(ctx, res.Revision)
}

// ListFederatedBundles implements capb.AdminServer.
func (s *Service) ListFederatedBundles(context.Context, *capb.ListFederatedBundlesRequest) (*capb.ListFederatedBundlesResponse, error) {
	resp := &capb.ListFederatedBundlesResponse{}
	for _, b := range s.registry.Federated() {
		p := federatedToProto(b)
		p.TrustBundle.Jwks = nil
		resp.FederatedBundles = append(resp.FederatedBundles, p)
	}
	return resp, nil
}

// GetFederatedBundle implements capb.AdminServer.
func (s *Service) GetFederatedBundle(_ context.Context, req *capb.GetFederatedBundleRequest) (*capb.GetFederatedBundleResponse, error) {
	td, err := entry.ParseTrustDomain("trust_domain", req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	b, ok := s.registry.FederatedBundle(td.Name())
	if !ok {
		return nil, trust.ErrNoFederated
	}
	return &capb.GetFederatedBundleResponse{FederatedBundle: federatedToProto(b)}, nil
}

// RemoveFederatedBundle implements capb.AdminServer.
func (s *Service) RemoveFederatedBundle(ctx context.Context, req *capb.RemoveFederatedBundleRequest) (*capb.RemoveFederatedBundleResponse, error) {
	td, err := entry.ParseTrustDomain("trust_domain", req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	held, cmp, err := s.heldFederated(ctx, td)
	if err != nil {
		return nil, err
	}
	detail := fmt.Sprintf("remove federated bundle of %s", td)
	if err := s.commitFederated(ctx, cmp, store.Delete(cmp.Key), detail); err != nil {
		return nil, err
	}
	if held == nil { // it could not be read
		held = &trust.Federated{TrustDomain: td, Document: &trust.Document{}}
	}
	return &capb.RemoveFederatedBundleResponse{FederatedBundle: federatedToProto(held)}, nil
}

// waiting are those of the entry's trust domains of which there is no trust bundle.
func (s *Service) waiting(e *entry.Entry) (names []string) {
	for _, td := range e.FederatesWith {
		if _, ok := s.registry.FederatedBundle(td); !ok {
			names = append(names, td)
		}
	}
	return names
}

// entryForAdmin is an entry with what the CA alone knows of it.
func (s *Service) entryForAdmin(e *entry.Entry) *capb.Entry {
	p := entryToProto(e)
	p.FederationWaiting = s.waiting(e)
	return p
}

// federatedTrust is b as agents get it.
func federatedTrust(b *trust.Federated) *capb.TrustBundle {
	return &capb.TrustBundle{TrustDomain: b.TrustDomain.Name(), Sequence: b.Sequence, Jwks: b.JWKS}
}

func federatedToProto(b *trust.Federated) *capb.FederatedBundle {
	p := &capb.FederatedBundle{
		TrustBundle: federatedTrust(b), SetAt: timestamp(b.SetAt),
		JwtKeyIds: slices.Sorted(maps.Keys(b.JWT)), NotAfter: timestamp(b.End()),
	}
	for _, cert := range b.X509 {
		p.RootHashes = append(p.RootHashes, svid.KeyHash(cert))
	}
	return p
}
