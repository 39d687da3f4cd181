// Agents and the CA: attestation, signing, and what agents must not get.

package ca_test

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/checkpoint"
	"merlon.dev/sdk/svid"
)

func TestAgentAttestsAndObtainsSVIDs(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	e := c.entry("n1", "web")
	_, chain := a.svid(e)

	trust, err := c.admin.GetTrustBundle(t.Context(), &capb.GetTrustBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("shop.test")
	bundle, err := spiffebundle.Parse(td, trust.GetTrustBundle().GetJwks())
	if err != nil {
		t.Fatal(err)
	}
	peer, err := svid.VerifyRawChain(chain, bundle, time.Now())
	if err != nil {
		t.Fatalf("the issued SVID does not verify: %v", err)
	}
	if got := peer.ID.String(); got != e.GetSpiffeId() {
		t.Errorf("SPIFFE ID = %s; want %s", got, e.GetSpiffeId())
	}
	if peer.Serial.Agent == 0 || peer.Serial.Revision < e.GetRevision() {
		t.Errorf("serial = %+v; want the agent's handle and a revision of at least %d", peer.Serial, e.GetRevision())
	}
	if n := len(trust.GetRootHashes()); n != 1 || trust.GetRootHashes()[0] != svid.KeyHash(c.srv.Root()) {
		t.Errorf("root hashes = %v; want that of the root", trust.GetRootHashes())
	}

	jwt, err := a.jwt(e.GetEntryId(), []string{"orders"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := svid.VerifyJWT(jwt.GetToken(), bundle, []string{"orders"}, time.Now()); err != nil {
		t.Errorf("the issued JWT-SVID does not verify: %v", err)
	}

	_, csr := newCSR(t)
	renewed, err := a.node.Renew(t.Context(), &capb.RenewRequest{Csr: csr})
	if err != nil {
		t.Fatal(err)
	}
	again, err := svid.VerifyRawChain(renewed.GetX509Svid(), bundle, time.Now())
	if err != nil || again.ID.String() != a.id || again.Serial.Agent != peer.Serial.Agent {
		t.Errorf("renewed SVID: %+v, %v; want %s with the same handle", again, err, a.id)
	}
}

// The CA presents its root, so that an agent can compare it with the pinned
// hash before it sends evidence.
func TestFirstContactShowsTheRoot(t *testing.T) {
	c := startCA(t, tempDir(t))
	token, err := c.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN})
	if err != nil {
		t.Fatal(err)
	}
	state := dialTLS(t, c.srv.Address().String())
	last := state.PeerCertificates[len(state.PeerCertificates)-1]
	if svid.KeyHash(last) != token.GetRootHash() {
		t.Errorf("the presented chain ends in %s; want the root with hash %s", svid.KeyHash(last), token.GetRootHash())
	}
	leaf := state.PeerCertificates[0]
	if got := leaf.URIs[0].String(); got != "spiffe://shop.test/ca" {
		t.Errorf("the CA presents %s; want spiffe://shop.test/ca", got)
	}
	if err := leaf.VerifyHostname("localhost"); err != nil {
		t.Error(err)
	}
	if !strings.HasPrefix(token.GetAgentId(), "spiffe://shop.test/agent/node-") {
		t.Errorf("agent ID = %q; want a random name", token.GetAgentId())
	}
}

// SECURITY.md T6.
func TestJoinTokenWorksOnceOfManyParallelAttempts(t *testing.T) {
	c := startCA(t, tempDir(t))
	token := c.joinToken("n1")
	const attempts = 200
	var wins atomic.Int32
	var wg sync.WaitGroup
	clients := make([]*testClient, 10)
	for i := range clients {
		clients[i] = c.client(nil, nil)
	}
	for i := range attempts {
		_, csr := newCSR(t)
		wg.Go(func() {
			_, err := clients[i%len(clients)].node.Attest(context.Background(), &capb.AttestRequest{
				Evidence: &capb.AttestRequest_JoinToken{JoinToken: token}, Csr: csr,
			})
			if err == nil {
				wins.Add(1)
				return
			}
			wantCode(t, err, codes.PermissionDenied)
		})
	}
	wg.Wait()
	if wins.Load() != 1 {
		t.Fatalf("%d of %d attestations with one token succeeded; want 1", wins.Load(), attempts)
	}
	var attested, refused int
	for _, r := range c.auditRecords() {
		switch r["type"] {
		case "attest":
			attested++
		case "refuse":
			refused++
		}
	}
	if attested != 1 || refused != attempts-1 {
		t.Errorf("audit has %d attestations and %d refusals; want 1 and %d", attested, refused, attempts-1)
	}
}

func TestBadCSRCostsNoJoinToken(t *testing.T) {
	c := startCA(t, tempDir(t))
	token := &capb.AttestRequest_JoinToken{JoinToken: c.joinToken("n1")}
	node := c.client(nil, nil).node
	_, err := node.Attest(t.Context(), &capb.AttestRequest{Evidence: token, Csr: []byte("x")})
	wantCode(t, err, codes.InvalidArgument)
	_, csr := newCSR(t)
	if _, err := node.Attest(t.Context(), &capb.AttestRequest{Evidence: token, Csr: csr}); err != nil {
		t.Errorf("the token was used up by a bad CSR: %v", err)
	}
}

func TestAttestRefusesBadTokens(t *testing.T) {
	c := startCA(t, tempDir(t))
	short, err := c.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, TtlSeconds: 1})
	if err != nil {
		t.Fatal(err)
	}
	reader, err := c.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_BUNDLE_READER})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(short.GetExpiresAt().AsTime()) + time.Millisecond)
	node := c.client(nil, nil).node
	_, csr := newCSR(t)
	for name, token := range map[string]string{
		"unknown": "mjt-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "empty": "", "no kind": "xyz", "expired": short.GetToken(),
		"bundle reader's": reader.GetToken(), "huge": "mjt-" + strings.Repeat("a", 1<<16),
	} {
		_, err := node.Attest(t.Context(), &capb.AttestRequest{Evidence: &capb.AttestRequest_JoinToken{JoinToken: token}, Csr: csr})
		if err == nil {
			t.Errorf("%s token was accepted", name)
		}
		wantCode(t, err, codes.PermissionDenied)
	}
	_, err = node.Attest(t.Context(), &capb.AttestRequest{Csr: csr})
	wantCode(t, err, codes.InvalidArgument)
}

