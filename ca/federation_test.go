// Federation by hand: what administrators set reaches the agents concerned, and
// nothing that vouches for the wrong trust domain is taken.

package ca_test

import (
	"crypto/ecdsa"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// jwksOf is the document of a trust domain; 0 is no sequence number.
func jwksOf(t testing.TB, b *spiffebundle.Bundle, sequence uint64) []byte {
	t.Helper()
	if sequence > 0 {
		b.SetSequenceNumber(sequence)
	}
	text, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (c *testCA) federate(a *forge.Authority, sequence uint64, force bool) (*capb.SetFederatedBundleResponse, error) {
	c.t.Helper()
	return c.admin.SetFederatedBundle(c.t.Context(), &capb.SetFederatedBundleRequest{
		TrustDomain: a.TrustDomain.Name(), Document: jwksOf(c.t, a.Bundle(), sequence), Force: force,
	})
}

func (c *testCA) federating(parent, id string, with ...string) *capb.Entry {
	c.t.Helper()
	e := newEntry(parent, id)
	e.FederatesWith = with
	resp, err := c.admin.CreateEntry(c.t.Context(), &capb.CreateEntryRequest{Entry: e})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetEntry()
}

// toldOf is which trust bundles of others a message brings; "-" for none.
func toldOf(msg *capb.SyncResponse) string {
	if msg.GetFederatedBundles() == nil {
		return ""
	}
	var names []string
	for _, b := range msg.GetFederatedBundles().GetTrustBundles() {
		names = append(names, fmt.Sprintf("%s@%d", b.GetTrustDomain(), b.GetSequence()))
	}
	return strings.Join(append(names, "-")[:max(len(names), 1)], " ")
}

func TestFederationReachesTheNodesConcerned(t *testing.T) {
	c := startCA(t, tempDir(t))
	n1, n2 := c.agent("n1"), c.agent("n2")
	s1, s2 := n1.sync(0), n2.sync(0)
	if got := toldOf(until(t, s1, synced)); got != "-" {
		t.Errorf("the first listing tells of %q; want none, and that it is none", got)
	}
	until(t, s2, synced)

	web := c.federating("n1", "web", "partner.test", "absent.test")
	if got := web.GetFederationWaiting(); !slices.Equal(got, []string{"partner.test", "absent.test"}) {
		t.Errorf("a new entry waits for %q; want both", got)
	}
	msg := until(t, s1, func(m *capb.SyncResponse) bool { return len(m.GetEntries()) > 0 })
	if got := msg.GetEntries()[0]; !slices.Equal(got.GetFederatesWith(), []string{"partner.test", "absent.test"}) || len(got.GetFederationWaiting()) > 0 {
		t.Errorf("the agent gets %v; want what it federates with, and nothing about waiting", got)
	}

	partner := forge.New(t, "partner.test")
	set, err := c.federate(partner, 3, false)
	if err != nil {
		t.Fatal(err)
	}
	b := set.GetFederatedBundle()
	if b.GetTrustBundle().GetSequence() != 3 || !slices.Equal(b.GetRootHashes(), []string{svid.KeyHash(partner.Cert)}) ||
		!slices.Equal(b.GetJwtKeyIds(), []string{partner.KeyID}) || !b.GetNotAfter().AsTime().Equal(partner.Cert.NotAfter) {
		t.Errorf("SetFederatedBundle = %v", set)
	}
	msg = until(t, s1, func(m *capb.SyncResponse) bool { return m.GetFederatedBundles() != nil })
	if toldOf(msg) != "partner.test@3" {
		t.Errorf("n1 is told of %q", toldOf(msg))
	}
	parsed, err := spiffebundle.Parse(partner.TrustDomain, msg.GetFederatedBundles().GetTrustBundles()[0].GetJwks())
	if err != nil || !parsed.HasX509Authority(partner.Cert) || !parsed.HasJWTAuthority(partner.KeyID) {
		t.Errorf("n1 is told of %v, %v", parsed, err)
	}
	for _, read := range []func() ([]string, error){
		func() ([]string, error) {
			e, err := c.admin.GetEntry(t.Context(), &capb.GetEntryRequest{EntryId: web.GetEntryId()})
			return e.GetEntry().GetFederationWaiting(), err
		},
		func() ([]string, error) {
			l, err := c.admin.ListEntries(t.Context(), &capb.ListEntriesRequest{})
			return l.GetEntries()[0].GetFederationWaiting(), err
		},
	} {
		if waits, err := read(); err != nil || !slices.Equal(waits, []string{"absent.test"}) {
			t.Errorf("the entry waits for %q, %v; want absent.test", waits, err)
		}
	}

	list, err := c.admin.ListFederatedBundles(t.Context(), &capb.ListFederatedBundlesRequest{})
	if err != nil || len(list.GetFederatedBundles()) != 1 || list.GetFederatedBundles()[0].GetTrustBundle().GetJwks() != nil {
		t.Errorf("ListFederatedBundles = %v, %v; want one, without its keys", list, err)
	}
	if _, err := c.admin.RemoveFederatedBundle(t.Context(), &capb.RemoveFederatedBundleRequest{TrustDomain: "partner.test"}); err != nil {
		t.Fatal(err)
	}
	msg = until(t, s1, func(m *capb.SyncResponse) bool { return m.GetFederatedBundles() != nil })
	if toldOf(msg) != "-" {
		t.Errorf("after the removal n1 is told of %q", toldOf(msg))
	}
	_, err = c.admin.GetFederatedBundle(t.Context(), &capb.GetFederatedBundleRequest{TrustDomain: "partner.test"})
	wantCode(t, err, codes.NotFound)
	_, err = c.admin.RemoveFederatedBundle(t.Context(), &capb.RemoveFederatedBundleRequest{TrustDomain: "partner.test"})
	wantCode(t, err, codes.NotFound)

	// n2, which has no entry that federates, heard of nothing.
	c.entry("n2", "last")
	until(t, s2, func(m *capb.SyncResponse) bool {
		if m.GetFederatedBundles() != nil {
			t.Errorf("n2 was told of %q", toldOf(m))
		}
		return len(m.GetEntries()) > 0
	})
}

// Nobody renews what was handed over but people, who have to be told in time.
func TestMetricsSayWhenAFederationEnds(t *testing.T) {
	c := startCA(t, tempDir(t))
	partner := forge.New(t, "partner.test")
	if _, err := c.federate(partner, 1, false); err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	_, _, body := do(t, client, "GET", "http://"+c.srv.HealthAddress().String()+"/metrics", nil, nil)
	for line := range strings.Lines(body) {
		text, ok := strings.CutPrefix(line, `merlon_ca_federated_expiry_timestamp_seconds{trust_domain="partner.test"} `)
		if !ok {
			continue
		}
		if end, err := strconv.ParseFloat(strings.TrimSpace(text), 64); err != nil || int64(end) != partner.Cert.NotAfter.Unix() {
			t.Errorf("%s; want %d", line, partner.Cert.NotAfter.Unix())
		}
		return
	}
	t.Error("no metric says when the trust bundle of partner.test ends")
}

func TestFederationIsKeptOverARestart(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	c.federating("n1", "web", "partner.test")
	partner := forge.New(t, "partner.test")
	if _, err := c.federate(partner, 5, false); err != nil {
		t.Fatal(err)
	}
	c.stop()
	c = startCA(t, dir)
	_, err := c.federate(partner, 4, false)
	wantCode(t, err, codes.FailedPrecondition)
	if got := toldOf(until(t, c.agent("n1").sync(0), synced)); got != "partner.test@5" {
		t.Errorf("told of %q; want what was set before", got)
	}
}

func TestWrongFederationIsRefusedAndChangesNothing(t *testing.T) {
	c := startCA(t, tempDir(t))
	partner := forge.New(t, "partner.test")
	if _, err := c.federate(partner, 5, false); err != nil {
		t.Fatal(err)
	}
	own, err := c.admin.GetTrustBundle(t.Context(), &capb.GetTrustBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	dev := startCA(t, tempDir(t), func(cfg *ca.Config) { cfg.TrustDomain = "dev.local" })
	development, err := dev.admin.GetTrustBundle(t.Context(), &capb.GetTrustBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var ownKeys map[string]any
	if err := json.Unmarshal(own.GetTrustBundle().GetJwks(), &ownKeys); err != nil {
		t.Fatal(err)
	}
	ownKeys["keys"] = slices.DeleteFunc(ownKeys["keys"].([]any), func(k any) bool { return k.(map[string]any)["use"] != "jwt-svid" })
	ownJWT, err := json.Marshal(ownKeys)
	if err != nil {
		t.Fatal(err)
	}
	sharing := spiffebundle.New(spiffeid.RequireTrustDomainFromString("other.test"))
	if err := sharing.AddJWTAuthority("theirs", partner.JWTKey.Public()); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		td       string
		document []byte
		code     codes.Code
		says     string
	}{
		"own trust domain (T22)":     {"shop.test", own.GetTrustBundle().GetJwks(), codes.InvalidArgument, "own trust domain"},
		"own keys, as another's":     {"other.test", ownJWT, codes.InvalidArgument, "shop.test too"},
		"another's document (T21)":   {"other.test", jwksOf(t, partner.Bundle(), 1), codes.InvalidArgument, "partner.test, not of other.test"},
		"a key of another (B9)":      {"other.test", jwksOf(t, sharing, 1), codes.FailedPrecondition, "partner.test too"},
		"a development root":         {"dev.local", development.GetTrustBundle().GetJwks(), codes.InvalidArgument, "development root"},
		"older (T23)":                {"partner.test", jwksOf(t, partner.Bundle(), 4), codes.FailedPrecondition, "older"},
		"same number, other keys":    {"partner.test", jwksOf(t, forge.New(t, "partner.test").Bundle(), 5), codes.FailedPrecondition, "same sequence"},
		"an ID for a name":           {"spiffe://partner.test", jwksOf(t, partner.Bundle(), 6), codes.InvalidArgument, "trust_domain"},
		"no name":                    {"", jwksOf(t, partner.Bundle(), 6), codes.InvalidArgument, "trust_domain"},
		"no document":                {"partner.test", nil, codes.InvalidArgument, "empty"},
		"a document that is too big": {"partner.test", []byte(strings.Repeat(" ", 300<<10)), codes.InvalidArgument, "at most"},
	} {
		_, err := c.admin.SetFederatedBundle(t.Context(), &capb.SetFederatedBundleRequest{TrustDomain: test.td, Document: test.document})
		if status.Code(err) != test.code || !strings.Contains(fmt.Sprint(err), test.says) {
			t.Errorf("%s: %v; want %s with %q", name, err, test.code, test.says)
		}
	}
	list, err := c.admin.ListFederatedBundles(t.Context(), &capb.ListFederatedBundlesRequest{})
	if err != nil || len(list.GetFederatedBundles()) != 1 || list.GetFederatedBundles()[0].GetTrustBundle().GetSequence() != 5 {
		t.Errorf("afterwards: %v, %v; want partner.test@5 alone", list, err)
	}
	// An operator can know better about the order, and about nothing else.
	if _, err := c.federate(partner, 4, true); err != nil {
		t.Errorf("an older one with force: %v", err)
	}
	_, err = c.admin.SetFederatedBundle(t.Context(), &capb.SetFederatedBundleRequest{TrustDomain: "shop.test", Document: own.GetTrustBundle().GetJwks(), Force: true})
	wantCode(t, err, codes.InvalidArgument)
}

// Federation is for workloads: at the CA's own ports an SVID of another trust
// domain is no SVID, whatever path it has.
func TestFederatedSVIDsAreNobodyToTheCA(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	until(t, a.sync(0), synced)
	partner := forge.New(t, "partner.test")
	c.federating("n1", "web", "partner.test")
	if _, err := c.federate(partner, 1, false); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/agent/n1", "/ca", "/admin"} {
		leaf := partner.Leaf(path)
		conn := c.client(leaf.Key.(*ecdsa.PrivateKey), leaf.Raw())
		_, err := conn.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
		if code := status.Code(err); code != codes.Unavailable && code != codes.Unauthenticated {
			t.Errorf("ListAgents as spiffe://partner.test%s: %v; want no connection", path, err)
		}
		if _, err := conn.node.Renew(t.Context(), &capb.RenewRequest{}); err == nil {
			t.Errorf("Renew as spiffe://partner.test%s was answered", path)
		}
	}
}

func TestFederationIsOnRecord(t *testing.T) {
	c := startCA(t, tempDir(t))
	partner := forge.New(t, "partner.test")
	if _, err := c.federate(partner, 2, false); err != nil {
		t.Fatal(err)
	}
	if _, err := c.federate(partner, 1, false); err == nil {
		t.Fatal("an older one was taken")
	}
	if _, err := c.federate(partner, 1, true); err != nil {
		t.Fatal(err)
	}
	if _, err := c.admin.RemoveFederatedBundle(t.Context(), &capb.RemoveFederatedBundleRequest{TrustDomain: "partner.test"}); err != nil {
		t.Fatal(err)
	}
	var told []string
	for _, r := range c.auditRecords() {
		if detail, _ := r["detail"].(string); strings.Contains(detail, "federated bundle") {
			told = append(told, fmt.Sprint(r["type"], ": ", detail))
		}
	}
	text := strings.Join(told, "\n")
	for _, want := range []string{
		`begin to set federated bundle (trust_domain: "partner.test")`, "admin: set federated bundle of partner.test: sequence 2, sha256 ",
		"refuse: set federated bundle", `begin to set federated bundle (trust_domain: "partner.test", force: true)`,
		"admin: remove federated bundle of partner.test",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the log does not say %q:\n%s", want, text)
		}
	}
}

func TestFederatedTrustDomainsAreBounded(t *testing.T) {
	c := startCA(t, tempDir(t))
	for i := range 256 {
		_, err := c.admin.SetFederatedBundle(t.Context(), &capb.SetFederatedBundleRequest{TrustDomain: fmt.Sprintf("p%d.test", i), Document: []byte(`{"keys":[]}`)})
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := c.admin.SetFederatedBundle(t.Context(), &capb.SetFederatedBundleRequest{TrustDomain: "one-more.test", Document: []byte(`{"keys":[]}`)})
	wantCode(t, err, codes.InvalidArgument)
	if _, err := c.admin.SetFederatedBundle(t.Context(), &capb.SetFederatedBundleRequest{TrustDomain: "p7.test", Document: []byte(`{"keys":[]}`)}); err != nil {
		t.Errorf("one of those that are there: %v", err)
	}
	// A listing of all of them fits into messages.
	var with []string
	for i := range 64 {
		with = append(with, fmt.Sprintf("p%d.test", i))
	}
	c.federating("n1", "web", with...)
	n := 0
	until(t, c.agent("n1").sync(0), func(m *capb.SyncResponse) bool {
		n += len(m.GetFederatedBundles().GetTrustBundles())
		return m.GetSynced()
	})
	if n != 64 {
		t.Errorf("the agent was told of %d trust domains; want 64", n)
	}
}
