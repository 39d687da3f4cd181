// Replicas of the CA on one etcd, each on its own sockets: what one does, all
// know, and what one must not have, it does not get.

package ca_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/integration/stage"
	"merlon.dev/policy/bundle"
	"merlon.dev/sdk/svid"
)

// onEtcd makes a CA keep its store there.
func onEtcd(e *stage.Etcd) func(*ca.Config) {
	return func(cfg *ca.Config) {
		cfg.Store, cfg.EtcdEndpoints = "etcd", e.Endpoints()
		cfg.EtcdCAFile, cfg.EtcdCertFile, cfg.EtcdKeyFile = e.Files.CA, e.Files.Cert, e.Files.Key
	}
}

// joining makes a CA a replica of c by a token for name.
func (c *testCA) joining(name string) func(*ca.Config) {
	c.t.Helper()
	resp, err := c.admin.CreateToken(c.t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_REPLICA, ReplicaName: name})
	if err != nil {
		c.t.Fatal(err)
	}
	return func(cfg *ca.Config) {
		cfg.JoinAddress, cfg.JoinToken, cfg.RootHash = c.srv.Address().String(), resp.GetToken(), resp.GetRootHash()
	}
}

// refusedCA runs a CA that is to end by itself, and returns why.
func refusedCA(t *testing.T, dir string, changes ...func(*ca.Config)) error {
	t.Helper()
	cfg := ca.Config{
		TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "s", "a.sock"),
		Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", HealthAddress: "127.0.0.1:0", Development: true,
	}
	for _, change := range changes {
		change(&cfg)
	}
	srv, err := ca.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	select {
	case <-srv.Ready():
		cancel()
		t.Fatalf("the CA serves, and then: %v", <-done)
	case err = <-done:
	}
	if err == nil {
		t.Fatal("it ran")
	}
	return err
}

// trustBundle is what c publishes.
func (c *testCA) trustBundle() (*spiffebundle.Bundle, uint64) {
	c.t.Helper()
	resp, err := c.admin.GetTrustBundle(c.t.Context(), &capb.GetTrustBundleRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	b, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("shop.test"), resp.GetTrustBundle().GetJwks())
	if err != nil {
		c.t.Fatal(err)
	}
	return b, resp.GetTrustBundle().GetSequence()
}

