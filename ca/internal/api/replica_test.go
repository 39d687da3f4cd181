// Joining and certifying, at the door: who gets a certificate of the root's, and
// who does not.

package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/svid"
)

// newRootHolder is a service with the root key and a published trust bundle.
func newRootHolder(t *testing.T) (*Service, *upstream.Keys) {
	t.Helper()
	return newRootHolderIn(t, t.TempDir())
}

func newRootHolderIn(t *testing.T, dir string) (*Service, *upstream.Keys) {
	t.Helper()
	s, _ := newServiceIn(t, dir)
	keys, err := upstream.Open(t.Context(), upstream.Config{TrustDomain: td, Dir: filepath.Join(t.TempDir(), "keys")})
	if err != nil {
		t.Fatal(err)
	}
	content, err := keys.TrustBundle()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := trust.Publish(t.Context(), s.opts.Store, content); err != nil {
		t.Fatal(err)
	}
	s.opts.Keys, s.opts.Root, s.opts.ReplicaName = keys, keys, keys.Name()
	s.opts.Domain, s.opts.JWTKeyTTL = trust.Domain{Store: s.opts.Store, TrustDomain: td}, time.Hour
	s.opts.Reseal = func(context.Context, replica.PolicyKey) ([]*release.Head, error) { return nil, nil }
	return s, keys
}

// joiner is a replica-to-be.
type joiner struct {
	intermediate, policy, jwt *ecdsa.PrivateKey
}

func newJoiner(t *testing.T) joiner {
	t.Helper()
	var j joiner
	for _, k := range []**ecdsa.PrivateKey{&j.intermediate, &j.policy, &j.jwt} {
		var err error
		if *k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	return j
}

func (j joiner) keys(t *testing.T) *capb.ReplicaKeys {
	t.Helper()
	csr := func(key *ecdsa.PrivateKey) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	return &capb.ReplicaKeys{IntermediateCsr: csr(j.intermediate), PolicyCsr: csr(j.policy), JwtCsr: csr(j.jwt)}
}

func as(t *testing.T, c *Caller) context.Context {
	return context.WithValue(t.Context(), callerKey{}, c)
}

func admin() *Caller {
	c := &Caller{Name: "uid:0", Using: []role.Role{{Name: role.Operator}}}
	c.take(c.Using...)
	return c
}

func (s *Service) replicaToken(t *testing.T, name string) string {
	t.Helper()
	resp, err := s.CreateToken(as(t, admin()), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_REPLICA, ReplicaName: name})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetToken()
}

func (s *Service) joined(t *testing.T, j joiner, name string) *capb.ReplicaCertificates {
	t.Helper()
	resp, err := s.Join(as(t, Anonymous()), &capb.ReplicaJoinRequest{Token: s.replicaToken(t, name), Keys: j.keys(t)})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetCertificates()
}

// peerUnder is the verified peer of a leaf for the CA's own ID under an authority.
func (s *Service) peerUnder(t *testing.T, authorities ...string) *svid.Peer {
	t.Helper()
	p := peerOf(t, entry.CAID(td).String(), 0, s.registry.Revision())
	p.AuthorityIDs = authorities
	return p
}

func certID(t *testing.T, der []byte) string {
	t.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authorityOf(cert).ID
}

