// Replica: on the CA that holds the root key, lets replicas and nested CAs join and
// renews their intermediates. A record in the store makes a replica; only a token that
// the root sealed, or the replica's own live authority, changes it.

package api

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// RootKeys is what the replica that holds the root key does for others;
// *upstream.Keys has it.
type RootKeys interface {
	attest.Sealer
	SignIntermediate(key crypto.PublicKey, now time.Time) (*x509.Certificate, error)
	CertifyPolicyKey(name string, key crypto.PublicKey, now time.Time) (*x509.Certificate, error)
	// RootOf is the root that signed cert, one of its own making.
	RootOf(cert *x509.Certificate) *x509.Certificate
}

var (
	errNoRoot      = status.Error(codes.FailedPrecondition, "this replica does not hold the root key: ask the one that does (merlon replica list)")
	errOtherKind   = status.Error(codes.FailedPrecondition, "the token is for the other kind of CA: --kind replica is for one on the same etcd, --kind nested-ca for one with a store of its own (upstream: merlon)")
	errReplicaName = status.Error(codes.AlreadyExists, "a replica of this name is there: evict it first, or choose another name")
)

// ErrEvicted is what Standing says.
var ErrEvicted error = evicted{}

type evicted struct{}

// Error implements error.
func (evicted) Error() string {
	return "this replica has been evicted, and serves nobody any more: stop it, or move its keys away and join with a new token"
}

// GRPCStatus is how callers hear of it: they go to another replica.
func (e evicted) GRPCStatus() *status.Status { return status.New(codes.Unavailable, e.Error()) }

// replicaKeys are the public keys of one request.
type replicaKeys struct {
	intermediate, policy *ecdsa.PublicKey
	jwt                  crypto.PublicKey // of any kind that signs JWT-SVIDs
	jwtID                string
}

// requestedKeys are the keys of a request to the root holder. A refusal is
// recorded as one of what.
func (s *Service) requestedKeys(ctx context.Context, what string, req *capb.ReplicaKeys) (replicaKeys, error) {
	if s.opts.Root == nil {
		return replicaKeys{}, s.refuse(ctx, callerFrom(ctx), audit.Record{Detail: what}, errNoRoot)
	}
	keys, err := readReplicaKeys(req)
	if err != nil {
		return replicaKeys{}, s.refuse(ctx, callerFrom(ctx), audit.Record{Detail: what}, s.toStatus(ctx, err))
	}
	return keys, nil
}

func readReplicaKeys(req *capb.ReplicaKeys) (k replicaKeys, err error) {
	if k.intermediate, err = p256FromCSR("intermediate_csr", req.GetIntermediateCsr()); err != nil {
		return k, err
	}
	if k.policy, err = p256FromCSR("policy_csr", req.GetPolicyCsr()); err != nil {
		return k, err
	}
	if k.jwt, err = authority.PublicKeyFromCSR(req.GetJwtCsr()); err != nil {
		return k, fmt.Errorf("jwt_csr: %w", err)
	}
	if _, err := authority.JWSAlgorithm(k.jwt); err != nil {
		return k, &authority.InvalidError{Field: "jwt_csr", Reason: err.Error()}
	}
	if k.intermediate.Equal(k.policy) || k.intermediate.Equal(k.jwt) || k.policy.Equal(k.jwt) {
		return k, &authority.InvalidError{Field: "keys", Reason: "one key is there twice"}
	}
	k.jwtID, err = replica.KeyID(k.jwt)
	return k, err
}

