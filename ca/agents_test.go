// Evicted and banned agents: what ends at once, what stays, and how they come
// back.

package ca_test

import (
	"crypto/ecdsa"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// reasonOf is what a refusal says to programs.
func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == "merlon.dev" {
			return info.GetReason()
		}
	}
	return ""
}

func wantRefusal(t testing.TB, what string, err error, code codes.Code, reason string) {
	t.Helper()
	if status.Code(err) != code || reasonOf(err) != reason {
		t.Errorf("%s: %v, reason %q; want %s, %s", what, err, reasonOf(err), code, reason)
	}
}

// ended receives until the stream ends.
func ended(t testing.TB, stream grpc.BidiStreamingClient[capb.SyncRequest, capb.SyncResponse]) (seen []*capb.SyncResponse, err error) {
	t.Helper()
	for {
		m, err := stream.Recv()
		if err != nil {
			return seen, err
		}
		seen = append(seen, m)
	}
}

// attest joins with a token and a new key.
func (c *testCA) attest(token string) (*ecdsa.PrivateKey, *capb.AttestResponse, error) {
	c.t.Helper()
	key, csr := newCSR(c.t)
	resp, err := c.client(nil, nil).node.Attest(c.t.Context(), &capb.AttestRequest{Evidence: &capb.AttestRequest_JoinToken{JoinToken: token}, Csr: csr})
	return key, resp, err
}

// refusedEverywhere calls every RPC for agents.
func (a *testClient) refusedEverywhere(reason string, entryID string) {
	a.t.Helper()
	_, csr := newCSR(a.t)
	_, err := a.node.Renew(a.t.Context(), &capb.RenewRequest{Csr: csr})
	wantRefusal(a.t, "Renew", err, codes.Unauthenticated, reason)
	_, err = a.node.Sign(a.t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: entryID, Csr: csr}}})
	wantRefusal(a.t, "Sign", err, codes.Unauthenticated, reason)
	_, err = a.jwt(entryID, []string{"x"})
	wantRefusal(a.t, "SignJWT", err, codes.Unauthenticated, reason)
	_, err = ended(a.t, a.sync(0))
	wantRefusal(a.t, "Sync", err, codes.Unauthenticated, reason)
}

func (c *testCA) state(agent string) *capb.Agent {
	c.t.Helper()
	resp, err := c.admin.GetAgent(c.t.Context(), &capb.GetAgentRequest{Agent: agent})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetAgent()
}

