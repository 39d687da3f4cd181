// Rotation of the CA's own keys, seen by operators, agents and replicas.

package ca_test

import (
	"encoding/base64"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/checkpoint"
	"merlon.dev/sdk/svid"
)

const (
	rootKind = "x509-root"
	jwtKind  = "jwt"
)

// quick lets steps wait for seconds rather than minutes.
func quick(cfg *ca.Config) { cfg.TrustRefreshHint = time.Second }

func (c *testCA) authorities() (all []*capb.CAAuthority) {
	c.t.Helper()
	resp, err := c.admin.ListAuthorities(c.t.Context(), &capb.ListAuthoritiesRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetAuthorities()
}

// authority is the only one of its kind in a state, nil if there is none.
func (c *testCA) authority(kind, state, replica string) *capb.CAAuthority {
	c.t.Helper()
	var found *capb.CAAuthority
	for _, a := range c.authorities() {
		if a.GetKind() != kind || a.GetState() != state || replica != "" && a.GetReplica() != replica {
			continue
		}
		if found != nil {
			c.t.Fatalf("both %s and %s are a %s that is %s", found.GetAuthorityId(), a.GetAuthorityId(), kind, state)
		}
		found = a
	}
	return found
}

func (c *testCA) prepare(kind string) string {
	c.t.Helper()
	resp, err := c.admin.PrepareAuthority(c.t.Context(), &capb.PrepareAuthorityRequest{Kind: kind})
	if err != nil {
		c.t.Fatal(err)
	}
	if resp.GetAuthority().GetState() != "published" {
		c.t.Fatalf("prepared authority is %s; want published", resp.GetAuthority().GetState())
	}
	return resp.GetAuthority().GetAuthorityId()
}

func (c *testCA) activate(id string, force bool) error {
	_, err := c.admin.ActivateAuthority(c.t.Context(), &capb.ActivateAuthorityRequest{AuthorityId: id, Force: force})
	return err
}

func (c *testCA) revoke(id string, force bool) error {
	_, err := c.admin.RevokeAuthority(c.t.Context(), &capb.RevokeAuthorityRequest{AuthorityId: id, Force: force})
	return err
}

// acknowledges says what the agent serves.
func acknowledges(t *testing.T, stream grpc.BidiStreamingClient[capb.SyncRequest, capb.SyncResponse], sequence uint64) {
	t.Helper()
	if err := stream.Send(&capb.SyncRequest{Ack: &capb.SyncAck{TrustBundleSequence: sequence}}); err != nil {
		t.Fatal(err)
	}
}

// eventuallyDone repeats a step that waits for something.
func eventuallyDone(t *testing.T, what string, step func() error) {
	t.Helper()
	var err error
	eventually(t, what, func() bool { err = step(); return err == nil })
}

func TestRootIsReplacedStepByStep(t *testing.T) {
	t.Parallel() // it mostly waits
	c := startCA(t, tempDir(t), quick)
	agent := c.agent("n1")
	entry := c.entry("n1", "web")
	stream := agent.sync(0)
	until(t, stream, synced)
	before := c.authority(rootKind, "active", "")
	if before == nil || before.GetRootHash() != svid.KeyHash(c.srv.Root()) || c.authority(jwtKind, "active", "ca") == nil {
		t.Fatalf("authorities of a new CA = %v", c.authorities())
	}
	next := c.prepare(rootKind)
	published := until(t, stream, func(m *capb.SyncResponse) bool { return m.GetTrustBundle() != nil }).GetTrustBundle()
	if keys, _ := c.trustBundle(); len(keys.X509Authorities()) != 2 {
		t.Errorf("%d roots in the trust bundle; want both", len(keys.X509Authorities()))
	}
	// The agent that is stuck holds it back, by name, however long others have had.
	eventually(t, "the stuck agent is named", func() bool {
		p := c.authority(rootKind, "published", "").GetPending()
		return time.Now().After(p.GetNotBefore().AsTime()) && slices.Equal(p.GetAgents(), []string{agent.id}) && !p.GetReady()
	})
	err := c.activate(next, false)
	wantCode(t, err, codes.FailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), agent.id) {
		t.Errorf("activate: %v; want it to name %s", err, agent.id)
	}
	acknowledges(t, stream, published.GetSequence())
	eventuallyDone(t, "activate", func() error { return c.activate(next, false) })
	eventually(t, "an intermediate under the new root", func() bool {
		i := c.authority("x509-intermediate", "active", "")
		return i.GetRootAuthorityId() == next
	})
	_, chain := agent.svid(entry)
	keys, sequence := c.trustBundle()
	peer, err := svid.VerifyRawChain(chain, keys.X509Bundle(), time.Now())
	if err != nil || peer.AuthorityIDs[len(peer.AuthorityIDs)-1] != next {
		t.Errorf("an SVID is under %v, %v; want root %s", peer, err, next)
	}
	eventually(t, "the CA shows the new root", func() bool {
		shown := dialTLS(t, c.srv.Address().String()).PeerCertificates
		return svid.KeyHash(shown[len(shown)-1]) == c.authority(rootKind, "active", "").GetRootHash()
	})
	if token, err := c.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN}); err != nil || token.GetRootHash() != c.authority(rootKind, "active", "").GetRootHash() {
		t.Errorf("a join token pins %s, %v; want the root that signs", token.GetRootHash(), err)
	}

	// The old one: alive, then tainted, then gone.
	old := before.GetAuthorityId()
	wantCode(t, c.revoke(old, false), codes.FailedPrecondition)
	if _, err := c.admin.TaintAuthority(t.Context(), &capb.TaintAuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	tainted := until(t, stream, func(m *capb.SyncResponse) bool { return len(m.GetTrustBundle().GetTaintedAuthorityIds()) > 0 }).GetTrustBundle()
	if !slices.Equal(tainted.GetTaintedAuthorityIds(), []string{old}) || tainted.GetSequence() != sequence+1 || tainted.GetRenewSpread().AsDuration() <= 0 {
		t.Errorf("trust bundle = %v; want %s tainted, at sequence %d", tainted, old, sequence+1)
	}
	time.Sleep(4 * time.Second) // three hints: what is missing then is the acknowledgement
	err = c.revoke(old, false)
	wantCode(t, err, codes.FailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), agent.id) {
		t.Errorf("revoke: %v; want it to name %s", err, agent.id)
	}
	acknowledges(t, stream, tainted.GetSequence())
	eventuallyDone(t, "revoke", func() error { return c.revoke(old, false) })
	if keys, _ := c.trustBundle(); len(keys.X509Authorities()) != 1 {
		t.Errorf("%d roots in the trust bundle; want 1", len(keys.X509Authorities()))
	}
	listed, err := c.admin.ListRevocations(t.Context(), &capb.ListRevocationsRequest{})
	if err != nil || !slices.ContainsFunc(listed.GetRevocations(), func(r *capb.Revocation) bool { return r.GetAuthorityId() == old }) {
		t.Errorf("revocations = %v, %v; want what %s has signed", listed, err, old)
	}
	eventually(t, "the key of the revoked root is removed", func() bool { return !slices.Contains(glob(t, c.dir, "root-*"), "root-1") })
}

