// Federated trust domains as workloads see them: by the Workload API, by CSR, and
// as an Envoy's secrets.

package agent_test

import (
	"bytes"
	"crypto/x509"
	"maps"
	"slices"
	"strings"
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

const partner = "spiffe://partner.test"

// federating registers this process with a federation.
func federating(ca *fakeca.CA, id, path string, with ...string) *capb.Entry {
	e := ca.Entry(id, path, uidSelector)
	e.FederatesWith = with
	return e
}

func keys[V any](m map[string]V) string { return strings.Join(slices.Sorted(maps.Keys(m)), " ") }

func TestWorkloadAPIHasFederatedBundles(t *testing.T) {
	ca, other := fakeca.New(t, td), forge.New(t, "partner.test")
	ca.PutEntry(federating(ca, "e1", "/web", "partner.test", "absent.test"))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	cc, ctx := conn(t, n.socket)
	api := workload.NewSpiffeWorkloadAPIClient(cc)
	svids := n.x509Stream(t)
	x509s, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	jwts, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	const own = "spiffe://" + td
	expect := func(when, federated string) {
		t.Helper()
		all := strings.TrimSpace(own + " " + federated)
		m, err := svids.Recv()
		if err != nil || keys(m.GetFederatedBundles()) != federated {
			t.Fatalf("%s: federated_bundles of %q, %v; want %q", when, keys(m.GetFederatedBundles()), err, federated)
		}
		x, err := x509s.Recv()
		if err != nil || keys(x.GetBundles()) != all {
			t.Fatalf("%s: X.509 bundles of %q, %v; want %q", when, keys(x.GetBundles()), err, all)
		}
		j, err := jwts.Recv()
		if err != nil || keys(j.GetBundles()) != all {
			t.Fatalf("%s: JWT bundles of %q, %v; want %q", when, keys(j.GetBundles()), err, all)
		}
		if federated == "" {
			return
		}
		if !bytes.Equal(m.GetFederatedBundles()[partner], other.Cert.Raw) || !bytes.Equal(x.GetBundles()[partner], other.Cert.Raw) || !bytes.Equal(x.GetBundles()[own], ca.Root.Cert.Raw) {
			t.Errorf("%s: a bundle is another's", when)
		}
		parsed, err := jwtbundle.Parse(other.TrustDomain, j.GetBundles()[partner])
		if err != nil || len(parsed.JWTAuthorities()) != 1 || !parsed.HasJWTAuthority(other.KeyID) {
			t.Errorf("%s: JWT bundle %s, %v; want its one key", when, j.GetBundles()[partner], err)
		}
	}
	expect("waiting", "")
	ca.Federate(other)
	expect("it came", partner)
	ca.Federate()
	expect("it was removed", "")
}

// Another entry of the same process opens no more than it says itself, and one
// without federation none.
func TestFederationIsOfTheCallersEntries(t *testing.T) {
	ca := fakeca.New(t, td)
	one, two := forge.New(t, "one.test"), forge.New(t, "two.test")
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	other := ca.Entry("e2", "/other", "unix:uid:4242424")
	other.FederatesWith = []string{"two.test"}
	ca.PutEntry(other)
	ca.Federate(one, two)
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	s := n.x509Stream(t)
	if m := receive(t, s, "/web"); len(m.GetFederatedBundles()) != 0 {
		t.Errorf("a workload that federates with nobody knows %q", keys(m.GetFederatedBundles()))
	}
	ca.PutEntry(federating(ca, "e1", "/web", "one.test"))
	if m := receive(t, s, "/web"); keys(m.GetFederatedBundles()) != "spiffe://one.test" {
		t.Errorf("federated_bundles of %q; want one.test alone", keys(m.GetFederatedBundles()))
	}
}

func TestJWTSVIDsOfFederatedTrustDomainsAreValidated(t *testing.T) {
	ca, other, stranger := fakeca.New(t, td), forge.New(t, "partner.test"), forge.New(t, "stranger.test")
	ca.PutEntry(federating(ca, "e1", "/web", "partner.test"))
	ca.Federate(other, stranger)
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	cc, ctx := conn(t, n.socket)
	api := workload.NewSpiffeWorkloadAPIClient(cc)
	validate := func(token string) (*workload.ValidateJWTSVIDResponse, error) {
		return api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "aud", Svid: token})
	}
	theirs := other.JWT(other.Header(nil), other.Claims("/a", nil))
	if m, err := validate(theirs); err != nil || m.GetSpiffeId() != partner+"/a" {
		t.Fatalf("ValidateJWTSVID = %v, %v; want %s/a", m, err, partner)
	}
	for name, token := range map[string]string{
		"of a trust domain that the caller does not federate with": stranger.JWT(stranger.Header(nil), stranger.Claims("/a", nil)),
		"of ours, by their key (E19)":                              other.JWT(other.Header(nil), other.Claims("/a", forge.Fields{"sub": "spiffe://" + td + "/a"})),
		"of theirs, by our key (E19)":                              ca.Root.JWT(ca.Root.Header(nil), ca.Root.Claims("/a", forge.Fields{"sub": partner + "/a"})),
		"of theirs, to somebody else (J6)":                         other.JWT(other.Header(nil), other.Claims("/a", forge.Fields{"aud": []string{"x"}})),
		"of theirs, ended (J8)":                                    other.JWT(other.Header(nil), other.Claims("/a", forge.Fields{"exp": 1})),
	} {
		if m, err := validate(token); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: ValidateJWTSVID = %v, %v; want InvalidArgument", name, m, err)
		}
	}
	ca.Federate(stranger)
	eventually(t, "the federation has ended", func() bool {
		_, err := validate(theirs)
		return status.Code(err) == codes.InvalidArgument
	})
}