// revokedNow says whether the CA's records concern a chain.
func (c *testCA) revokedNow(chain [][]byte) bool {
	c.t.Helper()
	keys, _ := c.trustBundle()
	peer, err := svid.VerifyRawChain(chain, keys.X509Bundle(), time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	resp, err := c.admin.ListRevocations(c.t.Context(), &capb.ListRevocationsRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	var records []svid.Revocation
	for _, r := range resp.GetRevocations() {
		records = append(records, svid.Revocation{
			SPIFFEID: r.GetSpiffeId(), AgentID: r.GetAgentId(), AgentHandle: r.GetAgentHandle(), BeforeRevision: r.GetBeforeRevision(),
		})
	}
	_, concerned := svid.NewRevocations(records).Concerning(peer)
	return concerned
}

func TestEvictedAgentAttestsAnew(t *testing.T) {
	c := startCA(t, tempDir(t))
	a, other := c.agent("n1"), c.agent("n2")
	web := c.entry("n1", "web")
	_, held := a.svid(web)
	stream, others := a.sync(0), other.sync(0)
	until(t, stream, synced)
	until(t, others, synced)
	resp, err := c.admin.EvictAgent(t.Context(), &capb.EvictAgentRequest{Agent: "n1", Note: "reinstalled"})
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.GetAgent(); got.GetState() != "evicted" || got.GetStateNote() != "reinstalled" || got.GetStateSince() == nil || resp.GetRevocation().GetSpiffeId() != a.id {
		t.Errorf("EvictAgent() = %v", resp)
	}
	_, err = ended(t, stream)
	wantRefusal(t, "the open Sync stream", err, codes.Unauthenticated, "AGENT_EVICTED")
	a.refusedEverywhere("AGENT_EVICTED", web.GetEntryId())
	if c.revokedNow(held) || !c.revokedNow(a.chain) {
		t.Errorf("revoked: the workload's SVID %t, the agent's %t; want the agent's alone", c.revokedNow(held), c.revokedNow(a.chain))
	}
	until(t, others, func(m *capb.SyncResponse) bool { return len(m.GetRevocations()) == 1 })

	key, attested, err := c.attest(c.joinToken("n1"))
	if err != nil {
		t.Fatal(err)
	}
	anew := c.client(key, attested.GetX509Svid())
	if msg := until(t, anew.sync(0), synced); len(msg.GetEntries()) != 1 || msg.GetEntries()[0].GetEntryId() != web.GetEntryId() {
		t.Errorf("after it attested anew: %v; want its entry", msg)
	}
	if _, chain := anew.svid(web); c.revokedNow(chain) {
		t.Error("what it obtains now is revoked")
	}
	a.refusedEverywhere("SVID_REVOKED", web.GetEntryId()) // with the SVID from before
	if got := c.state(a.id); got.GetState() != "attested" || got.GetStateSince() != nil || got.GetStateNote() != "" {
		t.Errorf("state = %v; want nothing left of the eviction", got)
	}
	c.wantActs("evict agent")
}

func TestBannedAgentEndsWithEverythingIssuedThroughIt(t *testing.T) {
	c := startCA(t, tempDir(t))
	a, good := c.agent("n1"), c.agent("n2")
	web := c.entry("n1", "web")
	_, held := a.svid(web)
	_, goods := good.svid(c.entry("n2", "orders"))
	stream, others := a.sync(0), good.sync(0)
	until(t, stream, synced)
	until(t, others, synced)
	unused := c.joinToken("n1")
	resp, err := c.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: "n1", Note: "broken into"})
	if err != nil {
		t.Fatal(err)
	}
	ban := resp.GetRevocation()
	if got := resp.GetAgent(); got.GetState() != "banned" || got.GetStateNote() != "broken into" || ban.GetAgentId() != a.id || ban.GetAgentHandle() == 0 {
		t.Errorf("BanAgent() = %v", resp)
	}
	seen, err := ended(t, stream)
	wantRefusal(t, "the open Sync stream", err, codes.Unauthenticated, "AGENT_BANNED")
	for _, m := range seen {
		if len(m.GetRevocations()) > 0 {
			t.Errorf("the banned agent is told what the others are: %v", m)
		}
	}
	pushed := until(t, others, func(m *capb.SyncResponse) bool { return len(m.GetRevocations()) == 1 }).GetRevocations()[0]
	if pushed.GetAgentId() != a.id || pushed.GetBeforeRevision() != ban.GetBeforeRevision() {
		t.Errorf("other nodes are told %v; want %v", pushed, ban)
	}
	a.refusedEverywhere("AGENT_BANNED", web.GetEntryId())
	if !c.revokedNow(a.chain) || !c.revokedNow(held) || c.revokedNow(goods) || c.revokedNow(good.chain) {
		t.Errorf("revoked: agent %t, its workload %t, another's workload %t, another agent %t; want true, true, false, false",
			c.revokedNow(a.chain), c.revokedNow(held), c.revokedNow(goods), c.revokedNow(good.chain))
	}
	// No evidence lets it in, and none is made for it.
	_, _, err = c.attest(unused)
	wantRefusal(t, "Attest", err, codes.PermissionDenied, "AGENT_BANNED")
	_, err = c.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: "n1"})
	wantCode(t, err, codes.FailedPrecondition)

	// The workload moves, at once: the ban does not reach what it obtains there.
	moved := c.entry("n2", "web")
	if _, chain := good.svid(moved); c.revokedNow(chain) {
		t.Error("the SVID that the workload obtains on a good node is revoked")
	}
	// What only asks comes too late, or is wrong.
	_, err = c.admin.EvictAgent(t.Context(), &capb.EvictAgentRequest{Agent: "n1"})
	wantCode(t, err, codes.FailedPrecondition)
	_, err = c.admin.UnbanAgent(t.Context(), &capb.UnbanAgentRequest{Agent: "n2"})
	wantCode(t, err, codes.FailedPrecondition)
	for _, name := range []string{"nobody", "spiffe://shop.test/agent/nobody"} {
		_, err = c.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: name})
		wantCode(t, err, codes.NotFound)
	}
	for _, name := range []string{"", "spiffe://other.test/agent/n2", "spiffe://shop.test/web", "../n2"} {
		_, err = c.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: name})
		wantCode(t, err, codes.InvalidArgument)
	}

	lifted, err := c.admin.UnbanAgent(t.Context(), &capb.UnbanAgentRequest{Agent: a.id})
	if err != nil || lifted.GetAgent().GetState() != "evicted" {
		t.Fatalf("UnbanAgent() = %v, %v; want it evicted", lifted, err)
	}
	a.refusedEverywhere("AGENT_EVICTED", web.GetEntryId())
	key, attested, err := c.attest(unused)
	if err != nil {
		t.Fatalf("the token of before: %v", err)
	}
	if _, chain := c.client(key, attested.GetX509Svid()).svid(web); c.revokedNow(chain) || !c.revokedNow(held) {
		t.Error("after the ban: the new SVID is revoked, or the old one counts again")
	}
	c.wantActs("ban agent", "unban agent")
}