func glob(t *testing.T, dir, pattern string) (names []string) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "data", "keys", pattern))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		names = append(names, filepath.Base(path))
	}
	return names
}

func TestForceDoesNotWaitAndIsAudited(t *testing.T) {
	t.Parallel()                // it mostly waits
	c := startCA(t, tempDir(t)) // with hints of 5 minutes
	agent := c.agent("n1")
	until(t, agent.sync(0), synced)
	before := c.authority(rootKind, "active", "").GetAuthorityId()
	next := c.prepare(rootKind)
	wantCode(t, c.activate(next, false), codes.FailedPrecondition)
	if err := c.activate(next, true); err != nil {
		t.Fatal(err)
	}
	wantCode(t, c.revoke(next, true), codes.FailedPrecondition)
	eventually(t, "an intermediate under the new root", func() bool { return c.authority("x509-intermediate", "active", "").GetRootAuthorityId() == next })
	if err := c.revoke(before, true); err != nil {
		t.Fatal(err)
	}
	wantCode(t, c.activate("none", true), codes.NotFound)
	var details []string
	for _, r := range c.auditRecords() {
		if r["authority_id"] == next || r["authority_id"] == before {
			details = append(details, strings.TrimSpace(r["type"].(string)+" "+text(r["detail"])))
		}
	}
	for _, want := range []string{
		"admin prepare authority, x509-root", "refuse activate authority", "admin activate authority by force", "admin revoke authority by force",
	} {
		if !slices.Contains(details, want) {
			t.Errorf("no audit record %q in %q", want, details)
		}
	}
	for _, act := range []string{"activate", "revoke"} { // a CA that is killed in between has the first
		begun := slices.Index(details, "admin begin to "+act+" authority (force: true)")
		if done := slices.Index(details, "admin "+act+" authority by force"); begun < 0 || done < begun {
			t.Errorf("%s by force is not recorded before it is done: %q", act, details)
		}
	}
}

