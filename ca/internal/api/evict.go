// Replicas as operators see them: who is there, and away with one.

package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rollout"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// evictedLife is how long an authority that was taken away stays on the list of
// revocations after its end: clocks differ.
const evictedLife = time.Minute

// errNoReplica is returned when no replica has the given name.
var errNoReplica = status.Error(codes.NotFound, "no such replica")

// createReplicaToken makes a token with which a CA joins as the named replica, or
// as the named nested CA.
func (s *Service) createReplicaToken(ctx context.Context, req *capb.CreateTokenRequest) (*capb.CreateTokenResponse, error) {
	nested := req.GetKind() == capb.TokenKind_TOKEN_KIND_NESTED_CA
	switch {
	case nested && (s.opts.Realm != 0 || s.opts.Keys.HasUpstream()):
		return nil, errNotBelow
	case s.opts.Root == nil:
		return nil, errNoRoot
	}
	name := req.GetReplicaName()
	if err := replica.CheckName(name); err != nil {
		return nil, err
	}
	if _, taken := s.registry.Replica(name); taken {
		return nil, errReplicaName
	}
	expires, err := tokenExpiry(req.GetTtlSeconds(), defaultJoinTTL, maxJoinTTL)
	if err != nil {
		return nil, err
	}
	kind, create := "replica", attest.CreateReplicaToken
	if nested {
		kind, create = "nested-ca", attest.CreateNestedToken
	}
	token, err := create(ctx, s.opts.Store, s.opts.Root, name, expires)
	if err != nil {
		return nil, err
	}
	if err := s.done(ctx, audit.Record{Detail: "create " + kind + " token for " + name, NotAfter: expires}); err != nil {
		return nil, err
	}
	return &capb.CreateTokenResponse{Token: token, ExpiresAt: timestamp(expires), RootHash: svid.KeyHash(s.opts.Keys.X509().Root)}, nil
}

// ListReplicas implements capb.AdminServer.
func (s *Service) ListReplicas(context.Context, *capb.ListReplicasRequest) (*capb.ListReplicasResponse, error) {
	resp := &capb.ListReplicasResponse{}
	for _, rec := range s.registry.Replicas() {
		resp.Replicas = append(resp.Replicas, s.replicaToProto(rec))
	}
	return resp, nil
}

func (s *Service) replicaToProto(rec *replica.Record) *capb.CAReplica {
	p := &capb.CAReplica{
		Name: rec.Name, RootHolder: rec.RootHolder, JoinedAt: timestamp(rec.JoinedAt),
		AuthorityId: rec.Current().ID, NotAfter: timestamp(rec.Current().NotAfter), JwtKeyId: rec.JWTKeyID,
		Self: rec.Name == s.opts.ReplicaName, Realm: rec.Realm,
	}
	// One that the root does not vouch for signs no policy, and has none.
	if key, err := rec.PolicyKey(s.opts.Keys.Anchors(), time.Now()); err == nil {
		p.PolicyKeyId = key.KID
	}
	return p
}

// EvictReplica implements capb.AdminServer. Policy bundles that the replica
// signed are signed again first: were they left for later, a crash in between
// would leave agents without a policy that they can verify.
func (s *Service) EvictReplica(ctx context.Context, req *capb.EvictReplicaRequest) (*capb.EvictReplicaResponse, error) {
	rec, ok := s.registry.Replica(req.GetName())
	switch {
	case !ok:
		return nil, errNoReplica
	case rec.RootHolder:
		return nil, status.Errorf(codes.FailedPrecondition, "%s holds the root key: without it no replica could renew", rec.Name)
	case rec.Name == s.opts.ReplicaName:
		return nil, status.Error(codes.FailedPrecondition, "a replica does not evict itself: ask another one")
	}
	if err := s.reseal(ctx, rec); err != nil {
		return nil, err
	}
	for range maxTxnRetries {
		gone, revocations, revision, err := s.tryEvict(ctx, rec.Name)
		if err != nil {
			return nil, err
		}
		if gone == nil {
			continue // its record or the trust bundle changed under us
		}
		if err := s.done(ctx, audit.Record{
			Detail: "evict replica " + gone.Name + ", JWT key " + gone.JWTKeyID, AuthorityID: gone.Current().ID, NotAfter: gone.Current().NotAfter,
		}); err != nil {
			return nil, err
		}
		if err := s.registry.Wait(ctx, revision); err != nil {
			return nil, err
		}
		// What it published between our first look and its end.
		if err := s.reseal(ctx, gone); err != nil {
			return nil, err
		}
		resp := &capb.EvictReplicaResponse{Replica: s.replicaToProto(gone)}
		for _, r := range revocations {
			resp.Revocations = append(resp.Revocations, revocationToProto(r))
		}
		return resp, nil
	}
	return nil, fmt.Errorf("evict replica %s: others keep changing its record", rec.Name)
}