// wantActs checks that each act about an agent is in the audit log, with whom it is
// about.
func (c *testCA) wantActs(acts ...string) {
	c.t.Helper()
	var found []string
	for _, r := range c.auditRecords() {
		detail, _ := r["detail"].(string)
		id, _ := r["spiffe_id"].(string)
		if i := slices.IndexFunc(acts, func(act string) bool { return detail == act }); i >= 0 && strings.Contains(id, "/agent/") && !slices.Contains(found, acts[i]) {
			found = append(found, acts[i])
		}
	}
	if len(found) != len(acts) {
		c.t.Errorf("the audit log has %v; want each of %v", found, acts)
	}
}

// A banned agent holds up no rotation; one that is evicted does, because what its
// workloads hold lives on.
func TestBannedAgentDoesNotCountForRotation(t *testing.T) {
	c := startCA(t, tempDir(t), quick)
	evicted, banned := c.agent("n1"), c.agent("n2")
	c.entry("n1", "web")
	c.entry("n2", "web")
	next := c.prepare(rootKind)
	waited := func() []string { return c.authority(rootKind, "published", "").GetPending().GetAgents() }
	if got := waited(); !slices.Equal(got, []string{evicted.id, banned.id}) {
		t.Fatalf("the new root waits for %v; want both agents", got)
	}
	if _, err := c.admin.EvictAgent(t.Context(), &capb.EvictAgentRequest{Agent: "n1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: "n2"}); err != nil {
		t.Fatal(err)
	}
	if got := waited(); !slices.Equal(got, []string{evicted.id}) {
		t.Errorf("the new root %s waits for %v; want the evicted agent alone", next, got)
	}
}

// A ban is in the store: another process, after a restart, knows it.
func TestABanSurvivesARestart(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	a := c.agent("n1")
	web := c.entry("n1", "web")
	if _, err := c.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: "n1"}); err != nil {
		t.Fatal(err)
	}
	c.stop()
	c = startCA(t, dir)
	again := c.client(a.key, a.chain)
	again.refusedEverywhere("AGENT_BANNED", web.GetEntryId())
	if got := c.state("n1").GetState(); got != "banned" {
		t.Errorf("state = %s; want banned", got)
	}
}