func p256FromCSR(field string, der []byte) (*ecdsa.PublicKey, error) {
	key, err := authority.PublicKeyFromCSR(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	ec, ok := key.(*ecdsa.PublicKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, &authority.InvalidError{Field: field, Reason: "want a P-256 key"}
	}
	return ec, nil
}

// Join implements capb.ReplicaServer. The keys are judged before the token, so
// that bad ones cost none.
func (s *Service) Join(ctx context.Context, req *capb.ReplicaJoinRequest) (*capb.ReplicaJoinResponse, error) {
	const what = "join as a replica"
	caller := callerFrom(ctx)
	keys, err := s.requestedKeys(ctx, what, req.GetKeys())
	if err != nil {
		return nil, err
	}
	now := time.Now()
	var rec *replica.Record
	var intermediate *x509.Certificate
	nested := attest.ForNested(req.GetToken())
	revision, err := attest.RedeemReplicaToken(ctx, s.opts.Store, s.opts.Root, req.GetToken(), now, func(name string) ([]store.Cmp, []store.Op, error) {
		if want := req.GetName(); want != "" && want != name {
			return nil, nil, status.Errorf(codes.FailedPrecondition, "the token is for replica %s, and this one is configured as %s", name, want)
		}
		if nested != req.GetOwnStore() {
			return nil, nil, errOtherKind
		}
		if rec == nil { // not again when others get in between
			var err error
			if rec, intermediate, err = s.newReplica(name, keys, now); err != nil {
				return nil, nil, err
			}
		}
		return s.enrollReplica(ctx, rec, keys, nested)
	})
	if err != nil {
		return nil, s.refuse(ctx, caller, audit.Record{Detail: what}, s.toStatus(ctx, err))
	}
	if err := s.audit(ctx, audit.Record{
		Time: now, Type: audit.Attest, Actor: caller.Name, Detail: detailOfReplica + rec.Name + " joins" + realmOf(rec) + ", JWT key " + rec.JWTKeyID,
		AuthorityID: rec.Current().ID, NotAfter: rec.Current().NotAfter,
	}); err != nil {
		return nil, fmt.Errorf("record that replica %s joins: %w", rec.Name, err)
	}
	certificates, err := s.certificates(ctx, rec, intermediate, revision)
	if err != nil {
		return nil, err
	}
	return &capb.ReplicaJoinResponse{Certificates: certificates}, nil
}

// realmOf is for the audit log: what sets a nested CA apart.
func realmOf(rec *replica.Record) string {
	if !rec.Nested() {
		return ""
	}
	return fmt.Sprintf("%s%d", detailOfRealm, rec.Realm)
}

// JoinedRealm is the realm of the nested CA whose joining an audit record is of, 0
// where it is of something else.
func JoinedRealm(r audit.Record) uint32 {
	_, realm, _ := strings.Cut(r.Detail, detailOfRealm)
	realm, _, _ = strings.Cut(realm, ",")
	n, err := strconv.ParseUint(realm, 10, 32)
	if _, joins := CertifiedReplica(r); !joins || r.Type != audit.Attest || err != nil || n > uint64(svid.MaxRealm) {
		return 0
	}
	return uint32(n)
}

// RealmsGiven is the highest realm of which the audit log there says that a nested CA got
// it, 0 for none.
func RealmsGiven(auditPath string) (last uint32) {
	first, err := audit.Begin(auditPath)
	if err != nil {
		return 0
	}
	for line, err := range audit.Lines(auditPath, first) {
		var r audit.Record
		if err == nil && bytes.Contains(line.Text, []byte("realm")) && json.Unmarshal(line.Text, &r) == nil {
			last = max(last, JoinedRealm(r))
		}
	}
	return last
}

func (s *Service) newReplica(name string, keys replicaKeys, now time.Time) (*replica.Record, *x509.Certificate, error) {
	intermediate, err := s.opts.Root.SignIntermediate(keys.intermediate, now)
	if err != nil {
		return nil, nil, err
	}
	policy, err := s.opts.Root.CertifyPolicyKey(name, keys.policy, now)
	if err != nil {
		return nil, nil, err
	}
	rec := &replica.Record{Name: name, JoinedAt: now, JWTKeyID: keys.jwtID, PolicyCertificate: policy.Raw}
	return rec.WithAuthority(authorityOf(intermediate), now), intermediate, nil
}

// What the audit log says of a replica's new authority begins with these.
const (
	detailOfReplica      = "replica "
	detailOfIntermediate = "intermediate of replica "
	detailOfRealm        = " with a store of its own, realm "
)

// CertifiedReplica names the replica whose new authority an audit record is of.
func CertifiedReplica(r audit.Record) (name string, ok bool) {
	switch {
	case r.AuthorityID == "":
	case r.Type == audit.Attest:
		if name, ok = strings.CutPrefix(r.Detail, detailOfReplica); ok {
			name, _, ok = strings.Cut(name, " ")
		}
	case r.Type == audit.Renew:
		name, ok = strings.CutPrefix(r.Detail, detailOfIntermediate)
	}
	return name, ok
}

func authorityOf(cert *x509.Certificate) replica.Authority {
	return replica.Authority{ID: hex.EncodeToString(cert.SubjectKeyId), Root: hex.EncodeToString(cert.AuthorityKeyId), NotAfter: cert.NotAfter}
}

// enrollReplica prepares the transaction that makes rec a replica: with the
// record comes its JWT key, published, which signs once it is acknowledged, and
// with that of a nested CA its realm.
func (s *Service) enrollReplica(ctx context.Context, rec *replica.Record, keys replicaKeys, nested bool) ([]store.Cmp, []store.Op, error) {
	key, err := s.jwtAuthority(rec.Name, keys.jwt, rec.JoinedAt)
	if err != nil {
		return nil, nil, err
	}
	step, planned := s.opts.Domain.Plan(ctx, func(set rotation.Set) (rotation.Set, error) { return set.Joined(*key, rec.JoinedAt) })
	// Afterwards: where somebody was faster with these keys, that is what is wrong.
	switch _, _, err := s.opts.Store.Get(ctx, replica.Prefix+rec.Name); {
	case err == nil:
		return nil, nil, errReplicaName
	case !errors.Is(err, store.ErrNotFound):
		return nil, nil, fmt.Errorf("read the record of replica %s: %w", rec.Name, err)
	}
	if planned != nil {
		return nil, nil, planned
	}
	cmps, ops := append(step.Cmps, rec.Cmp()), append(step.Ops, replica.Mark())
	if nested {
		realm, cmp, taken, err := replica.NextRealm(ctx, s.opts.Store)
		if err != nil {
			return nil, nil, err
		}
		rec.Realm = realm
		unheard, err := (&replica.Progress{Name: rec.Name}).Put()
		if err != nil {
			return nil, nil, err
		}
		cmps, ops = append(cmps, cmp), append(ops, taken, unheard)
	}
	put, err := rec.Put()
	return cmps, append(ops, put), err
}

// jwtAuthority is a JWT key of the named replica.
func (s *Service) jwtAuthority(name string, key crypto.PublicKey, now time.Time) (*rotation.Authority, error) {
	if _, err := authority.JWSAlgorithm(key); err != nil {
		return nil, &authority.InvalidError{Field: "jwt_csr", Reason: err.Error()}
	}
	id, err := replica.KeyID(key)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode the JWT key of replica %s: %w", name, err)
	}
	return &rotation.Authority{
		ID: id, Kind: rotation.JWT, Replica: name, PublicKey: der, NotBefore: now.UTC(), NotAfter: now.Add(s.opts.JWTKeyTTL).UTC(),
	}, nil
}

