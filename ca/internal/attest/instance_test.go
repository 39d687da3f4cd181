// Instance tokens of clouds, signed by keys of our own: which of them prove a
// node, and that an instance attests once, and no token twice.

package attest

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"merlon.dev/ca/internal/oidc"
	"merlon.dev/ca/internal/store"
	"merlon.dev/integration/oidcprovider"
)

const (
	audience = "https://ca.shop.test"
	tenant   = "72f988bf-86f1-41af-91ab-2d7cd011db47"
	subID    = "0b1f3a52-90de-4a3a-9d8e-0123456789ab"
)

// cloud is one that signs tokens, with its attestor.
type cloud struct {
	prove  func(ctx context.Context, token string, now time.Time) (*Node, error)
	claims func(now time.Time) map[string]any
	name   string // of the node that they prove
	facts  []string
}

func clouds(t testing.TB, p *oidcprovider.Provider) map[string]cloud {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(p.Certificate())
	source := func(issuer string) *oidc.Source {
		return oidc.NewSource(oidc.Issuer{URL: issuer, Audience: audience, KeysURL: p.URL + oidcprovider.KeysPath, Roots: roots}, slog.New(slog.DiscardHandler))
	}
	claims := func(issuer string, more map[string]any) func(time.Time) map[string]any {
		return func(now time.Time) map[string]any {
			c := p.Claims(audience, "110000000000000000001", now)
			c["iss"] = issuer
			maps.Copy(c, more)
			return c
		}
	}
	gcp := &GCP{TrustDomain: td, Projects: []string{"other", "shop-prod"}, Source: source(GCPIssuer)}
	azure := &Azure{TrustDomain: td, Tenant: tenant, Subscriptions: []string{subID}, Source: source(AzureIssuer(tenant))}
	return map[string]cloud{
		"gcp": {
			gcp.Prove, claims(GCPIssuer, map[string]any{
				"email": "web@shop-prod.iam.gserviceaccount.com", "email_verified": true, "azp": "1",
				"google": map[string]any{"compute_engine": map[string]any{
					"project_id": "shop-prod", "project_number": 1, "zone": "europe-west1-b", "instance_id": "4410000000000000001",
					"instance_name": "web-1", "instance_creation_timestamp": 1790000000,
				}},
			}), "gcp/shop-prod/4410000000000000001",
			[]string{"gcp:project:shop-prod", "gcp:zone:europe-west1-b", "gcp:instance-id:4410000000000000001", "gcp:instance-name:web-1", "gcp:service-account:web@shop-prod.iam.gserviceaccount.com"},
		},
		"azure": {
			azure.Prove, claims(AzureIssuer(tenant), map[string]any{
				"tid": tenant, "appid": "x", "oid": "y",
				"xms_mirid": "/subscriptions/" + subID + "/resourcegroups/Prod/providers/Microsoft.Compute/virtualMachines/web-1",
			}), "azure/" + subID + "/prod/web-1",
			[]string{"azure:tenant:" + tenant, "azure:subscription:" + subID, "azure:resource-group:prod", "azure:vm-name:web-1"},
		},
	}
}

func TestTokenOfAnInstanceProvesIt(t *testing.T) {
	p := oidcprovider.Start(t)
	for kind, c := range clouds(t, p) {
		n, err := c.prove(t.Context(), p.Token(c.claims(time.Now())), time.Now())
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			continue
		}
		var facts []string
		for _, sel := range n.Selectors {
			facts = append(facts, sel.String())
		}
		if n.ID.String() != "spiffe://shop.test/agent/"+c.name || n.Kind != kind || !slices.Equal(facts, c.facts) {
			t.Errorf("%s: the node is %s by %s with %q; want %s with %q", kind, n.ID, n.Kind, facts, c.name, c.facts)
		}
	}
}

