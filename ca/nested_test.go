// A nested CA and the one above it, in one process: what goes between them, and what
// becomes of it when something is in the way.

package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/offline"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid"
)

// nestedBelow makes a CA a nested one of c, by a token for name.
func (c *testCA) nestedBelow(name string) func(*ca.Config) {
	c.t.Helper()
	resp, err := c.admin.CreateToken(c.t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_NESTED_CA, ReplicaName: name})
	if err != nil {
		c.t.Fatal(err)
	}
	return func(cfg *ca.Config) {
		quick(cfg)
		cfg.Upstream, cfg.UpstreamAddress, cfg.JoinToken, cfg.RootHash = "merlon", c.srv.Address().String(), resp.GetToken(), resp.GetRootHash()
	}
}

// withAddress lets a CA come back to where it was.
func withAddress(address string) func(*ca.Config) {
	return func(cfg *ca.Config) { quick(cfg); cfg.Address = address }
}

func (c *testCA) revocations() []*capb.Revocation {
	c.t.Helper()
	resp, err := c.admin.ListRevocations(c.t.Context(), &capb.ListRevocationsRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetRevocations()
}

// holdsRealms says whether c has a record of id for each of the realms, and no more.
func (c *testCA) holdsRealms(id string, realms ...uint32) bool {
	var got []uint32
	for _, r := range c.revocations() {
		if r.GetSpiffeId() == id {
			got = append(got, r.GetRealm())
		}
	}
	slices.Sort(got)
	return slices.Equal(got, realms)
}

// revokeID returns which other CAs have not been told.
func (c *testCA) revokeID(id string) (notTold []string) {
	c.t.Helper()
	resp, err := c.admin.Revoke(c.t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: id}, Note: "lost"})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetNotTold()
}

func TestNestedCAsShareWhatReplicasDo(t *testing.T) {
	up := startCA(t, tempDir(t), quick)
	eu := startCA(t, tempDir(t), up.nestedBelow("eu"))
	us := startCA(t, tempDir(t), up.nestedBelow("us"))
	eventually(t, "all have one trust bundle under one sequence", func() bool {
		bundle, sequence := up.trustBundle()
		for _, below := range []*testCA{eu, us} {
			if b, s := below.trustBundle(); s != sequence || !b.Equal(bundle) {
				return false
			}
		}
		return len(bundle.JWTAuthorities()) == 3
	})
	for _, below := range []*testCA{eu, us} {
		eventually(t, "the stream is open", func() bool { _, body := below.get("/ready"); return !strings.Contains(body, "notes") })
	}
	if r := up.replicas(); r["eu"].GetRealm() != 1 || r["us"].GetRealm() != 2 || r["ca"].GetRealm() != 0 {
		t.Errorf("replicas = %v; want realms 1, 2, and none", r)
	}

	// A revocation is everywhere, with one record for each realm, wherever it was
	// made; and it is in the audit log above, too.
	for i, made := range []*testCA{up, eu, us} {
		id := fmt.Sprintf("spiffe://shop.test/w%d", i)
		if away := made.revokeID(id); len(away) > 0 {
			t.Errorf("not told: %v; want all told", away)
		}
		for _, c := range []*testCA{up, eu, us} {
			eventually(t, "every CA holds a record for each realm", func() bool { return c.holdsRealms(id, 0, 1, 2) })
		}
	}
	told := func(r map[string]any) bool {
		return r["detail"] == "revoke SPIFFE ID, as nested CA eu did" && r["spiffe_id"] == "spiffe://shop.test/w1"
	}
	if !slices.ContainsFunc(up.auditRecords(), told) {
		t.Error("the audit log above does not say that eu revoked")
	}

	// What is issued below is of its realm, and an agent is told how old the word from
	// above is.
	a := eu.agent("n1")
	_, chain := a.svid(eu.entry("n1", "web"))
	for _, der := range [][]byte{a.chain[0], chain[0], dialTLS(t, eu.srv.Address().String()).PeerCertificates[0].Raw} {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := svid.SerialFromBig(cert.SerialNumber); !ok || got.Realm != 1 {
			t.Errorf("serial number %+v, %t; want one of realm 1", got, ok)
		}
	}
	if age := until(t, a.sync(0), synced).GetUpstreamAge(); age == nil || age.AsDuration() > time.Minute {
		t.Errorf("the word from above is %v old; want it fresh", age)
	}
	if age := until(t, up.agent("n1").sync(0), synced).GetUpstreamAge(); age != nil {
		t.Errorf("above the word is %v old; want nothing said", age)
	}

	// The policy key of a nested CA signs for its own agents alone.
	for _, c := range []*testCA{up, eu} {
		pushPolicy(t, c)
		resp, err := c.admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if keys := resp.GetPolicyBundle().GetKeys(); len(keys) != 1 || !verifies(t, c, resp.GetPolicyBundle()) {
			t.Errorf("%d keys may sign policy; want the CA's own", len(keys))
		}
	}

	// An agent below means nothing above, although one has its name there, and what it
	// is banned for concerns it alone.
	_, err := a.at(up).node.Renew(t.Context(), &capb.RenewRequest{})
	wantCode(t, err, codes.Unauthenticated)
	if _, err := eu.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: "n1"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the ban is known above", func() bool {
		return slices.ContainsFunc(up.revocations(), func(r *capb.Revocation) bool { return r.GetAgentId() == a.id && r.GetRealm() == 1 })
	})
	up.agent("n1").svid(up.entry("n1", "web"))
}

