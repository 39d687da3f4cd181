// Four-eyes over real connections: what touches the CA's keys takes two
// administrators, each time, whichever RPC it is (SECURITY.md T46).

package ca_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/integration/oidcprovider"
)

func withFourEyes(cfg *ca.Config) { cfg.FourEyes = true }

// pair is a CA with four_eyes, two operators and a viewer.
type pair struct {
	*testCA
	ann, bob, eve *testClient
	replica       string
}

// startPair makes the operators before four_eyes is on, and calls between on the
// store while no CA runs.
func startPair(t *testing.T, between func(store.Store), changes ...func(*ca.Config)) *pair {
	t.Helper()
	dir := tempDir(t)
	c := startCA(t, dir)
	a := c.agent("n1")
	ann, bob := c.admins(a, "ann", capb.Role_ROLE_OPERATOR, ""), c.admins(a, "bob", capb.Role_ROLE_OPERATOR, "")
	eve := c.admins(a, "eve", capb.Role_ROLE_VIEWER, "")
	c.stolen(capb.TokenKind_TOKEN_KIND_REPLICA, 0)
	c.stop()
	if between != nil {
		inStore(t, dir, between)
	}
	c = startCA(t, dir, changes...)
	again := func(who *testClient) *testClient {
		client := c.client(who.key, who.chain)
		client.id = who.id
		return client
	}
	return &pair{c, again(ann), again(bob), again(eve), "stolen3"}
}

func inStore(t *testing.T, dir string, do func(store.Store)) {
	t.Helper()
	st, err := badger.Open(filepath.Join(dir, "data", "store"), badger.Options{Existing: true})
	if err != nil {
		t.Fatal(err)
	}
	do(st)
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}

// reason is what programs see of a refusal.
func reason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

func wantReason(t *testing.T, what string, err error, want string) {
	t.Helper()
	if err == nil || reason(err) != want {
		t.Errorf("%s: %v (%q); want a refusal %s", what, err, reason(err), want)
	}
}

// proposal is what the CA made of a call that ended with err.
func proposal(t *testing.T, what string, err error) string {
	t.Helper()
	for _, d := range status.Convert(err).Details() {
		if p, ok := d.(*capb.Proposal); ok && status.Code(err) == codes.FailedPrecondition && reason(err) == "APPROVAL_REQUIRED" {
			return p.GetProposalId()
		}
	}
	t.Fatalf("%s: %v; want that it waits as a proposal", what, err)
	return ""
}

func grant(t *testing.T, who *testClient, id string) (proto.Message, error) {
	t.Helper()
	resp, err := who.admin.GrantProposal(t.Context(), &capb.GrantProposalRequest{ProposalId: id})
	if err != nil {
		return nil, err
	}
	return resp.GetResponse().UnmarshalNew()
}

// jwtKey prepares a JWT key, which one administrator may.
func (p *pair) jwtKey() string {
	p.t.Helper()
	resp, err := p.ann.admin.PrepareAuthority(p.t.Context(), &capb.PrepareAuthorityRequest{Kind: "jwt"})
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.GetAuthority().GetAuthorityId()
}

// authorityStates are the states of all roots and JWT keys, by ID.
func (p *pair) authorityStates() map[string]string {
	p.t.Helper()
	resp, err := p.eve.admin.ListAuthorities(p.t.Context(), &capb.ListAuthoritiesRequest{})
	if err != nil {
		p.t.Fatal(err)
	}
	states := make(map[string]string)
	for _, a := range resp.GetAuthorities() {
		states[a.GetAuthorityId()] = a.GetState()
	}
	return states
}

func (p *pair) activeJWT() string {
	resp, err := p.eve.admin.ListAuthorities(p.t.Context(), &capb.ListAuthoritiesRequest{})
	if err != nil {
		p.t.Fatal(err)
	}
	for _, a := range resp.GetAuthorities() {
		if a.GetKind() == "jwt" && a.GetState() == "active" && a.GetReplica() == "ca" {
			return a.GetAuthorityId()
		}
	}
	p.t.Fatal("no JWT key signs")
	return ""
}