// certificates is the answer once the picture holds what it says.
func (s *Service) certificates(ctx context.Context, rec *replica.Record, intermediate *x509.Certificate, revision uint64) (*capb.ReplicaCertificates, error) {
	if err := s.registry.Wait(ctx, revision); err != nil {
		return nil, err
	}
	state, _ := s.stateOf(rec.Name) // none for a replica that shares the store
	return &capb.ReplicaCertificates{
		State:        state,
		Intermediate: [][]byte{intermediate.Raw}, Root: s.opts.Root.RootOf(intermediate).Raw,
		PolicyCertificate: rec.PolicyCertificate, TrustBundle: s.trustToProto(s.registry.Trust()), Name: rec.Name,
	}, nil
}

// Certify implements capb.ReplicaServer.
func (s *Service) Certify(ctx context.Context, req *capb.ReplicaCertifyRequest) (*capb.ReplicaCertifyResponse, error) {
	const what = "certify a replica"
	caller := callerFrom(ctx)
	keys, err := s.requestedKeys(ctx, what, req.GetKeys())
	if err != nil {
		return nil, err
	}
	now := time.Now()
	intermediate, err := s.opts.Root.SignIntermediate(keys.intermediate, now)
	if err != nil {
		return nil, err
	}
	for range maxTxnRetries {
		rec, err := s.liveReplica(ctx, caller, keys, now)
		if err != nil {
			return nil, s.refuse(ctx, caller, audit.Record{Detail: what}, s.toStatus(ctx, err))
		}
		next, ops, err := s.recertified(rec, keys, intermediate, now)
		if err != nil {
			return nil, s.refuse(ctx, caller, audit.Record{Detail: what}, s.toStatus(ctx, err))
		}
		res, err := s.opts.Store.Txn(ctx, []store.Cmp{rec.Cmp()}, ops, nil)
		if err != nil {
			return nil, fmt.Errorf("write the record of replica %s: %w", rec.Name, err)
		}
		if !res.Succeeded {
			continue
		}
		// Again, now that the picture has everything that was before this write.
		if err := s.registry.Wait(ctx, res.Revision); err != nil {
			return nil, err
		}
		if err := s.checkAuthorities(rec, now); err != nil {
			return nil, s.refuse(ctx, caller, audit.Record{Detail: what}, err)
		}
		if err := s.audit(ctx, audit.Record{
			Time: now, Type: audit.Renew, Actor: caller.Name, Detail: detailOfIntermediate + rec.Name,
			AuthorityID: next.Current().ID, NotAfter: next.Current().NotAfter,
		}); err != nil {
			return nil, fmt.Errorf("record the intermediate of replica %s: %w", rec.Name, err)
		}
		certificates, err := s.certificates(ctx, next, intermediate, res.Revision)
		if err != nil {
			return nil, err
		}
		return &capb.ReplicaCertifyResponse{Certificates: certificates}, nil
	}
	return nil, fmt.Errorf("write the record of replica %s: others keep changing it", caller.Replica.Name)
}

