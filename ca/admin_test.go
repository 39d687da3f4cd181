// Operators and the CA: entries, revocation, what is refused, and what the
// audit log says of it.

package ca_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
)

func TestBadEntriesAreRefusedAndChangeNothing(t *testing.T) {
	c := startCA(t, tempDir(t))
	for name, test := range map[string]struct {
		change func(*capb.Entry)
		field  string
	}{
		"no SPIFFE ID":      {func(e *capb.Entry) { e.SpiffeId = "" }, "spiffe_id"},
		"https":             {func(e *capb.Entry) { e.SpiffeId = "https://shop.test/web" }, "spiffe_id"},
		"query":             {func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test/web?a" }, "spiffe_id"},
		"port":              {func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test:80/web" }, "spiffe_id"},
		"traversal":         {func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test/a/../b" }, "spiffe_id"},
		"encoded":           {func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test/%2e%2e" }, "spiffe_id"},
		"upper-case domain": {func(e *capb.Entry) { e.SpiffeId = "spiffe://SHOP.test/web" }, "spiffe_id"},
		"newline":           {func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test/web\n" }, "spiffe_id"},
		"too long":          {func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test/" + strings.Repeat("a", 2048) }, "spiffe_id"},
		"other domain":      {func(e *capb.Entry) { e.SpiffeId = "spiffe://other.test/web" }, "spiffe_id"},
		"root path":         {func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test" }, "spiffe_id"},
		"agent":             {func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test/agent/n2" }, "spiffe_id"},
		"CA":                {func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test/ca" }, "spiffe_id"},
		"no parent":         {func(e *capb.Entry) { e.ParentId = "" }, "parent_id"},
		"workload parent":   {func(e *capb.Entry) { e.ParentId = "spiffe://shop.test/web" }, "parent_id"},
		"no selectors":      {func(e *capb.Entry) { e.Selectors = nil }, "selectors"},
		"selector typo":     {func(e *capb.Entry) { e.Selectors[0].Type = "unxi" }, "selectors"},
		"nil selector":      {func(e *capb.Entry) { e.Selectors = []*capb.Selector{nil} }, "selectors"},
		"TTL overflow":      {func(e *capb.Entry) { e.X509SvidTtlSeconds = math.MaxInt64 }, "x509_svid_ttl_seconds"},
		"TTL wraps":         {func(e *capb.Entry) { e.X509SvidTtlSeconds = math.MaxInt64/int64(time.Second) + 100 }, "x509_svid_ttl_seconds"},
		"negative TTL":      {func(e *capb.Entry) { e.JwtSvidTtlSeconds = -1 }, "jwt_svid_ttl_seconds"},
		"long JWT TTL":      {func(e *capb.Entry) { e.JwtSvidTtlSeconds = 86400 }, "jwt_svid_ttl_seconds"},
		"wildcard":          {func(e *capb.Entry) { e.DnsNames = []string{"*.shop.test"} }, "dns_names"},
		"CN":                {func(e *capb.Entry) { e.CommonName = "a\nb" }, "common_name"},
		"hint":              {func(e *capb.Entry) { e.Hint = strings.Repeat("h", 1025) }, "hint"},
		"past":              {func(e *capb.Entry) { e.ExpiresAt = timestamppb.New(time.Unix(1, 0)) }, "expires_at"},
		"no time":           {func(e *capb.Entry) { e.ExpiresAt = &timestamppb.Timestamp{Seconds: math.MaxInt64} }, "expires_at"},
	} {
		e := newEntry("n1", "web")
		test.change(e)
		_, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: e})
		if st := status.Convert(err); st.Code() != codes.InvalidArgument || !strings.HasPrefix(st.Message(), test.field+": ") {
			t.Errorf("%s: %v; want InvalidArgument naming %s", name, err, test.field)
		}
	}
	_, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{})
	wantCode(t, err, codes.InvalidArgument)
	list, err := c.admin.ListEntries(t.Context(), &capb.ListEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.GetEntries()) != 0 {
		t.Errorf("after refusals there are entries: %v", list.GetEntries())
	}
}

func TestBadAdminRequestsAreRefused(t *testing.T) {
	c := startCA(t, tempDir(t))
	admin, ctx := c.admin, t.Context()
	join, reader := capb.TokenKind_TOKEN_KIND_JOIN, capb.TokenKind_TOKEN_KIND_BUNDLE_READER
	for name, test := range map[string]struct {
		call func() error
		want codes.Code
	}{
		"get nothing":    {func() error { _, err := admin.GetEntry(ctx, &capb.GetEntryRequest{}); return err }, codes.NotFound},
		"delete nothing": {func() error { _, err := admin.DeleteEntry(ctx, &capb.DeleteEntryRequest{}); return err }, codes.NotFound},
		"delete traversal": {func() error {
			_, err := admin.DeleteEntry(ctx, &capb.DeleteEntryRequest{EntryId: "../trust/bundle"})
			return err
		}, codes.NotFound},
		"delete unknown": {func() error {
			_, err := admin.DeleteEntry(ctx, &capb.DeleteEntryRequest{EntryId: strings.Repeat("a", 32)})
			return err
		}, codes.NotFound},
		"page too large": {func() error { _, err := admin.ListEntries(ctx, &capb.ListEntriesRequest{PageSize: 1001}); return err }, codes.InvalidArgument},
		"bad page token": {func() error { _, err := admin.ListEntries(ctx, &capb.ListEntriesRequest{PageToken: "x"}); return err }, codes.InvalidArgument},
		"no token kind":  {func() error { _, err := admin.CreateToken(ctx, &capb.CreateTokenRequest{}); return err }, codes.InvalidArgument},
		"bad agent name": {func() error {
			_, err := admin.CreateToken(ctx, &capb.CreateTokenRequest{Kind: join, AgentName: "a/b"})
			return err
		}, codes.InvalidArgument},
		"long token": {func() error {
			_, err := admin.CreateToken(ctx, &capb.CreateTokenRequest{Kind: join, TtlSeconds: math.MaxInt64})
			return err
		}, codes.InvalidArgument},
		"bad bundle name": {func() error {
			_, err := admin.CreateToken(ctx, &capb.CreateTokenRequest{Kind: reader, PolicyBundle: "../x"})
			return err
		}, codes.InvalidArgument},
		"revoke nothing": {func() error { _, err := admin.Revoke(ctx, &capb.RevokeRequest{}); return err }, codes.InvalidArgument},
		"revoke foreign": {func() error { return revokeID(t, c, "spiffe://other.test/web") }, codes.InvalidArgument},
		"revoke domain":  {func() error { return revokeID(t, c, "spiffe://shop.test") }, codes.InvalidArgument},
		"revoke no agent": {func() error {
			_, err := admin.Revoke(ctx, &capb.RevokeRequest{Subject: &capb.RevokeRequest_AgentId{AgentId: "spiffe://shop.test/agent/x"}})
			return err
		}, codes.NotFound},
		"revoke bad serial": {func() error {
			_, err := admin.Revoke(ctx, &capb.RevokeRequest{Subject: &capb.RevokeRequest_Serial{Serial: "XY"}})
			return err
		}, codes.InvalidArgument},
		"revoke no serial": {func() error {
			_, err := admin.Revoke(ctx, &capb.RevokeRequest{Subject: &capb.RevokeRequest_Serial{}})
			return err
		}, codes.InvalidArgument},
		"revoke authority": {func() error {
			_, err := admin.Revoke(ctx, &capb.RevokeRequest{Subject: &capb.RevokeRequest_AuthorityId{AuthorityId: "zz"}})
			return err
		}, codes.InvalidArgument},
		"note with newline": {func() error {
			_, err := admin.Revoke(ctx, &capb.RevokeRequest{Note: "a\n{}", Subject: &capb.RevokeRequest_Serial{Serial: "a"}})
			return err
		}, codes.InvalidArgument},
		"no policy": {func() error { _, err := admin.PushPolicy(ctx, &capb.PushPolicyRequest{}); return err }, codes.InvalidArgument},
		"policy noise": {func() error {
			_, err := admin.PushPolicy(ctx, &capb.PushPolicyRequest{Bundle: []byte("noise")})
			return err
		}, codes.InvalidArgument},
		"policy too large": {func() error {
			_, err := admin.PushPolicy(ctx, &capb.PushPolicyRequest{Bundle: make([]byte, 4<<20+1)})
			return err
		}, codes.InvalidArgument},
		"policy name": {func() error {
			_, err := admin.PushPolicy(ctx, &capb.PushPolicyRequest{Name: "A/B", Bundle: policyBundle(t)})
			return err
		}, codes.InvalidArgument},
		"get policy by name": {func() error { _, err := admin.GetPolicy(ctx, &capb.GetPolicyRequest{Name: "//"}); return err }, codes.InvalidArgument},
	} {
		if err := test.call(); status.Code(err) != test.want {
			t.Errorf("%s: %v; want %s", name, err, test.want)
		}
	}
	if got, err := admin.ListRevocations(ctx, &capb.ListRevocationsRequest{}); err != nil || len(got.GetRevocations()) != 0 {
		t.Errorf("after refusals: revocations %v, %v; want none", got, err)
	}
	if got, err := admin.GetPolicy(ctx, &capb.GetPolicyRequest{}); err != nil || got.GetPolicyBundle().GetGeneration() != 0 || len(got.GetPolicyBundle().GetKeys()) != 1 {
		t.Errorf("after refusals: policy %v, %v; want generation 0 with its key", got, err)
	}
}

func revokeID(t *testing.T, c *testCA, id string) error {
	t.Helper()
	_, err := c.admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: id}})
	return err
}

func TestEntriesArePagedAndFiltered(t *testing.T) {
	c := startCA(t, tempDir(t))
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		c.entry("n1", id)
	}
	c.entry("n2", "a")
	seen := make(map[string]bool)
	for token, pages := "", 0; ; pages++ {
		page, err := c.admin.ListEntries(t.Context(), &capb.ListEntriesRequest{PageSize: 4, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page.GetEntries() {
			seen[e.GetEntryId()] = true
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
		if pages > 5 {
			t.Fatal("paging does not end")
		}
	}
	if len(seen) != 6 {
		t.Errorf("paging saw %d entries; want 6", len(seen))
	}
	for name, test := range map[string]struct {
		req  *capb.ListEntriesRequest
		want int
	}{
		"parent":      {&capb.ListEntriesRequest{ParentId: "spiffe://shop.test/agent/n1"}, 5},
		"SPIFFE ID":   {&capb.ListEntriesRequest{SpiffeId: "spiffe://shop.test/a"}, 2},
		"both":        {&capb.ListEntriesRequest{SpiffeId: "spiffe://shop.test/a", ParentId: "spiffe://shop.test/agent/n2"}, 1},
		"no such one": {&capb.ListEntriesRequest{SpiffeId: "spiffe://shop.test/z"}, 0},
	} {
		got, err := c.admin.ListEntries(t.Context(), test.req)
		if err != nil || len(got.GetEntries()) != test.want {
			t.Errorf("filter by %s: %d entries, %v; want %d", name, len(got.GetEntries()), err, test.want)
		}
	}
}

// One record per issuance and refusal, two per administrative act, and the chain
// holds.
func TestEveryActIsInTheAuditLog(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	a := c.agent("n1")
	e := c.entry("n1", "web")
	a.svid(e)
	if _, err := a.jwt(e.GetEntryId(), []string{"x"}); err != nil {
		t.Fatal(err)
	}
	_, csr := newCSR(t)
	if _, err := a.node.Renew(t.Context(), &capb.RenewRequest{Csr: csr}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: "x\n{\"type\":\"issue\"}", Csr: csr}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{}); err == nil {
		t.Fatal("an agent may list agents")
	}
	if err := revokeID(t, c, "spiffe://other.test/x"); err == nil {
		t.Fatal("a foreign ID was revoked")
	}
	if err := revokeID(t, c, e.GetSpiffeId()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: e.GetEntryId()}); err != nil {
		t.Fatal(err)
	}
	pushPolicy(t, c)
	var acts []string
	for _, r := range c.auditRecords() {
		detail, _ := r["detail"].(string)
		acts = append(acts, strings.TrimSpace(r["type"].(string)+" "+detail))
	}
	want := []string{
		"admin begin with root", "admin begin with intermediate", "admin begin with JWT key", "renew certificate of the log's key", "admin save a checkpoint of the audit log", "issue",
		`admin begin to create token (kind: TOKEN_KIND_JOIN, agent_name: "n1")`, "admin create join token", "attest join_token",
		`admin begin to create entry (entry: (parent_id: "spiffe://shop.test/agent/n1", selectors: (type: "unix", value: "uid:1000")))`, "admin create entry",
		"issue", "issue JWT", "renew join_token", "refuse sign", "refuse /merlon.ca.v1.Admin/ListAgents",
		"admin begin to revoke", "refuse revoke", "admin begin to revoke", "admin revoke SPIFFE ID",
		"admin begin to delete entry", "admin delete entry", "admin begin to push policy", "admin push policy bundle main, generation 1",
	}
	if got, want := strings.Join(acts, "\n"), strings.Join(want, "\n"); got != want {
		t.Errorf("audit log:\n%s\nwant:\n%s", got, want)
	}
	c.stop()
	if r, err := audit.Verify(dir + "/data/audit.jsonl"); err != nil || r.Last != uint64(len(want)) || r.Checkpoint.Size != int64(len(want)) || len(r.Unfinished) > 0 {
		t.Errorf("audit.Verify = %+v, %v; want %d records, all under a checkpoint, and no act without its outcome", r, err, len(want))
	}
}

// SECURITY.md T37: tokens are secrets.
func TestTokensAreStoredAndLoggedNowhere(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	token := c.joinToken("n1")
	reader, err := c.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_BUNDLE_READER})
	if err != nil {
		t.Fatal(err)
	}
	c.stop()
	for _, secret := range []string{token, reader.GetToken()} {
		if file := grep(t, dir, secret); file != "" {
			t.Errorf("%s holds a token", file)
		}
	}
}

func TestRevocationStampsWhatWasIssuedBefore(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	adminEntry := newEntry("n1", "console")
	adminEntry.Admin = true
	created, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: adminEntry})
	if err != nil {
		t.Fatal(err)
	}
	key, chain := a.svid(created.GetEntry())
	before := c.client(key, chain)
	if _, err := before.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := revokeID(t, c, created.GetEntry().GetSpiffeId()); err != nil {
		t.Fatal(err)
	}
	_, err = before.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
	wantCode(t, err, codes.Unauthenticated)
	// The entry still holds: a fresh SVID is as good as before.
	key, chain = a.svid(created.GetEntry())
	if _, err := c.client(key, chain).admin.ListAgents(t.Context(), &capb.ListAgentsRequest{}); err != nil {
		t.Errorf("an SVID issued after the revocation: %v", err)
	}
}