// Each act that is annotated so is only proposed by the first administrator, is done
// when the second one grants it, once, and is on record with both.
func TestEveryActThatWaitsEndsItsProposal(t *testing.T) {
	p := startPair(t, nil, withFourEyes)
	ctx := t.Context()
	first, next := p.activeJWT(), p.jwtKey()
	state := func(id, want string) func() bool { return func() bool { return p.authorityStates()[id] == want } }
	made := func(id string) func() bool { return func() bool { return len(p.entriesOf(id)) > 0 } }
	revocations := func() bool {
		resp, err := p.eve.admin.ListRevocations(ctx, &capb.ListRevocationsRequest{})
		return err != nil || slices.ContainsFunc(resp.GetRevocations(), func(r *capb.Revocation) bool { return r.GetAuthorityId() == "abcdef" })
	}
	operator, alias := newEntry("n1", "cat"), newEntry("", "agent/alias/eu")
	operator.Role = capb.Role_ROLE_OPERATOR
	below := newEntry("alias/eu", "dan")
	below.Role = capb.Role_ROLE_OPERATOR
	alias.ParentId, alias.Selectors = "spiffe://shop.test/ca", []*capb.Selector{{Type: "k8s", Value: "cluster:eu"}}
	tried := make(map[string]bool)
	for _, act := range []struct {
		name, method string
		call         func(capb.AdminClient) error
		done         func() bool // nil: the answer says so
	}{
		{"activate", capb.Admin_ActivateAuthority_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.ActivateAuthority(ctx, &capb.ActivateAuthorityRequest{AuthorityId: next, Force: true})
			return err
		}, state(next, "active")},
		{"taint", capb.Admin_TaintAuthority_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.TaintAuthority(ctx, &capb.TaintAuthorityRequest{AuthorityId: first})
			return err
		}, state(first, "tainted")},
		{"revoke", capb.Admin_RevokeAuthority_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.RevokeAuthority(ctx, &capb.RevokeAuthorityRequest{AuthorityId: first, Force: true})
			return err
		}, state(first, "revoked")},
		{"revoke what an authority signed", capb.Admin_Revoke_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.Revoke(ctx, &capb.RevokeRequest{Subject: &capb.RevokeRequest_AuthorityId{AuthorityId: "abcdef"}})
			return err
		}, revocations},
		{"evict a replica", capb.Admin_EvictReplica_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.EvictReplica(ctx, &capb.EvictReplicaRequest{Name: p.replica})
			return err
		}, func() bool { return p.replicas()[p.replica] == nil }},
		{"make an operator", capb.Admin_CreateEntry_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.CreateEntry(ctx, &capb.CreateEntryRequest{Entry: operator})
			return err
		}, made("cat")},
		{"make an operator below an alias", capb.Admin_CreateEntry_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.CreateEntry(ctx, &capb.CreateEntryRequest{Entry: below})
			return err
		}, made("dan")},
		{"say which nodes have the alias of an operator", capb.Admin_CreateEntry_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.CreateEntry(ctx, &capb.CreateEntryRequest{Entry: alias})
			return err
		}, made("agent/alias/eu")},
		{"admit a replica", capb.Admin_CreateToken_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.CreateToken(ctx, &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_REPLICA, ReplicaName: "r9"})
			return err
		}, nil},
		{"admit a nested CA", capb.Admin_CreateToken_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.CreateToken(ctx, &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_NESTED_CA, ReplicaName: "n9"})
			return err
		}, nil},
		{"become the node of operators", capb.Admin_CreateToken_FullMethodName, func(c capb.AdminClient) error {
			_, err := c.CreateToken(ctx, &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: "n1"})
			return err
		}, nil},
	} {
		tried[act.method] = true
		id := proposal(t, act.name, act.call(p.ann.admin))
		if act.done != nil && act.done() {
			t.Errorf("%s: one administrator alone did it", act.name)
		}
		if again := proposal(t, act.name, act.call(p.ann.admin)); again != id {
			t.Errorf("%s: called again it is another proposal: %s, %s", act.name, id, again)
		}
		_, err := grant(t, p.ann, id)
		wantReason(t, act.name+", granted by who proposed it", err, "PROPOSAL_OWN")
		_, err = grant(t, p.eve, id)
		wantCode(t, err, codes.PermissionDenied)
		answer, err := grant(t, p.bob, id)
		if err != nil {
			t.Errorf("%s: %v", act.name, err)
			continue
		}
		if token, ok := answer.(*capb.CreateTokenResponse); ok && token.GetToken() == "" || act.done != nil && !act.done() {
			t.Errorf("%s: granted, and not done: %v", act.name, answer)
		}
		records := p.outcomes()
		if last := records[len(records)-1]; last["actor"] != p.bob.id || last["proposed_by"] != p.ann.id || last["type"] != "admin" {
			t.Errorf("%s: recorded as %v; want both administrators", act.name, last)
		}
		_, err = grant(t, p.bob, id)
		wantReason(t, act.name+", granted again", err, "PROPOSAL_DONE")
	}
	for _, rpc := range rpcs() {
		access, ok := proto.GetExtension(rpc.Options(), capb.E_Access).(*capb.Access)
		method := fmt.Sprintf("/%s/%s", rpc.Parent().FullName(), rpc.Name())
		if waits := access.GetApproval() > capb.Approval_APPROVAL_NONE; ok && waits != tried[method] {
			t.Errorf("%s waits for a second administrator: %v; tried here: %v", method, waits, tried[method])
		}
	}
}