// SECURITY.md T7: with a valid agent's SVID, raw calls for another node's
// entries.
func TestAgentGetsNothingOfAnotherNode(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("a")
	c.agent("b")
	mine, theirs := c.entry("a", "mine"), c.entry("b", "theirs")
	_, csr := newCSR(t)
	resp, err := a.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{
		{EntryId: theirs.GetEntryId(), Csr: csr},
		{EntryId: mine.GetEntryId(), Csr: csr},
		{EntryId: "no such entry\n", Csr: csr},
		{EntryId: strings.Repeat("0", 32), Csr: csr},
	}})
	if err != nil {
		t.Fatal(err)
	}
	results := resp.GetResults()
	for _, i := range []int{0, 2, 3} {
		if codes.Code(results[i].GetCode()) != codes.PermissionDenied || len(results[i].GetX509Svid()) != 0 {
			t.Errorf("item %d: code %d; want PermissionDenied and no SVID", i, results[i].GetCode())
		}
	}
	if results[0].GetMessage() != results[3].GetMessage() {
		t.Errorf("another node's entry is told apart from one that does not exist: %q, %q", results[0].GetMessage(), results[3].GetMessage())
	}
	if results[1].GetCode() != 0 {
		t.Errorf("own entry in a mixed batch: %s", results[1].GetMessage())
	}
	_, err = a.jwt(theirs.GetEntryId(), []string{"x"})
	wantCode(t, err, codes.PermissionDenied)

	listing := until(t, a.sync(0), synced)
	if n := len(listing.GetEntries()); n != 1 || listing.GetEntries()[0].GetEntryId() != mine.GetEntryId() {
		t.Errorf("Sync of a lists %v; want only its own entry", listing.GetEntries())
	}
}