func (c *testCA) replicas() map[string]*capb.CAReplica {
	c.t.Helper()
	resp, err := c.admin.ListReplicas(c.t.Context(), &capb.ListReplicasRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	byName := make(map[string]*capb.CAReplica)
	for _, r := range resp.GetReplicas() {
		byName[r.GetName()] = r
	}
	return byName
}

func (c *testCA) get(path string) (int, string) {
	c.t.Helper()
	resp, err := http.Get("http://" + c.srv.HealthAddress().String() + path) //nolint:forbidigo // loopback, without TLS
	if err != nil {
		c.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// at is the agent's connection to another replica.
func (a *testClient) at(c *testCA) *testClient {
	b := c.client(a.key, a.chain)
	b.id = a.id
	return b
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came to this: %s", what)
		}
	}
}

func TestReplicasAreOneCA(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	a := startCA(t, tempDir(t), onEtcd(e))
	dirB := tempDir(t)
	joining := a.joining("ca-2")
	b := startCA(t, dirB, onEtcd(e), joining)

	// An agent that attested at one is at once known to the other.
	agent := a.agent("n1")
	entry := b.entry("n1", "web")
	until(t, agent.at(b).sync(0), synced)
	_, chain := agent.at(b).svid(entry)
	keys, _ := a.trustBundle()
	now := time.Now()
	peer, err := svid.VerifyRawChain(chain, keys.X509Bundle(), now)
	if err != nil {
		t.Fatalf("what the second replica issues: %v", err)
	}
	all := a.replicas()
	if len(all) != 2 || !all["ca"].GetRootHolder() || !all["ca"].GetSelf() || all["ca-2"].GetRootHolder() || all["ca-2"].GetSelf() || !b.replicas()["ca-2"].GetSelf() {
		t.Fatalf("replicas = %v", all)
	}
	if all["ca-2"].GetAuthorityId() != peer.AuthorityIDs[0] || all["ca"].GetAuthorityId() == peer.AuthorityIDs[0] {
		t.Errorf("issued under %s; replicas = %v", peer.AuthorityIDs[0], all)
	}
	// Nobody knows its JWT key yet: it sends to another, and is ready all the same.
	_, err = agent.at(b).jwt(entry.GetEntryId(), []string{"orders"})
	wantCode(t, err, codes.Unavailable)
	if details := status.Convert(err).Details(); len(details) != 1 {
		t.Errorf("details = %v; want one that sends to another replica", details)
	}
	if code, body := b.get("/ready"); code != http.StatusOK {
		t.Errorf("/ready = %d %s", code, body)
	}
	if waits := a.authority(jwtKind, "published", "ca-2").GetPending(); waits.GetStep() != "activate" || waits.GetReady() {
		t.Errorf("the JWT key of the second replica waits for %v", waits)
	}
	if err := b.activate(all["ca-2"].GetJwtKeyId(), true); err != nil {
		t.Fatal(err)
	}
	token, err := agent.at(b).jwt(entry.GetEntryId(), []string{"orders"})
	if err != nil {
		t.Fatal(err)
	}
	verified, err := svid.VerifyJWT(token.GetToken(), keys.JWTBundle(), []string{"orders"}, now)
	if err != nil || verified.KeyID != all["ca-2"].GetJwtKeyId() || all["ca"].GetJwtKeyId() == verified.KeyID {
		t.Errorf("JWT-SVID of the second replica: %+v, %v", verified, err)
	}

	// Policy that either signs verifies with the keys that the other announces.
	for i, signer := range []*testCA{b, a} {
		generation := pushPolicy(t, signer)
		other := []*testCA{a, b}[i]
		var policy *capb.PolicyBundle
		eventually(t, "the other replica announces the policy", func() bool {
			resp, err := other.admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{})
			policy = resp.GetPolicyBundle()
			return err == nil && policy.GetGeneration() == generation
		})
		if !verifies(t, other, policy) {
			t.Errorf("the policy of replica %d does not verify at the other with %d keys", i, len(policy.GetKeys()))
		}
	}

	etcd := e.Client()
	for _, name := range []string{"replica-ca", "replica-ca-2", "alive-ca", "alive-ca-2", "upkeep"} {
		eventually(t, "somebody leads "+name, func() bool {
			held, err := etcd.Get(t.Context(), "/merlon/k/leader/"+name)
			return err == nil && held.Count == 1
		})
	}
	if leases, err := etcd.Leases(t.Context()); err != nil || len(leases.Leases) != 2 {
		t.Errorf("%d leases, %v; want one for each replica", len(leases.Leases), err)
	}

	// After a restart it is the same replica, and needs no token.
	b.stop()
	b = startCA(t, dirB, onEtcd(e), joining)
	if again := b.replicas()["ca-2"]; again.GetAuthorityId() != all["ca-2"].GetAuthorityId() || again.GetJwtKeyId() != all["ca-2"].GetJwtKeyId() {
		t.Errorf("after a restart: %v; before: %v", again, all["ca-2"])
	}

	for name, test := range map[string]struct {
		change func(*ca.Config)
		want   string
	}{
		"a second root":     {func(*ca.Config) {}, "token create --kind replica"},
		"used token":        {joining, "works once"},
		"no token":          {func(cfg *ca.Config) { joining(cfg); cfg.JoinToken = "" }, "join_token_file"},
		"another root hash": {func(cfg *ca.Config) { joining(cfg); cfg.RootHash = strings.Repeat("0a", 32) }, "replicas share one store"},
		"not the root's": {func(cfg *ca.Config) {
			joining(cfg)
			cfg.JoinAddress = b.srv.Address().String()
		}, "that holds the root key"},
		"another name": {func(cfg *ca.Config) { a.joining("ca-9")(cfg); cfg.ReplicaName = "zz" }, "or leave replica_name out"},
	} {
		err := refusedCA(t, tempDir(t), onEtcd(e), test.change)
		if hint := ca.Hint(err); !strings.Contains(hint, test.want) {
			t.Errorf("%s: %v, hint %q; want %q in it", name, err, hint, test.want)
		}
	}
	if err := refusedCA(t, tempDir(t), onEtcd(e), func(cfg *ca.Config) { cfg.EtcdPrefix = "/elsewhere/" }, joining); !strings.Contains(ca.Hint(err), "replicas share one store") {
		t.Errorf("another store: %v", err)
	}
	if n := len(a.replicas()); n != 2 {
		t.Errorf("%d replicas after all these; want 2", n)
	}
	_, err = a.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_REPLICA, ReplicaName: "ca-2"})
	wantCode(t, err, codes.AlreadyExists)
	_, err = b.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_REPLICA, ReplicaName: "ca-3"})
	wantCode(t, err, codes.FailedPrecondition)
}