// What one administrator may still do alone, and that nobody becomes two by it.
func TestWhatDoesNotWait(t *testing.T) {
	p := startPair(t, nil, withFourEyes)
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"prepare a key": func() error {
			_, err := p.ann.admin.PrepareAuthority(ctx, &capb.PrepareAuthorityRequest{Kind: "jwt"})
			return err
		},
		"register a workload": func() error {
			_, err := createWithRole(t, p.ann.admin, "web", noRole, "")
			return err
		},
		"make a viewer": func() error {
			_, err := createWithRole(t, p.ann.admin, "watch", capb.Role_ROLE_VIEWER, "")
			return err
		},
		"admit a node": func() error {
			_, err := p.ann.admin.CreateToken(ctx, &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: "n2"})
			return err
		},
		"revoke a workload": func() error { return revokeID(t, p.testCA, "spiffe://shop.test/gone") },
	} {
		if err := call(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := createWithRole(t, p.ann.admin, "bob", noRole, "") // would take bob's role away, or share it
	wantCode(t, err, codes.InvalidArgument)
}

// Each reason for which a proposal is not granted, or not taken back.
func TestProposalsThatAreNotGranted(t *testing.T) {
	expired := ""
	p := startPair(t, func(st store.Store) {
		gone, err := approval.Propose(t.Context(), st, approval.Terms{
			Method: capb.Admin_TaintAuthority_FullMethodName, Act: "taint authority", By: approval.Person{Principal: "x", Name: "x"},
		}, time.Now().Add(-approval.Life))
		if err != nil {
			t.Fatal(err)
		}
		expired = gone.ID
	}, withFourEyes)
	ctx := t.Context()
	taint := func(who *testClient, id string) string {
		_, err := who.admin.TaintAuthority(ctx, &capb.TaintAuthorityRequest{AuthorityId: id})
		return proposal(t, "taint", err)
	}
	first, next := p.activeJWT(), p.jwtKey()
	_, err := grant(t, p.bob, expired)
	wantReason(t, "expired", err, "PROPOSAL_EXPIRED")
	_, err = grant(t, p.bob, strings.Repeat("0", 32))
	wantReason(t, "unknown", err, "PROPOSAL_UNKNOWN")

	taken := taint(p.ann, first)
	if _, err := p.bob.admin.WithdrawProposal(ctx, &capb.WithdrawProposalRequest{ProposalId: taken}); err != nil {
		t.Fatal(err)
	}
	_, err = grant(t, p.bob, taken)
	wantReason(t, "withdrawn", err, "PROPOSAL_WITHDRAWN")
	_, err = p.ann.admin.WithdrawProposal(ctx, &capb.WithdrawProposalRequest{ProposalId: taken})
	wantReason(t, "withdrawn again", err, "PROPOSAL_WITHDRAWN")

	// What the act refuses leaves the proposal as it is.
	early := taint(p.ann, first)
	_, err = grant(t, p.bob, early)
	wantCode(t, err, codes.FailedPrecondition) // it signs
	_, err = p.ann.admin.ActivateAuthority(ctx, &capb.ActivateAuthorityRequest{AuthorityId: next, Force: true})
	if _, err := grant(t, p.bob, proposal(t, "activate", err)); err != nil {
		t.Fatal(err)
	}
	// The world changed: it was proposed while the key signed.
	_, err = grant(t, p.bob, early)
	wantReason(t, "on another basis", err, "PROPOSAL_VOID")
	_, err = grant(t, p.bob, early)
	wantReason(t, "once it is void", err, "PROPOSAL_VOID")

	// Both run as one user on the socket.
	_, err = p.admin.TaintAuthority(ctx, &capb.TaintAuthorityRequest{AuthorityId: first})
	own := proposal(t, "on the socket", err)
	_, err = p.admin.GrantProposal(ctx, &capb.GrantProposalRequest{ProposalId: own})
	wantReason(t, "by the same user", err, "PROPOSAL_OWN")

	// Who proposed it is revoked, or no operator any more.
	waits := taint(p.ann, first)
	if _, err := p.bob.admin.Revoke(ctx, &capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: p.ann.id}}); err != nil {
		t.Fatal(err)
	}
	_, err = grant(t, p.bob, waits)
	wantReason(t, "whoever proposed it was revoked", err, "PROPOSAL_VOID")
	waits = taint(p.bob, first)
	if _, err := p.admin.DeleteEntry(ctx, &capb.DeleteEntryRequest{EntryId: p.entriesOf("bob")[0].GetEntryId()}); err != nil {
		t.Fatal(err)
	}
	_, err = p.admin.GrantProposal(ctx, &capb.GrantProposalRequest{ProposalId: waits})
	wantReason(t, "whoever proposed it is no operator any more", err, "PROPOSAL_VOID")
	if p.authorityStates()[first] != "old" {
		t.Errorf("the key is %s; want that nothing was done to it", p.authorityStates()[first])
	}
	if resp, err := p.eve.admin.ListProposals(ctx, &capb.ListProposalsRequest{}); err != nil || len(resp.GetProposals()) != 1 || resp.GetProposals()[0].GetProposalId() != own {
		t.Errorf("ListProposals = %v, %v; want the one that waits", resp, err)
	}
}