func text(v any) string { s, _ := v.(string); return s }

func TestJWTKeyIsReplaced(t *testing.T) {
	t.Parallel() // it mostly waits
	dir := tempDir(t)
	c := startCA(t, dir, quick)
	agent := c.agent("n1")
	entry := c.entry("n1", "web")
	stream := agent.sync(0)
	until(t, stream, synced)
	before := c.authority(jwtKind, "active", "ca").GetAuthorityId()
	next := c.prepare(jwtKind)
	acknowledges(t, stream, until(t, stream, func(m *capb.SyncResponse) bool { return m.GetTrustBundle() != nil }).GetTrustBundle().GetSequence())
	if kid := agent.jwtKeyID(entry); kid != before {
		t.Errorf("a JWT-SVID is signed with %s before the activation; want %s", kid, before)
	}
	signedBy := make(map[string]string) // what was signed → kid
	sign := func() (kid string) {
		token, kid := agent.jwtSVID(entry)
		hash, err := checkpoint.TokenHash(token)
		if err != nil {
			t.Fatal(err)
		}
		signedBy[hash] = kid
		return kid
	}
	activated := make(chan struct{})
	go func() {
		defer close(activated)
		for deadline := time.Now().Add(20 * time.Second); c.activate(next, false) != nil && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		}
	}()
	eventually(t, "the new JWT key signs", func() bool { return sign() == next })
	<-activated
	for _, r := range c.auditRecords() { // also of those that were signed meanwhile
		if kid, ok := signedBy[text(r["signed_sha256"])]; ok && r["authority_id"] != kid {
			t.Errorf("a JWT-SVID that %s signed is recorded under %v", kid, r["authority_id"])
		} else if ok {
			delete(signedBy, text(r["signed_sha256"]))
		}
	}
	if len(signedBy) > 0 {
		t.Errorf("%d JWT-SVIDs are not recorded", len(signedBy))
	}
	if r := c.replicas()["ca"]; r.GetJwtKeyId() != next {
		t.Errorf("the replica's record names JWT key %s; want %s", r.GetJwtKeyId(), next)
	}
	if keys, _ := c.trustBundle(); !keys.HasJWTAuthority(before) || !keys.HasJWTAuthority(next) {
		t.Error("the trust bundle does not hold both keys")
	}
	c.stop()
	c = startCA(t, dir, quick)
	if got := c.authority(jwtKind, "active", "ca").GetAuthorityId(); got != next {
		t.Errorf("after a restart %s signs; want %s", got, next)
	}
}

// renew gives the agent another SVID of its own.
func (a *testClient) renew() {
	a.t.Helper()
	key, csr := newCSR(a.t)
	resp, err := a.node.Renew(a.t.Context(), &capb.RenewRequest{Csr: csr})
	if err != nil {
		a.t.Fatal(err)
	}
	a.key, a.chain = key, resp.GetX509Svid()
}

// jwtKeyID is the key that signs a JWT-SVID of e now.
func (a *testClient) jwtKeyID(e *capb.Entry) string {
	a.t.Helper()
	_, kid := a.jwtSVID(e)
	return kid
}

// jwtSVID is a JWT-SVID of e, and the key that its header names.
func (a *testClient) jwtSVID(e *capb.Entry) (token, kid string) {
	a.t.Helper()
	resp, err := a.jwt(e.GetEntryId(), []string{"x"})
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(resp.GetToken(), ".")[0])
	if err != nil {
		a.t.Fatal(err)
	}
	var header struct{ Kid string }
	if err := json.Unmarshal(raw, &header); err != nil {
		a.t.Fatal(err)
	}
	return resp.GetToken(), header.Kid
}