// SECURITY.md T6: of 200 that come with one token, one joins.
func TestT6OneReplicaJoinsByAToken(t *testing.T) {
	s, _ := newRootHolder(t)
	token := s.replicaToken(t, "ca-2")
	keys := newJoiner(t).keys(t)
	var wins atomic.Int32
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			_, err := s.Join(as(t, Anonymous()), &capb.ReplicaJoinRequest{Token: token, Keys: keys})
			switch status.Code(err) {
			case codes.OK:
				wins.Add(1)
			case codes.PermissionDenied, codes.AlreadyExists, codes.FailedPrecondition: // its record, or its JWT key, is there
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(s.registry.Replicas()); wins.Load() != 1 || n != 1 {
		t.Errorf("%d joined, %d records; want one", wins.Load(), n)
	}
	if n := len(s.registry.Trust().Keys.JWTAuthorities()); n != 2 {
		t.Errorf("%d JWT keys in the trust bundle; want the root holder's and one", n)
	}
}

func TestJoinRefusesBadKeysAndKeepsTheToken(t *testing.T) {
	s, _ := newRootHolder(t)
	token := s.replicaToken(t, "ca-2")
	j := newJoiner(t)
	for name, keys := range map[string]*capb.ReplicaKeys{
		"none":    nil,
		"noise":   {IntermediateCsr: []byte("x"), PolicyCsr: []byte("x"), JwtCsr: []byte("x")},
		"one key": joiner{j.intermediate, j.intermediate, j.jwt}.keys(t),
	} {
		if _, err := s.Join(as(t, Anonymous()), &capb.ReplicaJoinRequest{Token: token, Keys: keys}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v; want InvalidArgument", name, err)
		}
	}
	if _, err := s.Join(as(t, Anonymous()), &capb.ReplicaJoinRequest{Token: token, Keys: j.keys(t), Name: "ca-3"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("another name than the token's: %v; want FailedPrecondition", err)
	}
	got, err := s.Join(as(t, Anonymous()), &capb.ReplicaJoinRequest{Token: token, Keys: j.keys(t), Name: "ca-2"})
	if err != nil || got.GetCertificates().GetName() != "ca-2" {
		t.Fatalf("with the token that is left: %v, %v", got, err)
	}
	s.opts.Root = nil
	if _, err := s.Join(as(t, Anonymous()), &capb.ReplicaJoinRequest{Token: token, Keys: j.keys(t)}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("without the root key: %v; want FailedPrecondition", err)
	}
}

// A leaf says spiffe://td/ca; the authority that it is under says which replica
// that is, if any.
func TestCertifyIsForLiveReplicas(t *testing.T) {
	s, keys := newRootHolder(t)
	j := newJoiner(t)
	joined := s.joined(t, j, "ca-2")
	authority, root := certID(t, joined.GetIntermediate()[0]), certID(t, joined.GetRoot())
	certify := func(p *svid.Peer, j joiner) (*capb.ReplicaCertificates, error) {
		c := s.PeerCaller(p)
		if err := accessTable().authorize(c, capb.Replica_Certify_FullMethodName); err != nil {
			return nil, err
		}
		resp, err := s.Certify(as(t, c), &capb.ReplicaCertifyRequest{Keys: j.keys(t)})
		return resp.GetCertificates(), err
	}
	good := s.peerUnder(t, authority, root)
	next := j
	next.intermediate = newJoiner(t).intermediate
	renewed, err := certify(good, next)
	if err != nil {
		t.Fatal(err)
	}
	rec, _ := s.registry.Replica("ca-2")
	if id := certID(t, renewed.GetIntermediate()[0]); rec.Current().ID != id || !rec.Holds(authority) || len(rec.Authorities) != 2 {
		t.Errorf("record = %+v; want %s after %s", rec, id, authority)
	}

	otherPolicy, otherJWT, expired := next, next, s.peerUnder(t, authority, root)
	otherPolicy.policy, otherJWT.jwt = newJoiner(t).policy, newJoiner(t).jwt
	expired.NotAfter = time.Now()
	for name, test := range map[string]struct {
		peer *svid.Peer
		keys joiner
		want codes.Code
	}{
		"unknown authority":      {s.peerUnder(t, "0a0b", root), next, codes.Unauthenticated},
		"directly under root":    {s.peerUnder(t, root), next, codes.Unauthenticated},
		"root holder's":          {s.peerUnder(t, keys.X509().ID(), root), next, codes.Unauthenticated},
		"expired":                {expired, next, codes.Unauthenticated},
		"an agent":               {peerOf(t, "spiffe://shop.test/agent/n1", 1, 1), next, codes.Unauthenticated},
		"a workload":             {peerOf(t, "spiffe://shop.test/web", 1, 1), next, codes.PermissionDenied},
		"another policy key":     {good, otherPolicy, codes.PermissionDenied},
		"another JWT key":        {good, otherJWT, codes.PermissionDenied},
		"revision of the future": {peerOf(t, entry.CAID(td).String(), 0, s.registry.Revision()+1000), next, codes.Unavailable},
	} {
		if _, err := certify(test.peer, test.keys); status.Code(err) != test.want {
			t.Errorf("%s: %v; want %s", name, err, test.want)
		}
	}

	// Revoked: also with a leaf that is newer than the revocation.
	if _, err := s.Revoke(as(t, admin()), &capb.RevokeRequest{Subject: &capb.RevokeRequest_AuthorityId{AuthorityId: authority}}); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]*svid.Peer{
		"revoked": good, "revoked, newer leaf": s.peerUnder(t, authority, root), "another authority of the replica": s.peerUnder(t, rec.Current().ID, root),
	} {
		if _, err := certify(p, next); err == nil {
			t.Errorf("%s: it got a new intermediate", name)
		}
	}
}

// A replica cannot outrun its eviction: each authority that it was given is
// remembered until it ends, and there are only so many.
func TestCertifyForgetsNoLivingAuthority(t *testing.T) {
	s, _ := newRootHolder(t)
	j := newJoiner(t)
	joined := s.joined(t, j, "ca-2")
	given := []string{certID(t, joined.GetIntermediate()[0])}
	caller := s.PeerCaller(s.peerUnder(t, given[0], certID(t, joined.GetRoot())))
	certify := func() (string, error) {
		resp, err := s.Certify(as(t, caller), &capb.ReplicaCertifyRequest{Keys: j.keys(t)})
		if err != nil {
			return "", err
		}
		return certID(t, resp.GetCertificates().GetIntermediate()[0]), nil
	}
	for len(given) < replica.MaxAuthorities {
		j.intermediate = newJoiner(t).intermediate
		id, err := certify()
		if err != nil {
			t.Fatal(err)
		}
		given = append(given, id)
	}
	if id, err := certify(); err != nil || id != given[len(given)-1] {
		t.Errorf("the same key again: %s, %v; want %s", id, err, given[len(given)-1])
	}
	j.intermediate = newJoiner(t).intermediate
	if _, err := certify(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one more: %v; want ResourceExhausted", err)
	}
	resp, err := s.EvictReplica(as(t, admin()), &capb.EvictReplicaRequest{Name: "ca-2"})
	if err != nil {
		t.Fatal(err)
	}
	revoked := make(map[string]bool)
	for _, r := range resp.GetRevocations() {
		revoked[r.GetAuthorityId()] = true
	}
	for i, id := range given {
		if !revoked[id] {
			t.Errorf("authority %d of %d outlives the eviction", i, len(given))
		}
	}
}

// A replica is evicted between the look at its caller and the answer.
func TestCertifyOfAnEvictedReplicaIsRefused(t *testing.T) {
	s, _ := newRootHolder(t)
	j := newJoiner(t)
	joined := s.joined(t, j, "ca-2")
	c := s.PeerCaller(s.peerUnder(t, certID(t, joined.GetIntermediate()[0]), certID(t, joined.GetRoot())))
	if !c.Is(capb.Caller_CALLER_REPLICA) {
		t.Fatalf("caller = %+v", c)
	}
	if _, err := s.EvictReplica(as(t, admin()), &capb.EvictReplicaRequest{Name: "ca-2"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Certify(as(t, c), &capb.ReplicaCertifyRequest{Keys: j.keys(t)}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("Certify = %v; want PermissionDenied", err)
	}
	if again := s.PeerCaller(c.Peer); again.Is(capb.Caller_CALLER_REPLICA) {
		t.Error("the evicted replica is still one")
	}
	if _, ok := s.registry.Replica("ca-2"); ok {
		t.Error("its record is left")
	}
}

// Who can write the store, and has no key of the CA's, becomes no replica and
// adds no policy key: by records, tokens, or another's certificate.
func TestStoreAloneMakesNoReplica(t *testing.T) {
	s, keys := newRootHolder(t)
	joined := s.joined(t, newJoiner(t), "ca-2")
	now := time.Now()
	_, foreign := newRootHolder(t)
	theirs, err := foreign.CertifyPolicyKey("ca-3", &newJoiner(t).policy.PublicKey, now)
	if err != nil {
		t.Fatal(err)
	}
	root := keys.X509().Root
	for name, der := range map[string][]byte{
		"another root's certificate":    theirs.Raw,
		"an intermediate":               joined.GetIntermediate()[0],
		"no certificate":                []byte("x"),
		"the certificate of another":    joined.GetPolicyCertificate(),
		"the root":                      root.Raw,
		"that of the root holder's own": keys.PolicyCertificate(),
	} {
		rec := &replica.Record{Name: "ca-3", JoinedAt: now, JWTKeyID: "k", PolicyCertificate: der}
		put, err := rec.WithAuthority(replica.Authority{ID: "0a", NotAfter: now.Add(time.Hour)}, now).Put()
		if err != nil {
			t.Fatal(err)
		}
		write(t, s, put, replica.Mark())
		stored, ok := s.registry.Replica("ca-3")
		if !ok {
			t.Fatal("the record is not followed")
		}
		if key, err := stored.PolicyKey([]*x509.Certificate{root}, now); err == nil {
			t.Errorf("%s: policy key %+v", name, key)
		}
	}
	// A token of his own making.
	forged, err := attest.CreateReplicaToken(t.Context(), s.opts.Store, foreign, "ca-4", now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Join(as(t, Anonymous()), &capb.ReplicaJoinRequest{Token: forged, Keys: newJoiner(t).keys(t)}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a forged token: %v; want PermissionDenied", err)
	}
}

func write(t *testing.T, s *Service, ops ...store.Op) {
	t.Helper()
	res, err := s.opts.Store.Txn(t.Context(), nil, ops, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.registry.Wait(t.Context(), res.Revision); err != nil {
		t.Fatal(err)
	}
}

func TestEvictionWithdrawsForGood(t *testing.T) {
	s, _ := newRootHolder(t)
	joined := s.joined(t, newJoiner(t), "ca-2")
	rec, _ := s.registry.Replica("ca-2")
	if _, err := s.EvictReplica(as(t, admin()), &capb.EvictReplicaRequest{Name: "ca-2"}); err != nil {
		t.Fatal(err)
	}
	p := peerOf(t, "spiffe://shop.test/web", 7, svid.MaxRevision)
	p.AuthorityIDs = []string{certID(t, joined.GetIntermediate()[0]), certID(t, joined.GetRoot())}
	if _, ok := s.registry.Revoked(p); !ok {
		t.Error("an SVID with a number of the future is not revoked")
	}
	records := s.registry.Revocations(time.Now())
	for _, id := range []string{rec.JWTKeyID, rec.Current().ID} {
		if !slices.ContainsFunc(records, func(r *revocation.Record) bool { return r.AuthorityID == id && r.BeforeRevision == 0 }) {
			t.Errorf("authority %s is not revoked for good: %v", id, records)
		}
	}
	if s.registry.Trust().Keys.HasJWTAuthority(rec.JWTKeyID) {
		t.Error("its JWT key is still in the trust bundle")
	}
}

// The picture is behind the SVID: a call waits for it, and is not told that
// nobody knows it.
func TestCallWaitsForThePictureThatItsSVIDIsFrom(t *testing.T) {
	s, agent := newService(t)
	p := peerOf(t, agent.ID.String(), agent.Handle, s.registry.Revision()+1)
	done := make(chan *Caller, 1)
	go func() { done <- s.PeerCaller(p) }()
	write(t, s, store.Put("other", nil))
	if c := <-done; c.Unsure != "" || !c.Is(capb.Caller_CALLER_AGENT) {
		t.Errorf("caller = %+v; want the agent", c)
	}
	s.SetStale(true) // no use waiting
	unknown := peerOf(t, "spiffe://shop.test/agent/elsewhere", 9, s.registry.Revision()+1)
	c := s.PeerCaller(unknown)
	if err := accessTable().authorize(c, capb.Node_Renew_FullMethodName); status.Code(err) != codes.Unavailable {
		t.Errorf("authorize = %v; want Unavailable, another replica may know it", err)
	}
}

func TestJWTKeyIsPublishedBeforeItSigns(t *testing.T) {
	s, keys := newRootHolder(t)
	change, err := trust.Plan(t.Context(), s.opts.Store, td, func(b *spiffebundle.Bundle) error { b.RemoveJWTAuthority(keys.JWT().KeyID); return nil })
	if err != nil {
		t.Fatal(err)
	}
	write(t, s, change.Ops...)
	caller := &Caller{Peer: peerOf(t, "spiffe://shop.test/agent/n1", 1, 1)}
	req := &capb.SignJWTRequest{Items: []*capb.SignJWTItem{{Audience: []string{"x"}}}}
	if _, err := s.SignJWT(as(t, caller), req); status.Code(err) != codes.Unavailable {
		t.Errorf("SignJWT = %v; want Unavailable", err)
	}
}