// tryEvict returns no record when something changed meanwhile.
func (s *Service) tryEvict(ctx context.Context, name string) (*replica.Record, []*revocation.Record, uint64, error) {
	rec, err := replica.Read(ctx, s.opts.Store, name)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil, 0, errNoReplica
	}
	if err != nil {
		return nil, nil, 0, err
	}
	now := time.Now()
	keys := []string{rec.JWTKeyID}
	step, err := s.opts.Domain.Plan(ctx, func(set rotation.Set) (rotation.Set, error) {
		for _, a := range set.All() {
			if a.Kind == rotation.JWT && a.Replica == name && a.State.Trusted() && a.ID != rec.JWTKeyID {
				keys = append(keys, a.ID)
			}
		}
		return set.Evicted(name, now), nil
	})
	if err != nil {
		return nil, nil, 0, err
	}
	ops := append(step.Ops, store.Delete(replica.Prefix+name), store.Delete(replica.ProgressPrefix+name), replica.Mark(), approval.Forget(name))
	for _, h := range s.registry.PolicyHeads() {
		ops = append(ops, store.Delete(rollout.SharePrefix+h.Name+"/"+name))
	}
	var revocations []*revocation.Record
	for _, r := range Withdrawn(rec, keys, now) {
		put, key, err := revocation.PutForGood(r)
		if err != nil {
			return nil, nil, 0, err
		}
		ops = append(ops, put)
		revocations = append(revocations, &revocation.Record{Revocation: r, Key: key})
	}
	granted, ends, err := approval.Join(ctx, replicaBasis(rec))
	if err != nil {
		return nil, nil, 0, err
	}
	res, err := s.opts.Store.Txn(ctx, slices.Concat(step.Cmps, []store.Cmp{rec.Cmp()}, granted), append(ops, ends...), nil)
	if err != nil {
		return nil, nil, 0, fmt.Errorf("evict replica %s: %w", name, err)
	}
	if !res.Succeeded {
		return nil, nil, 0, nil
	}
	return rec, revocations, res.Revision, nil
}

// Withdrawn are the revocations of everything that rec can have signed, JWT-SVIDs
// with jwtKeys. They have no limit by revision: it may go on signing, with numbers
// of its choice.
func Withdrawn(rec *replica.Record, jwtKeys []string, now time.Time) (revocations []svid.Revocation) {
	note := "replica " + rec.Name + " evicted"
	for _, kid := range jwtKeys {
		revocations = append(revocations, svid.Revocation{AuthorityID: kid, ExpiresAt: now.Add(recordLife), Note: note})
	}
	for _, a := range rec.Authorities {
		revocations = append(revocations, svid.Revocation{AuthorityID: a.ID, ExpiresAt: a.NotAfter.Add(evictedLife), Note: note})
	}
	return revocations
}

// reseal signs the current policy bundles that rec signed with our own key.
func (s *Service) reseal(ctx context.Context, rec *replica.Record) error {
	key, err := rec.PolicyKey(s.opts.Keys.Anchors(), time.Now())
	if err != nil {
		return nil //nolint:nilerr // a key that the root does not vouch for has signed nothing that counts
	}
	heads, err := s.opts.Reseal(ctx, key)
	switch {
	case errors.Is(err, store.ErrUnavailable), errors.Is(err, store.ErrReadOnly), ctx.Err() != nil:
		return fmt.Errorf("sign the policy bundles of replica %s again: %w", rec.Name, err)
	case err != nil: // damaged ones do not keep a replica in
		s.log.LogAttrs(ctx, slog.LevelError, "policy bundle of a replica not signed again: push it anew", slog.String("replica", rec.Name), slog.Any("err", err))
	}
	for _, h := range heads {
		if err := s.part(ctx, audit.Record{Detail: fmt.Sprintf("sign policy bundle %s of replica %s again, generation %d", h.Name, rec.Name, h.Generation), NotAfter: h.NotAfter}); err != nil {
			return err
		}
	}
	return nil
}
