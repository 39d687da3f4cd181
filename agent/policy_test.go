// Decisions, the feed of policy and revocations, and explanations, as programs
// and operators see them.

package agent_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/agent"
	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/ca/capb"
	"merlon.dev/policy"
	"merlon.dev/policy/bundle"
	"merlon.dev/sdk/svid"
)

const grants = `grants:
  - id: web-reads
    from: [spiffe://example.test/web]
    to: [spiffe://example.test/orders]
    http: {methods: [GET], paths: [/orders]}
`

// policyKey signs policy bundles.
type policyKey struct {
	t   *testing.T
	key *ecdsa.PrivateKey
}

func newPolicyKey(t *testing.T) *policyKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &policyKey{t: t, key: key}
}

// bundle signs the grants in text as a generation of "main".
func (k *policyKey) bundle(text string, generation uint64) []byte {
	k.t.Helper()
	return k.bundleOf("grants.yaml", text, generation)
}

// bundleOf signs a policy of one file.
func (k *policyKey) bundleOf(name, text string, generation uint64) []byte {
	k.t.Helper()
	return k.sign(name, text, generation, false)
}

func (k *policyKey) sign(name, text string, generation uint64, candidate bool) []byte {
	k.t.Helper()
	dir := k.t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		k.t.Fatal(err)
	}
	unsigned, err := bundle.Build(dir)
	if err != nil {
		k.t.Fatal(err)
	}
	signed, err := bundle.Sign(unsigned, bundle.Metadata{
		Name: "main", TrustDomain: td, Generation: generation, IssuedAt: time.Now(), Candidate: candidate,
	}, "k1", k.key)
	if err != nil {
		k.t.Fatal(err)
	}
	return signed
}

func (k *policyKey) announcement(generation uint64) *capb.PolicyBundle {
	k.t.Helper()
	der, err := x509.MarshalPKIXPublicKey(k.key.Public())
	if err != nil {
		k.t.Fatal(err)
	}
	return &capb.PolicyBundle{Name: "main", Generation: generation, Keys: []*capb.PolicyKey{{Kid: "k1", PublicKey: der}}}
}

func (n *node) authorize(t *testing.T, req *agentpb.AuthorizeRequest) (*agentpb.Decision, error) {
	t.Helper()
	cc, ctx := conn(t, n.socket)
	m, err := agentpb.NewLocalClient(cc).Authorize(ctx, req)
	return m.GetDecision(), err
}

func (n *node) debug(t *testing.T) (agentpb.DebugClient, context.Context) {
	t.Helper()
	cc, ctx := conn(t, "unix://"+n.cfg.AdminSocket)
	return agentpb.NewDebugClient(cc), ctx
}

// policyIs waits for a generation to be active.
func (n *node) policyIs(t *testing.T, generation uint64) {
	t.Helper()
	eventually(t, "the policy is active", func() bool {
		d, err := n.authorize(t, &agentpb.AuthorizeRequest{Source: "spiffe://" + td + "/x", Protocol: "tcp"})
		return err == nil && d.GetPolicyGeneration() == generation
	})
}