// verifies says whether the current bundle at c verifies with announced keys.
func verifies(t *testing.T, c *testCA, policy *capb.PolicyBundle) bool {
	t.Helper()
	agent := c.agent("reader-" + string(rune('a'+policy.GetGeneration())))
	key, chain := agent.key, agent.chain
	raw, _, err := bundle.Fetch(t.Context(), httpClient(t, key, chain), "https://"+c.srv.HTTPSAddress().String()+"/v1/policy/bundles/main", "")
	if err != nil {
		t.Fatal(err)
	}
	var keys []bundle.Key
	for _, k := range policy.GetKeys() {
		public, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, bundle.Key{KID: k.GetKid(), PublicKey: ecdsaKey(t, public)})
	}
	_, err = bundle.Verify(raw, keys, bundle.Expect{Name: "main", TrustDomain: "shop.test"})
	return err == nil
}

func TestEvictedReplicaIsCutOff(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	a := startCA(t, tempDir(t), onEtcd(e))
	dirB := tempDir(t)
	log := &logLines{}
	b := startCA(t, dirB, onEtcd(e), a.joining("ca-2"), func(cfg *ca.Config) { cfg.Logger = slog.New(slog.NewTextHandler(log, nil)) })
	agent := a.agent("n1")
	entry := a.entry("n1", "web")
	until(t, agent.at(b).sync(0), synced)
	generation := pushPolicy(t, b)
	stream := agent.at(b).sync(0)
	until(t, stream, synced)
	_, chain := agent.at(b).svid(entry)
	record := a.replicas()["ca-2"]
	keys, before := a.trustBundle()
	peer, err := svid.VerifyRawChain(chain, keys.X509Bundle(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ca", "nobody"} {
		if _, err := a.admin.EvictReplica(t.Context(), &capb.EvictReplicaRequest{Name: name}); err == nil {
			t.Errorf("%s was evicted", name)
		}
	}
	if _, err := b.admin.EvictReplica(t.Context(), &capb.EvictReplicaRequest{Name: "ca-2"}); err == nil {
		t.Error("a replica evicted itself")
	}
	resp, err := a.admin.EvictReplica(t.Context(), &capb.EvictReplicaRequest{Name: "ca-2"})
	if err != nil {
		t.Fatal(err)
	}

	var records []svid.Revocation
	for _, r := range resp.GetRevocations() {
		records = append(records, svid.Revocation{AuthorityID: r.GetAuthorityId(), BeforeRevision: r.GetBeforeRevision(), ExpiresAt: r.GetExpiresAt().AsTime()})
	}
	revoked := svid.NewRevocations(records)
	if _, ok := revoked.Concerning(peer); !ok {
		t.Error("what it issued is not revoked")
	}
	// Whoever has its key can choose the number.
	late := *peer
	late.Serial.Revision = svid.MaxRevision
	if _, ok := revoked.Concerning(&late); !ok {
		t.Error("what it issues from now on is not revoked")
	}
	listed, err := a.admin.ListRevocations(t.Context(), &capb.ListRevocationsRequest{})
	if err != nil || len(listed.GetRevocations()) != len(records) {
		t.Errorf("ListRevocations = %v, %v; want %d", listed, err, len(records))
	}
	if keys, after := a.trustBundle(); keys.HasJWTAuthority(record.GetJwtKeyId()) || after <= before {
		t.Errorf("its JWT key is in the trust bundle of sequence %d, after %d", after, before)
	}
	policy, err := a.admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{})
	if err != nil || policy.GetPolicyBundle().GetGeneration() != generation+1 || len(policy.GetPolicyBundle().GetKeys()) != 1 {
		t.Errorf("policy = %v, %v; want generation %d and the one key that is left", policy, err, generation+1)
	}
	if !verifies(t, a, policy.GetPolicyBundle()) {
		t.Error("the policy is not signed by the key that is left")
	}

	var details []string
	for _, r := range a.auditRecords() {
		if detail, ok := r["detail"].(string); ok {
			details = append(details, detail)
		}
	}
	for _, want := range []string{"create replica token for ca-2", "replica ca-2 joins", "evict replica ca-2", "sign policy bundle main of replica ca-2 again"} {
		if !slices.ContainsFunc(details, func(d string) bool { return strings.HasPrefix(d, want) }) {
			t.Errorf("no audit record %q in %q", want, details)
		}
	}

	// It notices by itself.
	for err = error(nil); err == nil; {
		_, err = stream.Recv()
	}
	wantCode(t, err, codes.Unavailable)
	if _, err := agent.at(b).node.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, csr := newCSR(t)
	_, err = agent.at(b).node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: entry.GetEntryId(), Csr: csr}}})
	wantCode(t, err, codes.Unavailable)
	_, err = b.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: newEntry("n1", "x")})
	wantCode(t, err, codes.Unavailable)
	eventually(t, "/ready names the eviction", func() bool {
		code, body := b.get("/ready")
		return code == http.StatusServiceUnavailable && strings.Contains(body, "evicted") && !strings.Contains(body, "rpc error")
	})
	for _, path := range []string{"/v1/trust/bundle", "/v1/policy/bundles/main", "/log/ca-2/checkpoint"} {
		resp, err := httpClient(t, agent.key, agent.chain).Get("https://" + b.srv.HTTPSAddress().String() + path) //nolint:noctx // the client has a timeout
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(body), "evicted") {
			t.Errorf("GET %s of an evicted replica = %d %s, %v; want 503 and why", path, resp.StatusCode, body, err)
		}
	}
	eventually(t, "the log speaks of it", func() bool { return log.count("msg=evicted") > 0 })
	if n := log.count("has been evicted"); n != 1 {
		t.Errorf("the log speaks %d times of the eviction; want once", n)
	}
	b.stop()
	if err := refusedCA(t, dirB, onEtcd(e), func(cfg *ca.Config) { cfg.JoinAddress = a.srv.Address().String() }); !strings.Contains(ca.Hint(err), "keys away") {
		t.Errorf("started again: %v, hint %q", err, ca.Hint(err))
	}
	if _, chain := agent.svid(entry); len(chain) == 0 {
		t.Error("the other replica does not issue")
	}
}