// Each item of a batch of JWT-SVIDs is judged, answered and recorded by itself.
func TestJWTBatchAnswersEachItem(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("a")
	mine, theirs, ended := c.entry("a", "mine"), c.entry("b", "theirs"), newEntry("a", "ended")
	ended.ExpiresAt = timestampOf(time.Now().Add(time.Second))
	expired, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: ended})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(ended.GetExpiresAt().AsTime()) + time.Millisecond)
	long := strings.Repeat("a", 2000)
	items := []*capb.SignJWTItem{
		{EntryId: mine.GetEntryId(), Audience: []string{"x"}},
		{EntryId: theirs.GetEntryId(), Audience: []string{"x"}},
		{EntryId: "none\n", Audience: []string{"x"}},
		{EntryId: expired.GetEntry().GetEntryId(), Audience: []string{"x"}},
		{EntryId: mine.GetEntryId()},
		{EntryId: mine.GetEntryId(), Audience: []string{"x", "y"}},
		{EntryId: mine.GetEntryId(), Audience: []string{long}},
		{EntryId: mine.GetEntryId(), Audience: []string{"y"}},
	}
	want := []codes.Code{
		codes.OK, codes.PermissionDenied, codes.PermissionDenied, codes.PermissionDenied,
		codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.OK,
	}
	before := len(c.auditRecords())
	resp, err := a.node.SignJWT(t.Context(), &capb.SignJWTRequest{Items: items})
	if err != nil {
		t.Fatal(err)
	}
	records := c.auditRecords()[before:]
	if len(records) != len(items) || len(resp.GetResults()) != len(items) {
		t.Fatalf("%d results and %d records of %d items", len(resp.GetResults()), len(records), len(items))
	}
	serials := make(map[string]bool)
	for i, r := range resp.GetResults() {
		rec := records[i]
		if codes.Code(r.GetCode()) != want[i] || (r.GetToken() != "") != (want[i] == codes.OK) {
			t.Errorf("item %d: code %d, %q; want %s, and a token only then", i, r.GetCode(), r.GetMessage(), want[i])
		}
		switch {
		case want[i] != codes.OK && (rec["type"] != "refuse" || rec["reason"] != r.GetMessage() || rec["serial"] != nil || rec["actor"] != a.id):
			t.Errorf("item %d: its record is %v; want the refusal %q", i, rec, r.GetMessage())
		case want[i] == codes.OK && (rec["type"] != "issue" || rec["entry_id"] != mine.GetEntryId() || rec["spiffe_id"] != mine.GetSpiffeId() || rec["authority_id"] == nil || serials[text(rec["serial"])]):
			t.Errorf("item %d: its record is %v; want that of its own issuance", i, rec)
		case want[i] == codes.OK:
			serials[text(rec["serial"])] = true
			if hash, err := checkpoint.TokenHash(r.GetToken()); err != nil || rec["signed_sha256"] != hash {
				t.Errorf("item %d: its record is of another token: %v", i, rec)
			}
		}
	}
	if a, b := resp.GetResults()[1].GetMessage(), resp.GetResults()[2].GetMessage(); a != b {
		t.Errorf("another node's entry is told apart from one that does not exist: %q, %q", a, b)
	}
}

func TestSignBoundsItsWork(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	_, err := a.node.Sign(t.Context(), &capb.SignRequest{})
	wantCode(t, err, codes.InvalidArgument)
	_, err = a.node.Sign(t.Context(), &capb.SignRequest{Items: make([]*capb.SignItem, 501)})
	wantCode(t, err, codes.InvalidArgument)
	for _, n := range []int{0, 101} {
		_, err = a.node.SignJWT(t.Context(), &capb.SignJWTRequest{Items: make([]*capb.SignJWTItem, n)})
		wantCode(t, err, codes.InvalidArgument)
	}
	for name, audience := range map[string][]string{"none": nil, "empty": {""}, "long": {strings.Repeat("a", 2000)}} {
		e := c.entry("n1", "jwt-"+name)
		if _, err := a.jwt(e.GetEntryId(), audience); err == nil {
			t.Errorf("audience %s was accepted", name)
		}
	}
}