func TestNestedCAThatMayNotBe(t *testing.T) {
	up := startCA(t, tempDir(t))
	good := up.nestedBelow("eu")
	other := startCA(t, tempDir(t))
	for _, test := range []struct {
		name   string
		change func(*ca.Config)
		want   string
	}{
		{"another root hash", func(cfg *ca.Config) { good(cfg); cfg.RootHash = strings.Repeat("0a", 32) }, "the CA's root has the hash"},
		{"another token", func(cfg *ca.Config) { good(cfg); cfg.JoinToken = "mnt-x" }, "unknown or was used"},
		{"a replica's token", func(cfg *ca.Config) {
			good(cfg)
			var replica ca.Config
			up.joining("ca-2")(&replica)
			cfg.JoinToken = replica.JoinToken
		}, "for the other kind of CA"},
		{"another name", func(cfg *ca.Config) { good(cfg); cfg.ReplicaName = "us" }, "the token is for replica eu"},
		{"nobody there", func(cfg *ca.Config) { good(cfg); cfg.UpstreamAddress = "127.0.0.1:1" }, "join the CA at 127.0.0.1:1"},
		{"no token", func(cfg *ca.Config) { good(cfg); cfg.JoinToken = "" }, "no join token"},
		{"no development root", func(cfg *ca.Config) { good(cfg); cfg.Development = false }, "development"},
	} {
		err := refusedCA(t, tempDir(t), test.change)
		if !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v; want %q", test.name, err, test.want)
		}
	}
	// The token was good all the while, but for the last, whose answer came too late.
	if _, joined := up.replicas()["eu"]; !joined {
		t.Error("the token was never used")
	}
	if _, err := up.admin.EvictReplica(t.Context(), &capb.EvictReplicaRequest{Name: "eu"}); err != nil {
		t.Fatal(err)
	}

	eu := startCA(t, tempDir(t), up.nestedBelow("eu"))
	_, err := eu.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_NESTED_CA, ReplicaName: "eu-1"})
	wantCode(t, err, codes.FailedPrecondition)
	// What a folder is it stays.
	eu.stop()
	if err := refusedCA(t, eu.dir); !strings.Contains(err.Error(), "the keys here are a replica's") {
		t.Errorf("a nested CA without its upstream: %v", err)
	}
	other.stop()
	if err := refusedCA(t, other.dir, up.nestedBelow("other")); !strings.Contains(err.Error(), "the root key is here") {
		t.Errorf("a CA with a root of its own: %v", err)
	}
	// Nor does another one's store take its place.
	if err := os.RemoveAll(filepath.Join(other.dir, "data", "keys")); err != nil {
		t.Fatal(err)
	}
	if err := refusedCA(t, other.dir, up.nestedBelow("third")); !strings.Contains(err.Error(), "another root") {
		t.Errorf("the store of another root: %v", err)
	}
}