func TestInstanceTokensThatProveNothing(t *testing.T) {
	p := oidcprovider.Start(t)
	now := time.Now()
	all := clouds(t, p)
	with := func(kind string, change func(map[string]any)) string {
		claims := all[kind].claims(now)
		change(claims)
		return p.Token(claims)
	}
	engine := func(change func(map[string]any)) string {
		return with("gcp", func(c map[string]any) {
			inner := maps.Clone(c["google"].(map[string]any)["compute_engine"].(map[string]any))
			change(inner)
			c["google"] = map[string]any{"compute_engine": inner}
		})
	}
	machine := func(id string) string {
		return with("azure", func(c map[string]any) { c["xms_mirid"] = id })
	}
	const vm = "/providers/Microsoft.Compute/virtualMachines/"
	for name, tc := range map[string]struct {
		kind, token string
		want        Reason
	}{
		"a service account's token of its own":  {"gcp", with("gcp", func(c map[string]any) { delete(c, "google") }), NotProved},
		"no instance":                           {"gcp", engine(func(e map[string]any) { delete(e, "instance_id") }), NotProved},
		"an instance that is a number":          {"gcp", engine(func(e map[string]any) { e["instance_id"] = 7 }), NotProved},
		"another project":                       {"gcp", engine(func(e map[string]any) { e["project_id"] = "shop-evil" }), NotAllowed},
		"an instance that is no segment":        {"gcp", engine(func(e map[string]any) { e["instance_id"] = "../x" }), NotAllowed},
		"another tenant":                        {"azure", with("azure", func(c map[string]any) { c["tid"] = "other" }), NotAllowed},
		"no machine":                            {"azure", with("azure", func(c map[string]any) { delete(c, "xms_mirid") }), NotProved},
		"an identity that a user made":          {"azure", machine("/subscriptions/" + subID + "/resourcegroups/prod/providers/Microsoft.ManagedIdentity/userAssignedIdentities/x"), NotProved},
		"a machine of a scale set below":        {"azure", machine("/subscriptions/" + subID + "/resourcegroups/prod" + vm + "a/b"), NotProved},
		"what only ends like a machine":         {"azure", machine("/x/subscriptions/" + subID + "/resourcegroups/prod" + vm + "a"), NotProved},
		"another subscription":                  {"azure", machine("/subscriptions/other/resourcegroups/prod" + vm + "a"), NotAllowed},
		"a resource group that is no segment":   {"azure", machine("/subscriptions/" + subID + "/resourcegroups/prod (eu)" + vm + "a"), NotAllowed},
		"an issuer of Azure's for Google":       {"gcp", with("azure", func(map[string]any) {}), Untrusted},
		"an issuer of another tenant for Azure": {"azure", with("azure", func(c map[string]any) { c["iss"] = AzureIssuer("other") }), Untrusted},
	} {
		n, err := all[tc.kind].prove(t.Context(), tc.token, now)
		wantRefusal(t, name, n, err, tc.want)
	}
	stranger := oidcprovider.Start(t)
	for kind, c := range all {
		for name, tc := range map[string]struct {
			token string
			want  Reason
		}{
			"none":                 {"", Malformed},
			"too long":             {strings.Repeat("x", maxInstanceToken+1), Malformed},
			"with a line break":    {p.Token(c.claims(now)) + "\n", Malformed},
			"of a stranger's key":  {stranger.Token(c.claims(now)), Untrusted},
			"expired":              {with(kind, func(c map[string]any) { c["exp"] = now.Add(-time.Minute).Unix() }), Untrusted},
			"without an end":       {with(kind, func(c map[string]any) { delete(c, "exp") }), Untrusted},
			"for another audience": {with(kind, func(c map[string]any) { c["aud"] = "https://ca.other.test" }), Untrusted},
			"for another one too":  {with(kind, func(c map[string]any) { c["aud"] = []string{audience, "x"} }), Untrusted},
		} {
			n, err := c.prove(t.Context(), tc.token, now)
			wantRefusal(t, name+" of "+kind, n, err, tc.want)
		}
	}
}