// The other replicas follow: their intermediates, their policy certificates, and
// they stay what they are.
func TestReplicaFollowsTheNewRoot(t *testing.T) {
	t.Parallel() // it mostly waits
	e := stage.StartEtcd(t, 1)
	a := startCA(t, tempDir(t), onEtcd(e), quick)
	dirB := tempDir(t)
	joining := a.joining("ca-2")
	b := startCA(t, dirB, onEtcd(e), joining, quick)
	agent := a.agent("n1")
	entry := a.entry("n1", "web")
	stream := agent.at(b).sync(0)
	until(t, stream, synced)
	generation := pushPolicy(t, b)
	old := a.authority(rootKind, "active", "").GetAuthorityId()
	_, err := b.admin.PrepareAuthority(t.Context(), &capb.PrepareAuthorityRequest{Kind: rootKind})
	wantCode(t, err, codes.FailedPrecondition)
	next := a.prepare(rootKind)
	wantCode(t, b.activate(next, true), codes.FailedPrecondition)
	// What one replica heard from the agent, the other knows.
	acknowledges(t, stream, until(t, stream, func(m *capb.SyncResponse) bool { return m.GetTrustBundle() != nil }).GetTrustBundle().GetSequence())
	eventuallyDone(t, "activate", func() error { return a.activate(next, false) })
	eventually(t, "ca-2 under the new root", func() bool { return a.authority("x509-intermediate", "active", "ca-2").GetRootAuthorityId() == next })
	keys, _ := a.trustBundle()
	eventually(t, "ca-2 issues under the new root", func() bool {
		_, chain := agent.at(b).svid(entry)
		peer, err := svid.VerifyRawChain(chain, keys.X509Bundle(), time.Now())
		return err == nil && slices.Contains(peer.AuthorityIDs, next)
	})
	agent.renew()
	if _, err := a.admin.TaintAuthority(t.Context(), &capb.TaintAuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	acknowledges(t, stream, until(t, stream, func(m *capb.SyncResponse) bool { return len(m.GetTrustBundle().GetTaintedAuthorityIds()) > 0 }).GetTrustBundle().GetSequence())
	eventuallyDone(t, "revoke", func() error { return b.revoke(old, false) }) // what needs no key any replica does
	policy, err := a.admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{})
	if err != nil || policy.GetPolicyBundle().GetGeneration() != generation || len(policy.GetPolicyBundle().GetKeys()) != 2 {
		t.Errorf("policy = %v, %v; want generation %d and both keys", policy, err, generation)
	}
	if r := a.replicas()["ca-2"]; r.GetPolicyKeyId() == "" {
		t.Error("the policy key of ca-2 has no certificate under the new root")
	}

	// A JWT key of its own.
	jwt := b.prepare(jwtKind)
	wantCode(t, a.activate(jwt, true), codes.FailedPrecondition)
	if err := b.activate(jwt, true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "ca-2 signs with its new JWT key", func() bool { return agent.at(b).jwtKeyID(entry) == jwt })
	b.stop()
	b = startCA(t, dirB, onEtcd(e), func(cfg *ca.Config) { cfg.JoinAddress = a.srv.Address().String() }, quick)
	if got := b.authority(jwtKind, "active", "ca-2").GetAuthorityId(); got != jwt {
		t.Errorf("after a restart %s signs; want %s", got, jwt)
	}
	agent.at(b).svid(entry)
	c := startCA(t, tempDir(t), onEtcd(e), a.joining("ca-3"), quick)
	agent.at(c).svid(entry)
	if _, err := a.admin.EvictReplica(t.Context(), &capb.EvictReplicaRequest{Name: "ca-2"}); err != nil {
		t.Fatal(err)
	}
	if keys, _ := a.trustBundle(); len(keys.JWTAuthorities()) != 2 {
		t.Errorf("%d JWT keys in the trust bundle after the eviction; want those of ca and ca-3", len(keys.JWTAuthorities()))
	}
}

// A replica that joins between two roots knows neither the one before nor what
// that one has sealed.
func TestReplicaThatJoinsBetweenRootsFollows(t *testing.T) {
	t.Parallel() // it mostly waits
	e := stage.StartEtcd(t, 1)
	a := startCA(t, tempDir(t), onEtcd(e), quick)
	second, third := a.prepare(rootKind), a.prepare(rootKind) // both sealed by the first
	if err := a.activate(second, true); err != nil {
		t.Fatal(err)
	}
	b := startCA(t, tempDir(t), onEtcd(e), a.joining("ca-2"), quick)
	if err := a.activate(third, true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "ca-2 under the third root", func() bool {
		return b.authority("x509-intermediate", "active", "ca-2").GetRootAuthorityId() == third
	})
}

