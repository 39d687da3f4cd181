// Admin: trust bundles of other trust domains, as administrators set them.

package api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/federation"
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
		if err := s.checkFile(b); err != nil {
			return nil, err
		}
	}
	if err := s.checkRoom(ctx, b.TrustDomain); err != nil {
		return nil, err
	}
	op, err := b.Put()
	if err != nil {
		return nil, err
	}
	detail := fmt.Sprintf("set federated bundle of %s: sequence %d, sha256 %s", b.TrustDomain, b.Sequence, b.Digest())
	if err := s.commitFederated(ctx, cmp, detail, op); err != nil {
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

// checkUnshared refuses a key of the own trust domain, which vouches for no other. What
// it has in common with third ones is said elsewhere (sayShared).
func (s *Service) checkUnshared(b *trust.Federated) error {
	own := s.registry.Trust()
	if own == nil {
		return nil
	}
	for _, k := range trust.SharedKeys(map[spiffeid.TrustDomain]*trust.Document{own.TrustDomain: own.Document(), b.TrustDomain: b.Document}) {
		return &entry.InvalidError{Field: "document", Reason: fmt.Sprintf("%s is in the trust bundle of %s too, and no key of ours vouches for another trust domain", k.What, own.TrustDomain)}
	}
	return nil
}

// checkFile refuses what was handed over and holds a key of a third trust domain, lest
// somebody took the wrong file. What a trust domain publishes itself is not asked about
// that: see trust.SharedKeys.
func (s *Service) checkFile(b *trust.Federated) error {
	documents := map[spiffeid.TrustDomain]*trust.Document{}
	for _, other := range s.registry.Federated() {
		documents[other.TrustDomain] = other.Document
	}
	documents[b.TrustDomain] = b.Document
	for _, k := range trust.SharedKeys(documents) {
		if slices.Contains(k.TrustDomains, b.TrustDomain) {
			return status.Errorf(codes.FailedPrecondition, "%s is in the trust bundle of %s too: whoever holds it would vouch for both", k.What, strings.Join(k.With(b.TrustDomain), ", "))
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
// every stream of this replica is about to hear of it. The zero cmp holds always.
func (s *Service) commitFederated(ctx context.Context, cmp store.Cmp, detail string, ops ...store.Op) error {
	var cmps []store.Cmp
	if cmp != (store.Cmp{}) {
		cmps = append(cmps, cmp)
	}
	res, err := s.opts.Store.Txn(ctx, cmps, ops, nil)
	if err != nil {
		return fmt.Errorf("write %s: %w", ops[0].Key, err)
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
func (s *Service) ListFederatedBundles(ctx context.Context, _ *capb.ListFederatedBundlesRequest) (*capb.ListFederatedBundlesResponse, error) {
	all, err := s.federations(ctx)
	if err != nil {
		return nil, err
	}
	resp := &capb.ListFederatedBundlesResponse{}
	for _, td := range slices.SortedFunc(maps.Keys(all), spiffeid.TrustDomain.Compare) {
		p := s.relationshipToProto(td, all[td])
		p.TrustBundle.Jwks = nil
		resp.FederatedBundles = append(resp.FederatedBundles, p)
	}
	return resp, nil
}

// GetFederatedBundle implements capb.AdminServer.
func (s *Service) GetFederatedBundle(ctx context.Context, req *capb.GetFederatedBundleRequest) (*capb.GetFederatedBundleResponse, error) {
	td, err := entry.ParseTrustDomain("trust_domain", req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	b, err := s.describeFederated(ctx, td)
	if err != nil {
		return nil, err
	}
	return &capb.GetFederatedBundleResponse{FederatedBundle: b}, nil
}

// RemoveFederatedBundle implements capb.AdminServer. What is known of the trust domain
// goes with its trust bundle: where it was fetched, and its invite.
func (s *Service) RemoveFederatedBundle(ctx context.Context, req *capb.RemoveFederatedBundleRequest) (*capb.RemoveFederatedBundleResponse, error) {
	td, err := entry.ParseTrustDomain("trust_domain", req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	was, err := s.describeFederated(ctx, td)
	if err != nil && !errors.Is(err, trust.ErrNoFederated) {
		return nil, err
	}
	_, cmp, held := s.heldFederated(ctx, td)
	if was == nil && held != nil { // not even one that cannot be read
		return nil, held
	}
	if was == nil {
		was = s.relationshipToProto(td, federation.Relationship{})
	}
	detail := fmt.Sprintf("remove federated bundle of %s", td)
	err = s.commitFederated(ctx, cmp, detail,
		store.Delete(trust.FederatedPrefix+td.Name()), store.Delete(federation.SourcePrefix+td.Name()), store.Delete(federation.InvitePrefix+td.Name()))
	if err != nil {
		return nil, err
	}
	s.metrics.forget(td) // who leads forgets it by itself
	return &capb.RemoveFederatedBundleResponse{FederatedBundle: was}, nil
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