// Nothing that only one replica is configured to do is done by another one alone,
// and a token whose rule the configuration has no more proposes nothing.
func TestFourEyesOfAnotherReplicaCountHere(t *testing.T) {
	provider := oidcprovider.Start(t)
	dir := tempDir(t)
	c := startCA(t, dir)
	c.stop()
	inStore(t, dir, func(st store.Store) {
		if err := approval.Require(t.Context(), st, "ca-2", true); err != nil {
			t.Fatal(err)
		}
	})
	file := filepath.Join(t.TempDir(), "provider.pem")
	if err := os.WriteFile(file, provider.CertificatePEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	withGroup := func(group string) func(*ca.Config) {
		return func(cfg *ca.Config) {
			cfg.OIDC = []ca.OIDC{{Issuer: provider.URL, Audience: "merlon", CAFile: file, Roles: []ca.OIDCRole{{Claims: map[string]string{"groups": group}, Role: "operator"}}}}
		}
	}
	as := func(c *testCA, sub string) *testClient {
		claims := provider.Claims("merlon", sub, time.Now())
		claims["groups"] = []string{"ops"}
		return c.bearer(provider.Token(claims))
	}
	c = startCA(t, dir, withGroup("ops"))
	token := func(who *testClient, name string) error {
		_, err := who.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_REPLICA, ReplicaName: name})
		return err
	}
	id := proposal(t, "with four_eyes on another replica", token(as(c, "ann"), "r1"))
	_, err := grant(t, as(c, "ann"), id)
	wantReason(t, "another token of the same subject", err, "PROPOSAL_OWN")
	if _, err := grant(t, as(c, "bob"), id); err != nil {
		t.Fatal(err)
	}
	waits := proposal(t, "again", token(as(c, "ann"), "r2"))
	c.stop()
	c = startCA(t, dir, withGroup("others"))
	_, err = c.admin.GrantProposal(t.Context(), &capb.GrantProposalRequest{ProposalId: waits})
	wantReason(t, "the rule of whoever proposed it is gone", err, "PROPOSAL_VOID")
}
