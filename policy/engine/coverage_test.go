package engine

// What tests reach, and what a failing test says.

import (
	"slices"
	"strings"
	"testing"
)

const coveredGrants = `grants:
  - {id: allows, from: [spiffe://shop.test/web], http: {methods: [GET]}}
  - {id: denies, from: [spiffe://shop.test/evil], http: {}, effect: deny}
  - {id: tried, from: [spiffe://shop.test/web], http: {}, mode: dry-run}
  - {id: second, from: [spiffe://shop.test/web], http: {methods: [GET]}}
  - {id: unused, grpc: {}}
`

const coveredRego = `package authz

allow if {
	input.spiffe.source.path == "/ops"
	input.attributes.request.http.method == "PUT"
}

allow if {
	input.spiffe.source.path == "/never"
	input.protocol == "http"
}

deny if helper("x")

helper(x) if {
	x == "y"
	input.protocol == "tcp"
}
`

func TestCoverageNamesWhatNoTestReaches(t *testing.T) {
	modules := map[string]string{"authz.rego": coveredRego}
	grants := parseGrants(t, coveredGrants)
	e := load(t, grants, modules)
	src := Source{Modules: modules, Grants: grants}
	report := func(table, rego string) *CoverageReport {
		t.Helper()
		c := NewCoverage(e, src)
		if table != "" {
			if _, err := e.RunGrantTests(t.Context(), "t.yaml", []byte(table), c); err != nil {
				t.Fatal(err)
			}
		}
		if rego != "" {
			if _, err := RunRegoTests(t.Context(), src, map[string]string{"authz_test.rego": rego}, c); err != nil {
				t.Fatal(err)
			}
		}
		r, err := c.Report()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	const row = "- {name: t, destination: spiffe://shop.test/orders, protocol: http, path: /, want: allow, source: spiffe://shop.test/"
	none := report("", "")
	if none.Grants.Covered != 0 || none.Grants.Of != 5 || none.Grants.Percent != 0 || none.Rego.Covered != 0 || none.Rego.Percent != 0 || none.Rego.Of == 0 {
		t.Errorf("without tests: %+v", none)
	}
	r := report(row+"web, method: GET}\n"+row+"evil, method: GET}\n", "")
	if want := []string{"second", "unused"}; !slices.Equal(r.Grants.NotCovered, want) || r.Grants.Covered != 3 || r.Grants.Percent != 60 {
		t.Errorf("grants %+v; want all but %q", r.Grants, want)
	}
	for name, r := range map[string]*CoverageReport{
		"by a call":      report(row+"ops, method: PUT}\n", ""),
		"by a Rego test": report("", "package authz_test\n\ntest_ops if data.authz.allow with input as {\"spiffe\": {\"source\": {\"path\": \"/ops\"}}, \"attributes\": {\"request\": {\"http\": {\"method\": \"PUT\"}}}}\n"),
	} {
		if r.Rego.Covered == 0 || slices.Contains(r.Rego.NotCovered, "authz.rego:5") || !slices.Contains(r.Rego.NotCovered, "authz.rego:10") {
			t.Errorf("%s: lines %+v of %+v; want 5 and not 10", name, r.Rego, none.Rego)
		}
	}
	if empty := load(t, nil, nil); empty != nil {
		c, err := NewCoverage(empty, Source{}).Report()
		if err != nil || c.Grants.Percent != 100 || c.Rego.Percent != 100 {
			t.Errorf("of an empty policy: %+v, %v; want 100", c, err)
		}
	}
}

func TestFailingTestsSayWhatDidNotHold(t *testing.T) {
	modules := map[string]string{"authz.rego": coveredRego}
	grants := parseGrants(t, coveredGrants)
	e := load(t, grants, modules)
	results, err := e.RunGrantTests(t.Context(), "t.yaml", []byte("- {name: t, destination: spiffe://shop.test/orders, protocol: http, path: /, want: allow, source: spiffe://shop.test/web, method: POST}\n"), nil)
	if err != nil || len(results) != 1 || results[0].Pass {
		t.Fatalf("%+v, %v", results, err)
	}
	for _, want := range []string{"got deny METHOD, want allow: grant allows: method POST not in [GET]; ", `authz.rego:4: does not hold: input.spiffe.source.path == "/ops"`} {
		if !strings.Contains(results[0].Detail, want) {
			t.Errorf("detail %q; want %q", results[0].Detail, want)
		}
	}
	src := Source{Modules: modules, Grants: grants}
	modules["more.rego"] = "package authz\n\nallow if startswith(input.spiffe.source.path, \"/admin/\")\n"
	results, err = RunRegoTests(t.Context(), src, map[string]string{"authz_test.rego": "package authz_test\n\ntest_good if true\n\ntest_ops if data.authz.allow with input.spiffe.source.path as \"/web\"\n"}, NewCoverage(e, src))
	if err != nil || len(results) != 2 || !results[0].Pass || results[1].Pass {
		t.Fatalf("%+v, %v", results, err)
	}
	for _, want := range []string{"authz_test.rego:5: does not hold: data.authz.allow with input.spiffe.source.path as \"/web\"", "more.rego:3: does not hold: startswith(input.spiffe.source.path, \"/admin/\")"} {
		if !strings.Contains(results[1].Detail, want) {
			t.Errorf("detail %q; want %q", results[1].Detail, want)
		}
	}
}
