// The share of some destinations decides for them as the whole policy does.

package bundle

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"merlon.dev/integration/measure"
	"merlon.dev/policy"
	"merlon.dev/policy/engine"
	"merlon.dev/policy/grant"
)

const trustDomain = "spiffe://shop.test"

var services = []string{trustDomain + "/a", trustDomain + "/b", trustDomain + "/ns/x/a", trustDomain + "/ns/x/b", trustDomain + "/ns/y/a", "spiffe://other.test/a"}

func engineOf(t *testing.T, raw []byte, audience []string) *engine.Engine {
	t.Helper()
	c, err := Check(raw)
	if err != nil {
		t.Fatal(err)
	}
	e, err := engine.New(t.Context(), engine.Source{Modules: c.Modules, Grants: c.Grants, Generation: 1, Audience: audience})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestShareDecidesAsTheWhole(t *testing.T) {
	destinations := rapid.SampledFrom(append([]string{trustDomain, trustDomain + "/*", trustDomain + "/ns/*", trustDomain + "/ns/x/*"}, services...))
	rapid.Check(t, func(rt *rapid.T) {
		grants := make([]grant.Grant, rapid.IntRange(0, 8).Draw(rt, "grants"))
		for i := range grants {
			grants[i] = grant.Grant{ID: fmt.Sprintf("g%d", i), HTTP: &grant.HTTP{Paths: []string{fmt.Sprintf("/%d", i%3)}}}
			if rapid.IntRange(0, 4).Draw(rt, "wide") > 0 {
				grants[i].To = rapid.SliceOfNDistinct(destinations, 1, 3, rapid.ID).Draw(rt, "to")
			}
			if rapid.IntRange(0, 3).Draw(rt, "denies") == 0 {
				grants[i].Effect = grant.Deny
			}
		}
		if err := grant.Check(grants); err != nil {
			rt.Fatal(err)
		}
		whole := &Contents{Modules: map[string]string{engine.ModuleName: engine.Module}, Grants: grants}
		mine := rapid.SliceOfNDistinct(rapid.SampledFrom(services), 1, 3, rapid.ID).Draw(rt, "mine")
		share, err := NewShares(whole).Of(mine)
		if err != nil {
			rt.Fatal(err)
		}
		all, err := unsigned(whole)
		if err != nil {
			rt.Fatal(err)
		}
		a, b := engineOf(t, all, nil), engineOf(t, share, mine)
		for _, destination := range services {
			for i := range 3 {
				in := &policy.Input{Source: trustDomain + "/web", Destination: destination, Protocol: policy.HTTP, Method: "GET", Path: fmt.Sprintf("/%d", i)}
				want, got := a.AuthorizeByOPA(t.Context(), in), b.AuthorizeByOPA(t.Context(), in)
				if !b.For(destination) {
					want.Allow, want.Reason, want.RuleID = false, policy.NoBundle, ""
				}
				if got.Allow != want.Allow || got.Reason != want.Reason || got.RuleID != want.RuleID {
					rt.Fatalf("%s %s: %+v; the whole says %+v", destination, in.Path, got, want)
				}
			}
		}
		if b.Grants() > a.Grants() {
			rt.Fatal("a share has more grants than the whole")
		}
	})
}

func TestShareHasNoGrantsOfOthers(t *testing.T) {
	const text = "grants:\n" +
		"  - {id: a, from: [spiffe://shop.test/secret-caller], to: [spiffe://shop.test/a], http: {}}\n" +
		"  - {id: b, to: [spiffe://shop.test/b], http: {}}\n" +
		"  - {id: all, http: {paths: [/health]}}\n"
	of := func(rego string) []string {
		t.Helper()
		files := map[string]string{"g.yaml": text}
		if rego != "" {
			files["own.rego"] = "package authz\n\n" + rego
		}
		c, err := Check(build(t, folder(t, files)))
		if err != nil {
			t.Fatal(err)
		}
		raw, err := NewShares(c).Of([]string{trustDomain + "/b"})
		if err != nil {
			t.Fatal(err)
		}
		share, err := Check(raw)
		if err != nil {
			t.Fatal(err)
		}
		if len(share.Modules) != len(c.Modules) {
			t.Errorf("%d modules of %d", len(share.Modules), len(c.Modules))
		}
		var ids []string
		for _, g := range share.Grants {
			ids = append(ids, g.ID)
		}
		return ids
	}
	for rego, want := range map[string][]string{
		"": {"all", "b"},
		"deny if input.attributes.request.http.method == \"x\"\n": {"all", "b"},
		"deny if data.merlon.grants.a\n":                          {"a", "all", "b"},
		"deny if data[\"merlon\"].grants.a\n":                     {"a", "all", "b"},
	} {
		if got := of(rego); !slices.Equal(got, want) {
			t.Errorf("%q: the share has %q; want %q", rego, got, want)
		}
	}
}

// Of 10 000 grants, the 100 of one service, and the 1 000 of ten.
func BenchmarkShare(b *testing.B) {
	key, _ := newKey(b)
	c, err := Check(build(b, folder(b, map[string]string{"g.yaml": manyGrants()})))
	if err != nil {
		b.Fatal(err)
	}
	shares := NewShares(c)
	for _, n := range []int{1, 10} {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			var mine []string
			for i := range n {
				mine = append(mine, fmt.Sprintf("spiffe://shop.test/orders-%d", i))
			}
			b.ReportAllocs()
			defer measure.PerOp(b)()
			for b.Loop() {
				raw, err := shares.Of(mine)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := Sign(raw, Metadata{Name: "main", TrustDomain: "shop.test", Generation: 1, IssuedAt: time.Now(), Audience: mine}, "policy-1", key); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
