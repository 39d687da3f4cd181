// Aliases: what an entry that makes one may say, and which nodes it stands for.

package entry

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/role"
)

func validAlias() *Entry {
	return &Entry{
		ID: NewID(), SPIFFEID: spiffeid.RequireFromString("spiffe://shop.test/agent/alias/eu/web"), ParentID: CAID(td),
		Selectors: []Selector{{"k8s", "cluster:prod"}, {"x509pop", "dns:rack1.dc.test"}}, CreatedAt: now,
	}
}

func TestAliasesSayNothingOfSVIDs(t *testing.T) {
	if err := validAlias().Validate(td, now); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*Entry)
		field  string
	}{
		"a parent that is an agent":   {func(e *Entry) { e.ParentID = spiffeid.RequireFromString("spiffe://shop.test/agent/n1") }, "parent_id"},
		"a parent that is an alias":   {func(e *Entry) { e.ParentID = e.SPIFFEID }, "parent_id"},
		"another trust domain":        {func(e *Entry) { e.SPIFFEID = spiffeid.RequireFromString("spiffe://other.test/agent/alias/x") }, "spiffe_id"},
		"no selectors":                {func(e *Entry) { e.Selectors = nil }, "selectors"},
		"a selector of workloads":     {func(e *Entry) { e.Selectors[0] = Selector{"unix", "uid:1000"} }, "selectors"},
		"what no node can prove":      {func(e *Entry) { e.Selectors[0] = Selector{"k8s", "node-uid:x"} }, "selectors"},
		"a TTL":                       {func(e *Entry) { e.X509SVIDTTL = time.Hour }, "x509_svid_ttl_seconds"},
		"a TTL of JWT-SVIDs":          {func(e *Entry) { e.JWTSVIDTTL = time.Minute }, "jwt_svid_ttl_seconds"},
		"a DNS name":                  {func(e *Entry) { e.DNSNames = []string{"a.test"} }, "dns_names"},
		"a common name":               {func(e *Entry) { e.CommonName = "a" }, "common_name"},
		"a federation":                {func(e *Entry) { e.FederatesWith = []string{"partner.test"} }, "federates_with"},
		"a role":                      {func(e *Entry) { e.Role.Name = role.Viewer }, "role"},
		"an end that is in the past":  {func(e *Entry) { e.ExpiresAt = now }, "expires_at"},
		"a hint that is a line break": {func(e *Entry) { e.Hint = "\n" }, "hint"},
	} {
		e := validAlias()
		tc.change(e)
		var invalid *InvalidError
		if err := e.Validate(td, now); !errors.As(err, &invalid) || invalid.Field != tc.field {
			t.Errorf("%s: %v; want an error of %s", name, err, tc.field)
		}
	}
	workload := valid()
	if workload.ParentID = validAlias().SPIFFEID; workload.Validate(td, now) != nil {
		t.Error("an entry below an alias is refused")
	}
	if workload.Selectors = []Selector{{"k8s", "cluster:prod"}}; workload.Validate(td, now) == nil {
		t.Error("a workload's entry asks for a fact about its node")
	}
	if workload.ParentID = CAID(td); workload.Validate(td, now) == nil {
		t.Error("a workload's entry is below the CA")
	}
}

func TestAliasIsNoAgent(t *testing.T) {
	for path, want := range map[string]bool{"/agent/alias/x": true, "/agent/alias/x/y": true, "/agent/alias": false, "/alias/x": false, "/agent/aliases/x": false} {
		id := spiffeid.RequireFromPath(td, path)
		if IsAlias(id) != want {
			t.Errorf("IsAlias(%s) = %v", id, !want)
		}
		if _, agent := AgentName(id); agent && want {
			t.Errorf("%s counts as an agent", id)
		}
	}
}

func TestAliasSurvivesEncoding(t *testing.T) {
	e := validAlias()
	b, err := Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	for name, decode := range map[string]func([]byte) (*Entry, error){"in place": new(Decoder).Decode, "by encoding/json": decodeJSON} {
		got, err := decode(b)
		if err != nil || got.SPIFFEID != e.SPIFFEID || !slices.Equal(got.Selectors, e.Selectors) {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, e)
		}
	}
}

// More proof never takes an alias away, and less never gives one.
func TestStandsForIsMonotone(t *testing.T) {
	fact := rapid.Map(rapid.SampledFrom([]string{"cluster:a", "cluster:b", "node-name:n", "namespace:m"}), func(v string) Selector { return Selector{"k8s", v} })
	rapid.Check(t, func(t *rapid.T) {
		e := validAlias()
		e.Selectors = rapid.SliceOfN(fact, 1, 3).Draw(t, "want")
		have, more := rapid.SliceOf(fact).Draw(t, "have"), rapid.SliceOf(fact).Draw(t, "more")
		if e.StandsFor(have) && !e.StandsFor(slices.Concat(have, more)) {
			t.Fatal("more proof took the alias away")
		}
		if e.Selectors = nil; e.StandsFor(have) {
			t.Fatal("an alias without selectors stands for a node")
		}
	})
}