// A policy reads the claims of those tokens, of the trust domains that the called
// service federates with.
func TestPoliciesReadJWTSVIDsOfFederatedTrustDomains(t *testing.T) {
	ca, other, stranger := fakeca.New(t, td), forge.New(t, "partner.test"), forge.New(t, "stranger.test")
	ca.PutEntry(federating(ca, "e1", "/orders", "partner.test"))
	ca.Federate(other, stranger)
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundleOf("authz.rego", `package authz

allow if endswith(input.jwt.sub, "/buyer")
`, 1), key.announcement(1))
	n.policyIs(t, 1)
	for a, want := range map[*forge.Authority]string{other: "ALLOWED", stranger: "NO_GRANT"} {
		token := a.JWT(a.Header(nil), a.Claims("/buyer", forge.Fields{"aud": []string{"spiffe://" + td + "/orders"}}))
		d, err := n.authorize(t, &agentpb.AuthorizeRequest{
			Source: partner + "/web", Protocol: "http", Method: "GET", Path: "/orders",
			Headers: map[string]*agentpb.HeaderValues{"authorization": {Values: []string{"Bearer " + token}}},
		})
		if err != nil || d.GetReason() != want {
			t.Errorf("a token of %s: %v, %v; want %s", a.TrustDomain, d, err, want)
		}
	}
}

func TestHeldKeysComeWithFederatedBundles(t *testing.T) {
	ca, other := fakeca.New(t, td), forge.New(t, "partner.test")
	e := federating(ca, "e1", "/web", "partner.test")
	e.KeyDelivery = capb.KeyDelivery_KEY_DELIVERY_WORKLOAD
	ca.PutEntry(e)
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	h := n.holdKeys(t)
	h.wanted()
	ca.Federate(other)
	h.until("the bundle came", func(*agentpb.HeldIdentity) bool { return bytes.Equal(h.last.GetBundles()[partner], other.Cert.Raw) })
	ca.Federate()
	h.until("it was removed", func(*agentpb.HeldIdentity) bool { return keys(h.last.GetBundles()) == "spiffe://"+td })
}

func TestFederationOutlivesARestartWithoutTheCA(t *testing.T) {
	ca, other := fakeca.New(t, td), forge.New(t, "partner.test")
	ca.PutEntry(federating(ca, "e1", "/web", "partner.test"))
	ca.Federate(other)
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	n.waitReady(t)
	receive(t, n.x509Stream(t), "/web")
	n.stop()
	ca.Stop()
	cfg.Logger = testLogger(t)
	n = start(t, cfg)
	if m := receive(t, n.x509Stream(t), "/web"); !bytes.Equal(m.GetFederatedBundles()[partner], other.Cert.Raw) {
		t.Errorf("federated_bundles of %q after a restart without the CA", keys(m.GetFederatedBundles()))
	}
	cc, ctx := conn(t, n.socket)
	token := other.JWT(other.Header(nil), other.Claims("/a", nil))
	if _, err := workload.NewSpiffeWorkloadAPIClient(cc).ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "aud", Svid: token}); err != nil {
		t.Errorf("ValidateJWTSVID without the CA = %v", err)
	}
	// What was removed meanwhile goes with the first listing.
	stream := n.x509Stream(t)
	receive(t, stream, "/web")
	ca.Federate()
	ca.Start()
	if m := receive(t, stream, "/web"); len(m.GetFederatedBundles()) != 0 {
		t.Errorf("federated_bundles of %q after the CA came back", keys(m.GetFederatedBundles()))
	}
}

// trusted is what a secret makes an Envoy trust: for each trust domain its roots.
func trusted(t testing.TB, secret *tlsv3.Secret) map[string][]byte {
	t.Helper()
	config := &tlsv3.SPIFFECertValidatorConfig{}
	if err := secret.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(config); err != nil {
		t.Fatalf("%s: %v", secret.GetName(), err)
	}
	all := map[string][]byte{}
	for _, d := range config.GetTrustDomains() {
		if all[d.GetName()] != nil {
			t.Fatalf("%s names %s twice", secret.GetName(), d.GetName())
		}
		all[d.GetName()] = d.GetTrustBundle().GetInlineBytes()
	}
	return all
}