// A CA whose store is replaced under it ends, and says why: its picture is of
// another one.
func TestCAEndsWhenItsStoreIsReplaced(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	dir := tempDir(t)
	cfg := ca.Config{
		TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "s", "a.sock"),
		Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", HealthAddress: "127.0.0.1:0", Development: true,
	}
	onEtcd(e)(&cfg)
	srv, err := ca.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Run(t.Context()) }()
	select {
	case <-srv.Ready():
	case err := <-done:
		t.Fatal(err)
	}
	e.Remove("/")
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "replaced") || !strings.Contains(ca.Hint(err), "start merlon-ca again") {
			t.Errorf("Run = %v, hint %q; want it to say that the store was replaced", err, ca.Hint(err))
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it still runs")
	}
}

// logLines counts what a CA says.
type logLines struct {
	mu sync.Mutex
	// guarded by mu
	lines []string
}

func (l *logLines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(b))
	return len(b), nil
}

func (l *logLines) count(text string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.lines {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

func TestReplicaThatIsCutOffSaysSo(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	a := startCA(t, tempDir(t), onEtcd(e))
	agent := a.agent("n1")
	entry := a.entry("n1", "web")
	stream := agent.sync(0)
	if msg := until(t, stream, synced); msg.GetStale() {
		t.Error("stale from the start")
	}
	e.Members[0].Pause()
	until(t, stream, func(m *capb.SyncResponse) bool { return m.GetStale() })
	code, body := a.get("/ready")
	if code != http.StatusServiceUnavailable || !strings.Contains(body, "cannot be reached") {
		t.Errorf("/ready = %d %s; want it to say why", code, body)
	}
	_, err := a.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: newEntry("n1", "x")})
	wantCode(t, err, codes.Unavailable)
	// What it knows it goes on issuing from, agents' own SVIDs as well.
	agent.svid(entry)
	_, csr := newCSR(t)
	if _, err := agent.node.Renew(t.Context(), &capb.RenewRequest{Csr: csr}); err != nil {
		t.Errorf("Renew: %v", err)
	}
	e.Members[0].Resume()
	until(t, stream, func(m *capb.SyncResponse) bool { return !m.GetStale() })
	eventually(t, "/ready is well again", func() bool { code, _ := a.get("/ready"); return code == http.StatusOK })
	a.entry("n1", "y")
}

func ecdsaKey(t *testing.T, key any) *ecdsa.PublicKey {
	t.Helper()
	ec, ok := key.(*ecdsa.PublicKey)
	if !ok {
		t.Fatalf("a policy key is a %T", key)
	}
	return ec
}