func TestInstanceAttestsOnceAndNoTokenTwice(t *testing.T) {
	p := oidcprovider.Start(t)
	for kind, c := range clouds(t, p) {
		st := openStore(t)
		serial := 0
		token := func() string {
			serial++
			claims := c.claims(time.Now())
			claims["jti"] = fmt.Sprint(serial)
			return p.Token(claims)
		}
		enroll := func(token string) (*Agent, error) {
			n, err := c.prove(t.Context(), token, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			return Enroll(t.Context(), st, n, time.Now(), time.Now().Add(time.Hour))
		}
		used := token()
		first, err := enroll(used)
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		if _, err := enroll(token()); !errors.Is(err, ErrAttestedOnce) {
			t.Errorf("%s: a second token of the instance: %v; want ErrAttestedOnce", kind, err)
		}
		if _, err := Decide(t.Context(), st, first.ID, Decision{From: []Standing{Good}, To: Evicted, Now: time.Now()}); err != nil {
			t.Fatal(err)
		}
		if _, err := enroll(used); !errors.Is(err, ErrUsedEvidence) {
			t.Errorf("%s: evicted, by the token that was used: %v; want ErrUsedEvidence", kind, err)
		}
		again, err := enroll(token())
		if err != nil || again.Handle != first.Handle {
			t.Errorf("%s: evicted, by another token: %v, %v", kind, again, err)
		}
		if _, err := enroll(token()); !errors.Is(err, ErrAttestedOnce) {
			t.Errorf("%s: once more: %v; want ErrAttestedOnce", kind, err)
		}
		if _, err := Decide(t.Context(), st, first.ID, Decision{From: []Standing{Good}, To: Banned, Now: time.Now()}); err != nil {
			t.Fatal(err)
		}
		if _, err := enroll(token()); !errors.Is(err, ErrBanned) {
			t.Errorf("%s: banned: %v; want ErrBanned", kind, err)
		}
		wantUsedRecords(t, st, 2)
	}
}

// wantUsedRecords: they stay over a restore, and go when the token has ended.
func wantUsedRecords(t *testing.T, st store.Store, want int) {
	t.Helper()
	kvs, _, _, err := st.List(t.Context(), TokenPrefix+usedKind+"/", "", 10, 0)
	if err != nil || len(kvs) != want {
		t.Fatalf("%d records of used tokens, %v; want %d", len(kvs), err, want)
	}
	for _, kv := range kvs {
		if SingleUse(kv.Key) || TokenExpired(kv, time.Now().Add(time.Hour)) || !TokenExpired(kv, time.Now().Add(2*time.Hour)) {
			t.Errorf("the record %s does not last as long as its token can be shown", kv.Key)
		}
	}
}

// Of any number at once, one gets the instance.
func TestOneOfManyAttestsAnInstance(t *testing.T) {
	p := oidcprovider.Start(t)
	c := clouds(t, p)["gcp"]
	st := openStore(t)
	token := p.Token(c.claims(time.Now()))
	wantOneWinner(t, func() error {
		n, err := c.prove(t.Context(), token, time.Now())
		if err != nil {
			return err
		}
		_, err = Enroll(t.Context(), st, n, time.Now(), time.Now().Add(time.Hour))
		if errors.Is(err, ErrAttestedOnce) || errors.Is(err, ErrUsedEvidence) {
			return ErrUnknownToken // what a loser is told there
		}
		return err
	})
}

func FuzzInstanceToken(f *testing.F) {
	p := oidcprovider.Start(f)
	all := clouds(f, p)
	now := time.Now()
	good := map[string]string{}
	for kind, c := range all {
		good[kind] = p.Token(c.claims(now))
		f.Add(kind, good[kind])
	}
	f.Add("gcp", "a.b.c")
	f.Fuzz(func(t *testing.T, kind, token string) {
		c, ok := all[kind]
		if !ok {
			return
		}
		n, err := c.prove(context.Background(), token, now)
		if (n == nil) == (err == nil) {
			t.Fatalf("proved %v, error %v", n, err)
		}
		if err == nil && strings.Split(token, ".")[1] != strings.Split(good[kind], ".")[1] {
			t.Fatalf("%q proved %s", token, n.ID)
		}
	})
}