func TestNestedCAGoesOnAlone(t *testing.T) {
	address := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	dir := tempDir(t)
	up := startCA(t, dir, withAddress(address))
	below := up.nestedBelow("eu")
	eu := startCA(t, tempDir(t), below)
	a := eu.agent("n1")
	up.stop()
	eventually(t, "/ready says that the CA above is away", func() bool {
		code, body := eu.get("/ready")
		return code == http.StatusOK && strings.Contains(body, "the CA above, at "+address+", is away since ")
	})
	a.svid(eu.entry("n1", "web"))
	eu.stop()
	eu = startCA(t, eu.dir, below)
	a = a.at(eu)
	a.svid(eu.entry("n1", "web2"))
	if age := until(t, a.sync(0), synced).GetUpstreamAge().AsDuration(); age < 24*time.Hour {
		t.Errorf("a CA that has not heard from above since its start says that its word is %s old", age)
	}
	// A key that cannot be published is not made over and over.
	for range 3 {
		if _, err := eu.admin.PrepareAuthority(t.Context(), &capb.PrepareAuthorityRequest{Kind: "jwt"}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("prepare a JWT key: %v; want FAILED_PRECONDITION", err)
		}
	}
	if keys := glob(t, eu.dir, "jwt-*"); len(keys) != 2 {
		t.Errorf("JWT keys %v; want the one that signs and the one to come", keys)
	}
	if away := eu.revokeID("spiffe://shop.test/web"); !slices.Equal(away, []string{"the CA above"}) {
		t.Errorf("not told: %v; want the CA above", away)
	}

	up = startCA(t, dir, withAddress(address))
	eventually(t, "the revocation has come up", func() bool { return up.holdsRealms("spiffe://shop.test/web", 0, 1) })
	id := ""
	eventuallyDone(t, "the key is published", func() error {
		resp, err := eu.admin.PrepareAuthority(t.Context(), &capb.PrepareAuthorityRequest{Kind: "jwt"})
		id = resp.GetAuthority().GetAuthorityId()
		return err
	})
	known := func(a *capb.CAAuthority) bool { return a.GetAuthorityId() == id && a.GetState() == "published" }
	if keys := glob(t, eu.dir, "jwt-*"); !slices.ContainsFunc(up.authorities(), known) || len(keys) != 2 {
		t.Errorf("key %s is not known above, or not the one that was made before: %v", id, keys)
	}
	// By force it signs before anybody has acknowledged it, which is on record above.
	if _, err := eu.admin.ActivateAuthority(t.Context(), &capb.ActivateAuthorityRequest{AuthorityId: id, Force: true}); err != nil {
		t.Fatal(err)
	}
	var details []string
	for _, r := range up.auditRecords() {
		if r["authority_id"] == id {
			details = append(details, text(r["detail"]))
		}
	}
	want := []string{"prepare authority of nested CA eu", "publish authority of nested CA eu", "begin to activate authority of nested CA eu by force", "activate authority of nested CA eu by force"}
	if !slices.Equal(details, want) {
		t.Errorf("audit log above: %q; want %q", details, want)
	}
}