// A store of an older Merlon has no authorities: they are written down, and the
// trust bundle stays as it is.
func TestOlderStoreIsUpgraded(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	root, jwt := c.authority(rootKind, "active", "").GetAuthorityId(), c.authority(jwtKind, "active", "ca").GetAuthorityId()
	_, sequence := c.trustBundle()
	c.stop()
	edit(t, dir, store.Delete(trust.AuthoritiesKey))
	c = startCA(t, dir)
	if got := c.authority(rootKind, "active", "").GetAuthorityId(); got != root {
		t.Errorf("root = %s; want %s", got, root)
	}
	if got := c.authority(jwtKind, "active", "ca").GetAuthorityId(); got != jwt {
		t.Errorf("JWT key = %s; want %s", got, jwt)
	}
	if _, now := c.trustBundle(); now != sequence {
		t.Errorf("sequence = %d; want %d, the content is the same", now, sequence)
	}
}

// A restored store may know nothing of the root that signs by now.
func TestForgottenKeysComeBack(t *testing.T) {
	t.Parallel() // it mostly waits
	dir := tempDir(t)
	c := startCA(t, dir, quick)
	old := c.authority(rootKind, "active", "").GetAuthorityId()
	c.stop()
	before := value(t, dir, trust.AuthoritiesKey)
	c = startCA(t, dir, quick)
	next := c.prepare(rootKind)
	if err := c.activate(next, true); err != nil {
		t.Fatal(err)
	}
	c.stop()
	edit(t, dir, store.Put(trust.AuthoritiesKey, before))
	c = startCA(t, dir, quick)
	if got := c.authority(rootKind, "active", "").GetAuthorityId(); got != old {
		t.Errorf("root = %s; want %s, as the store says", got, old)
	}
	eventually(t, "the forgotten root is published again", func() bool { return c.authority(rootKind, "published", "").GetAuthorityId() == next })
	// Or the one that signed is gone: it was revoked, and its key removed.
	if err := c.activate(next, true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an intermediate under the new root", func() bool { return c.authority("x509-intermediate", "active", "").GetRootAuthorityId() == next })
	if err := c.revoke(old, true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the revoked key is removed", func() bool { return len(glob(t, dir, "root-*")) == 1 })
	c.stop()
	edit(t, dir, store.Put(trust.AuthoritiesKey, before))
	c = startCA(t, dir, quick)
	if got := c.authority(rootKind, "active", "").GetAuthorityId(); got != next {
		t.Errorf("root = %s; want %s, whose key is there", got, next)
	}
	if !slices.ContainsFunc(c.auditRecords(), func(r map[string]any) bool {
		return r["authority_id"] == next && text(r["detail"]) == "activate authority by force, in place of "+old
	}) {
		t.Error("no audit record says that another root signs")
	}
	c.agent("n1")
}

// edit writes to the store of a CA that is stopped.
func edit(t *testing.T, dir string, ops ...store.Op) {
	t.Helper()
	st, err := badger.Open(filepath.Join(dir, "data", "store"), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Txn(t.Context(), nil, ops, nil); err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}

func value(t *testing.T, dir, key string) []byte {
	t.Helper()
	st, err := badger.Open(filepath.Join(dir, "data", "store"), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	kv, _, err := st.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return kv.Value
}

// Left alone, keys that live for seconds follow each other, and nobody is
// without an SVID.
func TestKeysRotateByThemselves(t *testing.T) {
	t.Parallel() // it mostly waits
	c := startCA(t, tempDir(t), quick, func(cfg *ca.Config) {
		cfg.RootTTL, cfg.IntermediateTTL, cfg.JWTKeyTTL = 30*time.Second, 30*time.Second, 30*time.Second
	})
	root, jwt := c.authority(rootKind, "active", "").GetAuthorityId(), c.authority(jwtKind, "active", "ca").GetAuthorityId()
	agent := c.agent("n1")
	entry := c.entry("n1", "web")
	stream := agent.sync(0)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			if b := m.GetTrustBundle(); b != nil && stream.Send(&capb.SyncRequest{Ack: &capb.SyncAck{TrustBundleSequence: b.GetSequence()}}) != nil {
				return
			}
		}
	}()
	// By half of their life, some seconds more, and what a slow machine takes.
	for deadline := time.Now().Add(29 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		_, chain := agent.svid(entry)
		keys, _ := c.trustBundle()
		if _, err := svid.VerifyRawChain(chain, keys.X509Bundle(), time.Now()); err != nil {
			t.Fatal(err)
		}
		if c.authority(rootKind, "active", "").GetAuthorityId() != root && c.authority(jwtKind, "active", "ca").GetAuthorityId() != jwt {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("authorities = %v; want a new root and JWT key", c.authorities())
		}
	}
	c.stop()
	<-done
}