func TestAuthorize(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	read := func() *agentpb.AuthorizeRequest {
		return &agentpb.AuthorizeRequest{Source: "spiffe://" + td + "/web", Protocol: "http", Method: "GET", Path: "/orders", SourceSerial: "not-ours"}
	}
	want := func(name string, req *agentpb.AuthorizeRequest, reason string) *agentpb.Decision {
		t.Helper()
		d, err := n.authorize(t, req)
		if err != nil || d.GetReason() != reason || d.GetAllow() != (reason == "ALLOWED") || d.GetDecisionId() == "" {
			t.Errorf("%s: Authorize() = %v, %v; want %s", name, d, err, reason)
		}
		return d
	}
	want("no policy yet", read(), "NO_BUNDLE")
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	n.policyIs(t, 1)
	want("granted", read(), "ALLOWED")
	post := read()
	post.Method = "POST"
	denied := want("another method", post, "METHOD")
	nobody := read()
	nobody.Source = ""
	want("no source", nobody, "NO_IDENTITY")
	garbled := read()
	garbled.Source = "spiffe://" + td + "/a/../web"
	want("a source that is no SPIFFE ID", garbled, "NO_IDENTITY")
	odd := read()
	odd.Path = "/orders/%2e%2e"
	want("an ambiguous path", odd, "BAD_REQUEST")
	named := read()
	named.Destination = "spiffe://" + td + "/orders"
	want("the own destination by name", named, "ALLOWED")
	foreign := read()
	foreign.Destination = "spiffe://" + td + "/other"
	_, err := n.authorize(t, foreign)
	wantError(t, err, codes.PermissionDenied, "NOT_ENTITLED")

	debug, ctx := n.debug(t)
	why, err := debug.ExplainDecision(ctx, &agentpb.ExplainDecisionRequest{DecisionId: denied.GetDecisionId()})
	if err != nil || why.GetDecision().GetReason() != "METHOD" || len(why.GetDetails()) == 0 || why.GetInput().GetMethod() != "POST" {
		t.Errorf("ExplainDecision() = %v, %v; want the denial in words", why, err)
	}
	// A service in audit mode lets through what the policy denies, and nothing else.
	for name, tt := range map[string]struct {
		req    *agentpb.AuthorizeRequest
		reason string
		let    bool
	}{
		"audited": {post, "METHOD", true}, "audited, allowed": {named, "ALLOWED", false}, "audited, ambiguous": {odd, "BAD_REQUEST", false},
	} {
		req := proto.CloneOf(tt.req)
		req.AuditMode = true
		d := want(name, req, tt.reason)
		if why, err := debug.ExplainDecision(ctx, &agentpb.ExplainDecisionRequest{DecisionId: d.GetDecisionId()}); err != nil || why.GetDecision().GetLetThrough() != tt.let {
			t.Errorf("%s: ExplainDecision() = %v, %v; want let through: %v", name, why, err, tt.let)
		}
	}
	if why.GetDecision().GetLetThrough() {
		t.Error("let through without audit mode")
	}
	for id, want := range map[string]codes.Code{policy.NewDecisionID().String(): codes.NotFound, "gone": codes.InvalidArgument} {
		if _, err := debug.ExplainDecision(ctx, &agentpb.ExplainDecisionRequest{DecisionId: id}); status.Code(err) != want {
			t.Errorf("ExplainDecision(%s) = %v; want %v", id, err, want)
		}
	}

	ca.Revoke(&capb.Revocation{Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/web"}})
	eventually(t, "the source is revoked", func() bool {
		d, err := n.authorize(t, read())
		return err == nil && d.GetReason() == "REVOKED"
	})
}

// T33: an agent that has never had a policy denies everything, and says why.
func TestT33WithoutAPolicyEverythingIsDenied(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	for _, protocol := range []string{"http", "grpc", "tcp", ""} {
		d, err := n.authorize(t, &agentpb.AuthorizeRequest{Source: "spiffe://" + td + "/web", Protocol: protocol, Method: "GET", Path: "/orders"})
		if err != nil || d.GetAllow() || d.GetReason() != "NO_BUNDLE" || d.GetPolicyGeneration() != 0 {
			t.Errorf("%q: Authorize() = %v, %v; want NO_BUNDLE", protocol, d, err)
		}
	}
}

func TestSecretHeadersAreNotKept(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	d, err := n.authorize(t, &agentpb.AuthorizeRequest{
		Source: "spiffe://" + td + "/web", Protocol: "http", Method: "GET", Path: "/",
		Headers: map[string]*agentpb.HeaderValues{"authorization": {Values: []string{"Bearer canary"}}, "x-own": {Values: []string{"canary"}}, "user-agent": {Values: []string{"x"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	debug, ctx := n.debug(t)
	why, err := debug.ExplainDecision(ctx, &agentpb.ExplainDecisionRequest{DecisionId: d.GetDecisionId()})
	if err != nil || strings.Contains(why.String(), "canary") || why.GetInput().GetHeaders()["x-own"] == nil || why.GetInput().GetHeaders()["user-agent"].GetValues()[0] != "x" {
		t.Errorf("ExplainDecision() = %v, %v; want the headers, and values of those alone that are to be kept", why, err)
	}
}

// A decision is explained by the generation that made it, also when the policy has
// changed since, and for the time at which it was made.
func TestDecisionIsExplainedByItsGeneration(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key := newPolicyKey(t)
	push := func(text string, generation uint64) {
		t.Helper()
		ca.PublishPolicy(key.bundle(text, generation), key.announcement(generation))
		n.policyIs(t, generation)
	}
	push(grants, 1)
	post := &agentpb.AuthorizeRequest{
		Source: "spiffe://" + td + "/web", Protocol: "http", Method: "POST", Path: "/orders",
		Headers: map[string]*agentpb.HeaderValues{"x-team": {Values: []string{"shop"}}},
	}
	denied, err := n.authorize(t, post)
	if err != nil || denied.GetReason() != "METHOD" {
		t.Fatalf("%v, %v; want METHOD", denied, err)
	}
	debug, ctx := n.debug(t)
	explain := func(trace bool) *agentpb.ExplainDecisionResponse {
		t.Helper()
		m, err := debug.ExplainDecision(ctx, &agentpb.ExplainDecisionRequest{DecisionId: denied.GetDecisionId(), Trace: trace})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	const sentence = "grant web-reads: method POST not in [GET]"
	for generation := uint64(2); generation <= 5; generation++ {
		push(strings.ReplaceAll(grants, "[GET]", "[POST]"), generation)
		m := explain(generation == 5)
		if words := m.GetDetails(); len(words) != 2 || words[0] != sentence || !strings.Contains(words[1], "not kept") || !strings.Contains(words[1], "x-team") ||
			m.GetEngine() != "native" || m.GetDecision().GetPolicyGeneration() != 1 {
			t.Errorf("at generation %d explained as %v; want %q by generation 1", generation, m, sentence)
		}
		if generation == 5 && !strings.Contains(m.GetTrace(), "Fail") {
			t.Errorf("OPA's trace is %q", m.GetTrace())
		}
	}
	push(grants, 6) // and with that the first is gone
	if words := explain(true).GetDetails(); len(words) != 1 || !strings.Contains(words[0], "policy generation 1 decided, and cannot be asked any more: the agent keeps the active generation and the 4 before it") {
		t.Errorf("without its generation explained as %q", words)
	}
}

func TestBadOrOlderPolicyLeavesTheLastGoodOne(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	n.waitReady(t)
	key, thief := newPolicyKey(t), newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 5), key.announcement(5))
	n.policyIs(t, 5)
	ca.PublishPolicy(thief.bundle(grants, 6), key.announcement(6))
	ca.PublishPolicy([]byte("rubbish"), key.announcement(7))
	ca.PublishPolicy(key.bundle(grants, 4), key.announcement(4))
	ca.PublishPolicy(key.bundle(grants, 4), key.announcement(8)) // announced as new, signed as old
	time.Sleep(300 * time.Millisecond)                           // time to do it wrong; it must still be 5
	n.policyIs(t, 5)

	// Kept over a restart without the CA's HTTPS port, and so is the mark
	// below which nothing is taken.
	n.stop()
	ca.PublishPolicy(key.bundle(grants, 4), key.announcement(4))
	cfg.CAHTTPSAddress = agent.Addresses{"127.0.0.1:1"}
	cfg.Logger = testLogger(t)
	n = start(t, cfg)
	n.waitReady(t)
	n.policyIs(t, 5)
	n.stop()
	cfg.CAHTTPSAddress = agent.Addresses{ca.HTTPSAddress}
	cfg.Logger = testLogger(t)
	n = start(t, cfg)
	n.waitReady(t)
	ca.PublishPolicy(key.bundle(grants, 9), key.announcement(9))
	n.policyIs(t, 9)
}

func TestWatch(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	serial, err := svid.NewSerial(7, 1)
	if err != nil {
		t.Fatal(err)
	}
	ca.Revoke(&capb.Revocation{Subject: &capb.Revocation_Serial{Serial: serial.String()}})
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	cc, ctx := conn(t, n.socket)
	stream, err := agentpb.NewLocalClient(cc).Watch(ctx, &agentpb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := func() *agentpb.WatchResponse {
		t.Helper()
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if m := next(); !m.GetReset_() || len(m.GetRevocations()) != 1 || m.GetRevocationsAsOf() == nil {
		t.Errorf("first message = %v; want all revocations and when the CA was heard", m)
	}
	ca.Revoke(&capb.Revocation{Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/web"}})
	if m := next(); m.GetReset_() || len(m.GetRevocations()) != 1 || m.GetRevocations()[0].GetSpiffeId() != "spiffe://"+td+"/web" {
		t.Errorf("second message = %v; want the new revocation alone", m)
	}
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 3), key.announcement(3))
	if m := next(); m.GetPolicyGeneration() != 3 || len(m.GetRevocations()) != 0 {
		t.Errorf("third message = %v; want policy generation 3", m)
	}
}

func TestExplainIdentity(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.HoldSync(true)
	n := start(t, newConfig(t, ca))
	debug, ctx := n.debug(t)
	pid := int32(os.Getpid())
	explain := func() *agentpb.ExplainIdentityResponse {
		t.Helper()
		m, err := debug.ExplainIdentity(ctx, &agentpb.ExplainIdentityRequest{Pid: pid})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if m := explain(); m.GetReason() != "AGENT_NOT_SYNCED" || m.GetHint() == "" {
		t.Errorf("before the first sync: %v; want AGENT_NOT_SYNCED", m)
	}
	ca.PutEntry(ca.Entry("far", "/far", "unix:uid:1", "unix:gid:1", "unix:path:/far"))
	ca.PutEntry(ca.Entry("near", "/near", uidSelector, "unix:path:/usr/bin/web"))
	ca.HoldSync(false)
	n.waitReady(t)
	m := explain()
	if m.GetReason() != "NO_MATCHING_ENTRY" || len(m.GetEntries()) != 2 || m.GetEntries()[0].GetEntryId() != "near" ||
		strings.Join(m.GetEntries()[0].GetMissing(), " ") != "unix:path:/usr/bin/web" || !slices.Contains(m.GetSelectors(), uidSelector) {
		t.Errorf("ExplainIdentity() = %v; want the near entry first, lacking its path", m)
	}
	ca.PutEntry(ca.Entry("fits", "/fits", uidSelector))
	eventually(t, "the entry fits", func() bool { return explain().GetReason() == "" })
	if m := explain(); !m.GetEntries()[0].GetMatches() || m.GetAgentId() != "spiffe://"+td+"/agent/n1" {
		t.Errorf("ExplainIdentity() = %v; want the entry that fits first", m)
	}
	if _, err := debug.ExplainIdentity(ctx, &agentpb.ExplainIdentityRequest{Pid: 1 << 30}); status.Code(err) != codes.NotFound {
		t.Errorf("ExplainIdentity(no such process) = %v; want NotFound", err)
	}
}

func TestPublicSocketDoesNotExplain(t *testing.T) {
	ca := fakeca.New(t, td)
	n := start(t, newConfig(t, ca))
	cc, ctx := conn(t, n.socket)
	if _, err := agentpb.NewDebugClient(cc).ExplainIdentity(ctx, &agentpb.ExplainIdentityRequest{Pid: 1}); status.Code(err) != codes.Unimplemented {
		t.Errorf("Debug on the public socket = %v; want Unimplemented", err)
	}
	// Health needs no header.
	plain, err := grpc.NewClient(n.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if _, err := healthgrpc.NewHealthClient(plain).Check(t.Context(), &healthgrpc.HealthCheckRequest{}); err != nil {
		t.Errorf("Health/Check = %v", err)
	}
}