// recertified is the record with the new intermediate, and with a policy
// certificate under the same root, with the writes that store it.
func (s *Service) recertified(rec *replica.Record, keys replicaKeys, intermediate *x509.Certificate, now time.Time) (*replica.Record, []store.Op, error) {
	next := rec.WithAuthority(authorityOf(intermediate), now)
	if next.Overfull() {
		return nil, nil, status.Errorf(codes.ResourceExhausted, "replica %s has %d intermediates that have not ended; more only once one has (%s): see whether it can write its keys, or evict it",
			rec.Name, replica.MaxAuthorities, next.Authorities[0].NotAfter.UTC().Format(time.RFC3339))
	}
	var ops []store.Op
	root := s.opts.Root.RootOf(intermediate)
	if _, err := rec.PolicyKey([]*x509.Certificate{root}, now); err != nil {
		policy, err := s.opts.Root.CertifyPolicyKey(rec.Name, keys.policy, now)
		if err != nil {
			return nil, nil, err
		}
		next.PolicyCertificate = policy.Raw
		ops = append(ops, replica.Mark())
	}
	put, err := next.Put()
	return next, append(ops, put), err
}

// liveReplica reads the caller's record anew and judges it by everything that
// the store holds: a replica that is being evicted gets nothing more.
func (s *Service) liveReplica(ctx context.Context, caller *Caller, keys replicaKeys, now time.Time) (*replica.Record, error) {
	rec, err := replica.Read(ctx, s.opts.Store, caller.Replica.Name)
	if errors.Is(err, store.ErrNotFound) {
		return nil, status.Errorf(codes.PermissionDenied, "replica %s has been evicted", caller.Replica.Name)
	}
	if err != nil {
		return nil, err
	}
	issuer := issuerOf(caller.Peer)
	policy, err := rec.PolicyKey(s.opts.Keys.Anchors(), now)
	switch {
	case !rec.Holds(issuer):
		return nil, status.Errorf(codes.PermissionDenied, "authority %s is not one of replica %s", issuer, rec.Name)
	case err != nil:
		return nil, status.Error(codes.PermissionDenied, err.Error())
	case !policy.Public.Equal(keys.policy) || !s.ownsJWT(rec, keys.jwtID):
		return nil, status.Errorf(codes.PermissionDenied, "replica %s has joined with other keys", rec.Name)
	}
	return rec, s.checkAuthorities(rec, now)
}

// ownsJWT says whether a JWT key is the replica's: that of its record, or one that
// signed before, or will.
func (s *Service) ownsJWT(rec *replica.Record, kid string) bool {
	a, ok := s.registry.Authorities().Get(kid)
	return rec.JWTKeyID == kid || ok && a.Replica == rec.Name && a.State != rotation.Revoked
}

// checkAuthorities refuses a replica of which an authority is revoked, whatever
// the revision: who has that authority's key can say that he is the replica.
func (s *Service) checkAuthorities(rec *replica.Record, now time.Time) error {
	if slices.ContainsFunc(s.registry.Revocations(now), func(r *revocation.Record) bool { return rec.Holds(r.AuthorityID) }) {
		return status.Errorf(codes.PermissionDenied, "an authority of replica %s is revoked: evict it, and let it join anew", rec.Name)
	}
	return nil
}

// Standing says why this replica must not serve: it has been evicted. The root
// holder cannot be.
func (s *Service) Standing() error {
	if s.opts.Root != nil || s.opts.ReplicaName == "" {
		return nil
	}
	rec, ok := s.registry.Replica(s.opts.ReplicaName)
	if !ok || !s.opts.Keys.HoldsJWT(rec.JWTKeyID) {
		return ErrEvicted
	}
	return nil
}