func TestSDSHasFederatedTrustDomains(t *testing.T) {
	ca, other, stranger := fakeca.New(t, td), forge.New(t, "partner.test"), forge.New(t, "stranger.test")
	ca.PutEntry(federating(ca, "e1", "/web", "partner.test"))
	ca.Federate(other, stranger)
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	s := n.stateStream(t)
	d := n.deltaStream(t)
	names := []string{"ALL", "ROOTCA", partner, "spiffe://stranger.test"}
	s.say(ask(names...))
	first := s.next()
	all := named(t, first.Resources, names...)
	if got := trusted(t, all["ALL"]); keys(got) != td+" partner.test" || !bytes.Equal(got["partner.test"], pemOf(other.Cert)) || !bytes.Equal(got[td], pemOf(ca.Root.Cert)) {
		t.Errorf("ALL trusts %v; want each trust domain with its own root", got)
	}
	if got := trusted(t, all["ROOTCA"]); keys(got) != td {
		t.Errorf("ROOTCA trusts %q; want the own trust domain alone", keys(got))
	}
	if got := trusted(t, all[partner]); keys(got) != "partner.test" || !bytes.Equal(got["partner.test"], pemOf(other.Cert)) {
		t.Errorf("%s trusts %v; want its root alone", partner, got)
	}
	wantNobody(t, trusted(t, all["spiffe://stranger.test"]), stranger)

	d.say(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: secrets, ResourceNamesSubscribe: []string{"ALL", partner, "ROOTCA"}})
	before := d.next()
	named(t, parts(before.Resources), "ALL", partner, "ROOTCA")

	// The trust is withdrawn, from an Envoy that never forgets a secret.
	ca.Federate(stranger)
	next := s.next()
	after := named(t, next.Resources, names...)
	if got := trusted(t, after["ALL"]); keys(got) != td {
		t.Errorf("ALL trusts %q after the removal", keys(got))
	}
	wantNobody(t, trusted(t, after[partner]), other)
	if next.VersionInfo == first.VersionInfo {
		t.Error("the version is the same")
	}
	changed := d.next()
	gone := named(t, parts(changed.Resources), "ALL", partner)
	wantNobody(t, trusted(t, gone[partner]), other)
	if len(changed.RemovedResources) > 0 {
		t.Errorf("removed: %q; Envoy would keep what it has", changed.RemovedResources)
	}

	// Every name that stands for something.
	c, ctx := n.sdsClient(t)
	ca.Federate(other)
	eventually(t, "partner.test is back", func() bool {
		m, err := c.FetchSecrets(ctx, ask())
		return err == nil && len(m.Resources) == 3 // the own trust domain, the partner's, /web
	})
	// Who has asked not to use the validator gets roots of one trust domain at most.
	req := ask("ALL", partner)
	req.Node.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{"disable_spiffe_cert_validation": structpb.NewBoolValue(true)}}
	m, err := c.FetchSecrets(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	context := named(t, m.Resources, partner)[partner].GetValidationContext()
	if !bytes.Equal(context.GetTrustedCa().GetInlineBytes(), pemOf(other.Cert)) {
		t.Errorf("plain roots of %s = %v", partner, context)
	}
}

// wantNobody expects roots that vouch for nobody whom the authority vouched for.
func wantNobody(t testing.TB, got map[string][]byte, a *forge.Authority) {
	t.Helper()
	pool := x509.NewCertPool()
	if len(got) != 1 || !pool.AppendCertsFromPEM(got[a.TrustDomain.Name()]) {
		t.Fatalf("trusts %v; want a root for %s, of which an Envoy can make something", got, a.TrustDomain)
	}
	if _, err := a.Leaf("/web").Chain[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
		t.Errorf("an X509-SVID of %s still verifies", a.TrustDomain)
	}
}

// An Envoy says again what it has when its stream is a new one: trust that was
// withdrawn while there was none is withdrawn then.
func TestTrustIsWithdrawnFromAnEnvoyThatWasAway(t *testing.T) {
	ca, other := fakeca.New(t, td), forge.New(t, "partner.test")
	ca.PutEntry(federating(ca, "e1", "/web", "partner.test"))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	d := n.deltaStream(t)
	d.say(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: secrets, ResourceNamesSubscribe: []string{partner}, InitialResourceVersions: map[string]string{partner: "of before"},
	})
	wantNobody(t, trusted(t, named(t, parts(d.next().Resources), partner)[partner]), other)
	s := n.stateStream(t)
	s.say(ask(partner))
	wantNobody(t, trusted(t, named(t, s.next().Resources, partner)[partner]), other)
}