func TestWithdrawnNestedCA(t *testing.T) {
	address := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	dir := tempDir(t)
	up := startCA(t, dir, withAddress(address))
	eu := startCA(t, tempDir(t), up.nestedBelow("eu"))
	away := startCA(t, tempDir(t), up.nestedBelow("us"))
	a := eu.agent("n1")
	stream := a.sync(0)
	until(t, stream, synced)
	away.stop()
	eventually(t, "who revokes learns that one is away", func() bool {
		return slices.Equal(up.revokeID("spiffe://shop.test/web"), []string{"nested CA us"})
	})
	for _, name := range []string{"eu", "us"} {
		if _, err := up.admin.EvictReplica(t.Context(), &capb.EvictReplicaRequest{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	for {
		if _, err := stream.Recv(); err != nil {
			break
		}
	}
	eventually(t, "it serves nobody", func() bool {
		_, err := eu.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
		return status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "has been evicted")
	})
	// One that was away when it was withdrawn hears of it when it is back.
	away = startCA(t, away.dir, func(cfg *ca.Config) { cfg.Upstream, cfg.UpstreamAddress = "merlon", address })
	eventually(t, "it hears of it", func() bool {
		code, body := away.get("/ready")
		return code != http.StatusOK && strings.Contains(body, "has been evicted")
	})
	// It joins anew, with the store that it has, as another realm.
	eu = joinsAnew(t, up, eu, "eu")
	if got := eu.replicas()["eu"].GetRealm(); got != 3 {
		t.Errorf("realm %d; want 3", got)
	}
	if list, err := eu.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{}); err != nil || len(list.GetAgents()) != 1 {
		t.Errorf("agents = %v, %v; want those that it had", list.GetAgents(), err)
	}
}

// joinsAnew lets a nested CA that was evicted join again, with the store that it has.
func joinsAnew(t *testing.T, up, below *testCA, name string) *testCA {
	t.Helper()
	below.stop()
	for _, key := range glob(t, below.dir, "*") {
		if key != "log-1" { // its audit log goes on
			if err := os.RemoveAll(filepath.Join(below.dir, "data", "keys", key)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return startCA(t, below.dir, up.nestedBelow(name))
}

// What a nested CA has revoked in a former realm, while nobody heard it, binds
// everywhere once it has joined anew; and no note of its operators is in the way.
func TestFormerRealmIsHeard(t *testing.T) {
	address := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	dir := tempDir(t)
	up := startCA(t, dir, withAddress(address))
	eu := startCA(t, tempDir(t), up.nestedBelow("eu"))
	up.stop()
	eventually(t, "the CA above is away", func() bool { _, body := eu.get("/ready"); return strings.Contains(body, "is away") })
	eu.revokeID("spiffe://shop.test/web")
	eu.stop()
	up = startCA(t, dir, withAddress(address))
	if _, err := up.admin.EvictReplica(t.Context(), &capb.EvictReplicaRequest{Name: "eu"}); err != nil {
		t.Fatal(err)
	}
	eu = joinsAnew(t, up, eu, "eu")
	eventually(t, "its former revocation binds above", func() bool { return up.holdsRealms("spiffe://shop.test/web", 0, 2) })
	// What is not its to step is refused, and not for want of a role.
	for _, kind := range []string{"x509-root", "jwt"} {
		id := up.authority(kind, "active", "ca").GetAuthorityId()
		_, err := eu.admin.TaintAuthority(t.Context(), &capb.TaintAuthorityRequest{AuthorityId: id})
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "at the CA") {
			t.Errorf("taint the %s above from below: %v; want FAILED_PRECONDITION, which says where", kind, err)
		}
	}
	a := eu.agent("n7")
	if _, err := eu.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: "n7", Note: strings.Repeat("x", 1020)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the ban is known above", func() bool {
		return slices.ContainsFunc(up.revocations(), func(r *capb.Revocation) bool { return r.GetAgentId() == a.id })
	})
	for _, r := range eu.revocations() {
		if len(r.GetNote()) > 1024 {
			t.Errorf("the note of %s has %d bytes; want 1024 at most", r.GetAgentId(), len(r.GetNote()))
		}
	}
	eventually(t, "the stream is open", func() bool {
		code, body := eu.get("/ready")
		return code == http.StatusOK && !strings.Contains(body, "notes")
	})
	up.revokeID("spiffe://shop.test/db")
	eventually(t, "it hears what is revoked above", func() bool { return eu.holdsRealms("spiffe://shop.test/db", 0, 2) })
}

// Who answers at upstream_address, and is not the CA above: nothing is shared until
// somebody sets that right, so /ready fails. What the nested CA is it stays.
func TestNestedCAThatIsRefusedIsNotReady(t *testing.T) {
	up := startCA(t, tempDir(t), quick)
	below := up.nestedBelow("eu")
	eu := startCA(t, tempDir(t), below)
	us := startCA(t, tempDir(t), up.nestedBelow("us"))
	eventually(t, "it is ready", func() bool { code, _ := eu.get("/ready"); return code == http.StatusOK })
	eu.stop()
	port := stage.FreePort(t)
	for address, want := range map[string]string{
		us.srv.Address().String():         "its authority is not that of a replica",
		fmt.Sprintf("localhost:%d", port): "spiffe://shop.test/ca may not call", // itself
	} {
		eu = startCA(t, eu.dir, below, func(cfg *ca.Config) {
			cfg.UpstreamAddress, cfg.Address = address, fmt.Sprintf("127.0.0.1:%d", port)
		})
		eventually(t, "/ready says why it is refused", func() bool {
			code, body := eu.get("/ready")
			return code == http.StatusServiceUnavailable && strings.Contains(body, want) && !strings.Contains(body, "is away")
		})
		eu.stop()
	}
	eu = startCA(t, eu.dir, below)
	eventually(t, "it is heard again", func() bool {
		code, body := eu.get("/ready")
		return code == http.StatusOK && !strings.Contains(body, "notes")
	})
}

// A nested CA whose own store lost something is one all the same: whether it was
// evicted the CA above knows.
func TestRestoredNestedCAStays(t *testing.T) {
	up := startCA(t, tempDir(t), quick)
	below := up.nestedBelow("eu")
	eu := startCA(t, tempDir(t), below)
	kept := eu.entry("n1", "kept")
	file := filepath.Join(tempDir(t), "backup")
	backup(t, eu, file)
	eu.entry("n1", "lost")
	up.revokeID("spiffe://shop.test/web")
	eventually(t, "the revocation is below", func() bool { return eu.holdsRealms("spiffe://shop.test/web", 0, 1) })
	eu.stop()
	if err := os.Rename(filepath.Join(eu.dir, "data", "store"), filepath.Join(eu.dir, "store.old")); err != nil {
		t.Fatal(err)
	}
	cfg := ca.Config{TrustDomain: "shop.test", DataDir: filepath.Join(eu.dir, "data")}
	below(&cfg)
	if _, err := offline.Restore(t.Context(), cfg, file, offline.RestoreOptions{AcceptLoss: true}); err != nil {
		t.Fatal(err)
	}
	eu = startCA(t, eu.dir, below)
	if _, err := eu.admin.GetEntry(t.Context(), &capb.GetEntryRequest{EntryId: kept.GetEntryId()}); err != nil {
		t.Error(err)
	}
	eventually(t, "what was lost comes from above", func() bool { return eu.holdsRealms("spiffe://shop.test/web", 0, 1) })
	_, above := up.trustBundle()
	eventually(t, "the trust bundle goes on with the sequence above", func() bool { _, sequence := eu.trustBundle(); return sequence == above })
}

func backup(t *testing.T, c *testCA, file string) {
	t.Helper()
	stream, err := c.admin.BackupStore(t.Context(), &capb.BackupStoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var all bytes.Buffer
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		all.Write(msg.GetData())
	}
	if err := os.WriteFile(file, all.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Whoever is not a nested CA is not heard, and one is let in nowhere else.
func TestOnlyANestedCAFollows(t *testing.T) {
	up := startCA(t, tempDir(t))
	a := up.agent("n1")
	for name, conn := range map[string]*grpc.ClientConn{"an agent": a.conn, "nobody": up.client(nil, nil).conn} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		stream, err := capb.NewNestedClient(conn).Follow(ctx)
		if err == nil {
			_, err = stream.Recv()
		}
		wantCode(t, err, codes.PermissionDenied)
		if _, err := capb.NewNestedClient(conn).Step(ctx, &capb.StepRequest{Verb: "prepare"}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s takes a step: %v", name, err)
		}
		cancel()
	}
}