// jwt_algorithm and jwt_max_audiences, as a relying party sees them.
func TestJWTSVIDsAreAsConfigured(t *testing.T) {
	two := []string{"orders", "stock"}
	for name, test := range map[string]struct {
		change func(*ca.Config)
		head   string
		two    codes.Code
	}{
		"default":       {func(*ca.Config) {}, `{"alg":"ES256","kid":%q,"typ":"JWT"}`, codes.InvalidArgument},
		"RS256":         {func(c *ca.Config) { c.JWTAlgorithm = "RS256" }, `{"alg":"RS256","kid":%q,"typ":"JWT"}`, codes.InvalidArgument},
		"two audiences": {func(c *ca.Config) { c.JWTMaxAudiences = 2 }, `{"alg":"ES256","kid":%q,"typ":"JWT"}`, codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			c := startCA(t, tempDir(t), test.change)
			a := c.agent("n1")
			e := c.entry("n1", "web")
			resp, err := a.jwt(e.GetEntryId(), two[:1])
			if err != nil {
				t.Fatal(err)
			}
			trust, err := c.admin.GetTrustBundle(t.Context(), &capb.GetTrustBundleRequest{})
			if err != nil {
				t.Fatal(err)
			}
			bundle, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("shop.test"), trust.GetTrustBundle().GetJwks())
			if err != nil {
				t.Fatal(err)
			}
			got, err := svid.VerifyJWT(resp.GetToken(), bundle, two[:1], time.Now())
			if err != nil {
				t.Fatal(err)
			}
			if life := time.Until(got.Expiry); life > 5*time.Minute || life < 4*time.Minute || !got.OurSerial || got.Serial.Agent == 0 {
				t.Errorf("it lives %s, serial %+v; want 5m and one of ours in jti", life, got.Serial)
			}
			kid := slices.Collect(maps.Keys(bundle.JWTAuthorities()))[0]
			text, _, _ := strings.Cut(resp.GetToken(), ".")
			if head, _ := base64.RawURLEncoding.DecodeString(text); string(head) != fmt.Sprintf(test.head, kid) {
				t.Errorf("header = %s", head)
			}
			_, err = a.jwt(e.GetEntryId(), two)
			wantCode(t, err, test.two)
		})
	}
}

// What cannot live as long as asked for is cut, and agent and audit log are told.
func TestSVIDsNeverOutliveTheirEntryOrTheirIssuer(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	end := time.Now().Add(10 * time.Second)
	brief, long, fitting := newEntry("n1", "brief"), newEntry("n1", "long"), newEntry("n1", "fitting")
	brief.ExpiresAt = timestampOf(end)
	long.X509SvidTtlSeconds = 24 * 3600 // as the intermediate, which is older
	intermediate, err := x509.ParseCertificate(a.chain[1])
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(intermediate.NotAfter.Add(-24*time.Hour + time.Second)))
	for _, test := range []struct {
		entry   *capb.Entry
		end     time.Time
		warning string
	}{
		{brief, end, "cut at the end of the registration entry: 1h0m0s"},
		{long, intermediate.NotAfter, "cut at the end of the issuing authority: 24h0m0s"},
		{fitting, time.Now().Add(time.Hour), ""},
	} {
		created, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: test.entry})
		if err != nil {
			t.Fatal(err)
		}
		_, csr := newCSR(t)
		resp, err := a.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: created.GetEntry().GetEntryId(), Csr: csr}}})
		if err != nil {
			t.Fatal(err)
		}
		r := resp.GetResults()[0]
		leaf, err := x509.ParseCertificate(r.GetX509Svid()[0])
		if err != nil {
			t.Fatal(err)
		}
		if left := test.end.Sub(leaf.NotAfter); left < 0 && test.warning != "" || left > 2*time.Second || leaf.NotAfter.After(intermediate.NotAfter) {
			t.Errorf("%s: NotAfter = %s; want %s", test.entry.GetSpiffeId(), leaf.NotAfter, test.end)
		}
		if !strings.HasPrefix(r.GetWarning(), test.warning) || (test.warning == "") != (r.GetWarning() == "") {
			t.Errorf("%s: warning %q; want %q", test.entry.GetSpiffeId(), r.GetWarning(), test.warning)
		}
		records := c.issuances()
		if detail, _ := records[len(records)-1]["detail"].(string); detail != r.GetWarning() {
			t.Errorf("%s: the audit log says %q; the agent was told %q", test.entry.GetSpiffeId(), detail, r.GetWarning())
		}
	}
}

// SECURITY.md T9: a revoked agent gets nothing, on the connection that it has
// open; its stream ends; with a new token it may come back.
func TestRevokedAgentIsCutAndMayAttestAgain(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	e := c.entry("n1", "web")
	stream := a.sync(0)
	until(t, stream, synced)
	if _, err := c.admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_AgentId{AgentId: a.id}}); err != nil {
		t.Fatal(err)
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			wantCode(t, err, codes.Unauthenticated)
			break
		}
		if len(msg.GetRevocations()) > 0 {
			t.Error("the revoked agent was still told of changes")
		}
	}
	_, csr := newCSR(t)
	_, err := a.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: e.GetEntryId(), Csr: csr}}})
	wantCode(t, err, codes.Unauthenticated)
	_, err = a.node.Renew(t.Context(), &capb.RenewRequest{Csr: csr})
	wantCode(t, err, codes.Unauthenticated)

	again := c.agent("n1")
	again.svid(e)
}
