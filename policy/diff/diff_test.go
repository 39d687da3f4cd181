package diff

// The difference of two policies is held against what package grant says of single
// calls: a call is in the added access if the second policy alone allows it, in the
// removed one if the first alone does, and in neither else.

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

var now = time.Date(2026, 11, 26, 0, 0, 0, 0, time.UTC)

func parse(t testing.TB, text string) []grant.Grant {
	t.Helper()
	grants, err := grant.Parse([]grant.File{{Name: "grants.yaml", Data: []byte(text)}})
	if err != nil {
		t.Fatal(err)
	}
	return grants
}

func TestGrants(t *testing.T) {
	tests := map[string]struct{ a, b, added, removed, notes string }{
		"nothing": {
			a: `[{id: a, from: [spiffe://x.test/web], http: {methods: [GET, POST], paths: [/a, /b/*]}}]`,
			b: `[{id: other, from: [spiffe://x.test/web], http: {methods: [GET], paths: [/a, /b/*]}}, {id: c, from: [spiffe://x.test/web], http: {methods: [POST], paths: [/a, /b/*]}}]`,
		},
		"a method": {
			a:     `[{id: a, from: [spiffe://x.test/web], to: [spiffe://x.test/orders], http: {methods: [GET], paths: [/orders/*]}}]`,
			b:     `[{id: a, from: [spiffe://x.test/web], to: [spiffe://x.test/orders], http: {methods: [GET, POST], paths: [/orders/*]}}]`,
			added: `{"source":"spiffe://x.test/web","destination":"spiffe://x.test/orders","protocol":"http","methods":["POST"],"paths":["/orders/*"]}`,
		},
		"a deny within a wide grant": {
			a:       `[{id: a, http: {}}]`,
			b:       `[{id: a, http: {}}, {id: no, from: [spiffe://x.test/ns/a/*], to: [spiffe://x.test/orders], effect: deny, http: {methods: [DELETE], paths: ["/orders/{id}"]}}]`,
			removed: `{"source":"spiffe://x.test/ns/a/*","destination":"spiffe://x.test/orders","protocol":"http","methods":["DELETE"],"paths":["/orders/{x}"]}`,
		},
		"all but one": {
			a:     `[{id: no, from: [spiffe://x.test/web], http: {paths: [/admin/*]}, effect: deny}]`,
			b:     `[{id: yes, to: [spiffe://x.test], http: {methods: [GET]}}, {id: no, from: [spiffe://x.test/web], http: {paths: [/admin/*]}, effect: deny}]`,
			added: `{"source":"*","source_except":["spiffe://x.test/web"],"destination":"spiffe://x.test","protocol":"http","methods":["GET"]}` + "\n" + `{"source":"spiffe://x.test/web","destination":"spiffe://x.test","protocol":"http","methods":["GET"],"paths_except":["/admin/*"]}`,
		},
		"any method but two": {
			a:     `[{id: a, http: {methods: [GET, PUT], paths: [/a]}}]`,
			b:     `[{id: a, http: {paths: [/a]}}]`,
			added: `{"source":"*","destination":"*","protocol":"http","methods_except":["GET","PUT"],"paths":["/a"]}`,
		},
		"grpc": {
			a:       `[{id: a, grpc: {services: [shop.Orders, shop.Users]}}, {id: t, tcp: {}}]`,
			b:       `[{id: a, grpc: {methods: [Get]}}]`,
			added:   `{"source":"*","destination":"*","protocol":"grpc","methods":["Get"],"services_except":["shop.Orders","shop.Users"]}`,
			removed: `{"source":"*","destination":"*","protocol":"grpc","methods_except":["Get"],"services":["shop.Orders","shop.Users"]}` + "\n" + `{"source":"*","destination":"*","protocol":"tcp"}`,
		},
		"templates": {
			a:     `[{id: a, http: {paths: ["/a/{x}/c"]}}]`,
			b:     `[{id: a, http: {paths: ["/{y}/b/c", "/a/{x}/c"]}}]`,
			added: `{"source":"*","destination":"*","protocol":"http","paths":["/{x}/b/c"],"paths_except":["/a/b/c"]}`,
		},
		"renamed, moved, and what decides nothing": {
			a: `[{id: a, from: [spiffe://x.test/web], http: {}, expires: 2030-01-01T00:00:00Z}, {id: d, tcp: {}, mode: dry-run}, {id: e, tcp: {}, mode: dry-run}, {id: f, tcp: {}, expires: 2020-01-01T00:00:00Z}, {id: m, from: [spiffe://x.test/m], tcp: {}, mode: dry-run}]`,
			b: `[{id: a, from: [spiffe://x.test/web], http: {}}, {id: e, http: {}, mode: dry-run}, {id: n, http: {}, mode: dry-run}, {id: o, tcp: {}, expires: 2020-01-01T00:00:00Z}, {id: m, from: [spiffe://x.test/m], tcp: {}}]`,
			notes: "grant a ends at never, before: 2030-01-01T00:00:00Z\ngrant e changes, in mode dry-run: it decides nothing\ngrant m goes from dry-run to enforce\n" +
				"grant n is new, in mode dry-run: it decides nothing\ngrant o is new, and ended at 2020-01-01T00:00:00Z\ngrant d is gone, of mode dry-run: it decided nothing",
			added: `{"source":"spiffe://x.test/m","destination":"*","protocol":"tcp"}`,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			d, err := Grants(parse(t, "grants: "+tt.a), parse(t, "grants: "+tt.b), now)
			if err != nil {
				t.Fatal(err)
			}
			if got := lines(t, d.Added); got != tt.added {
				t.Errorf("added\n%s\nwant\n%s", got, tt.added)
			}
			if got := lines(t, d.Removed); got != tt.removed {
				t.Errorf("removed\n%s\nwant\n%s", got, tt.removed)
			}
			if got := strings.Join(d.Notes, "\n"); got != tt.notes {
				t.Errorf("notes\n%s\nwant\n%s", got, tt.notes)
			}
		})
	}
}

func lines(t *testing.T, rows []Access) string {
	t.Helper()
	texts := make([]string, len(rows))
	for i, row := range rows {
		text, err := json.Marshal(row)
		if err != nil {
			t.Fatal(err)
		}
		texts[i] = string(text)
	}
	return strings.Join(texts, "\n")
}

// The words of generated policies and calls. Calls have some that no policy names.
var (
	idPatterns = []string{"spiffe://a.test", "spiffe://a.test/*", "spiffe://a.test/ns/*", "spiffe://a.test/ns/x/*", "spiffe://a.test/ns", "spiffe://a.test/ns/x", "spiffe://a.test/ns/x/web", "spiffe://a.test/ns-evil", "spiffe://b.test", "spiffe://b.test/web"}
	ids        = append([]string{"spiffe://a.test/ns/y", "spiffe://a.test/ns/x/other/deep", "spiffe://c.test/web", "spiffe://b.test/any"}, exact(idPatterns)...)
	segmentsOf = []string{"a", "b", "%3Ab", "{x}"}
	rpcs       = []string{"Get", "List", "Delete"}
	services   = []string{"s.A", "s.B", "s.C"}
	methods    = []string{"GET", "POST", "PUT"}
)

func exact(patterns []string) []string {
	return slices.DeleteFunc(slices.Clone(patterns), func(p string) bool { return strings.HasSuffix(p, "*") })
}

func subset(r *rapid.T, of []string, name string) []string {
	list := rapid.SliceOfNDistinct(rapid.SampledFrom(of), 0, 3, rapid.ID[string]).Draw(r, name)
	if len(list) == 0 {
		return nil // any
	}
	return list
}

func pathPattern(r *rapid.T) string {
	parts := rapid.SliceOfN(rapid.SampledFrom(segmentsOf), 0, 4).Draw(r, "parts")
	return "/" + strings.Join(parts, "/") + rapid.SampledFrom([]string{"", "", "/*", "/"}).Draw(r, "end")
}

func grantsOf(r *rapid.T, name string) []grant.Grant {
	n := rapid.IntRange(0, 5).Draw(r, name)
	list := make([]grant.Grant, 0, n)
	for i := range n {
		g := grant.Grant{ID: fmt.Sprint(i), From: subset(r, idPatterns, "from"), To: subset(r, idPatterns, "to")}
		switch rapid.IntRange(0, 5).Draw(r, "protocol") {
		case 0:
			g.TCP = &grant.TCP{}
		case 1:
			g.GRPC = &grant.GRPC{Services: subset(r, services[:2], "services"), Methods: subset(r, rpcs[:2], "rpcs")}
		default:
			g.HTTP = &grant.HTTP{Methods: subset(r, methods[:2], "methods")}
			for range rapid.IntRange(0, 3).Draw(r, "paths") {
				if p := pathPattern(r); !slices.Contains(g.HTTP.Paths, p) {
					g.HTTP.Paths = append(g.HTTP.Paths, p)
				}
			}
		}
		if rapid.IntRange(0, 2).Draw(r, "effect") == 0 {
			g.Effect = grant.Deny
		}
		switch rapid.IntRange(0, 9).Draw(r, "mode") {
		case 0:
			g.Mode = grant.DryRun
		case 1:
			ended := now.Add(-time.Hour)
			g.Expires = &ended
		}
		if grant.Check([]grant.Grant{g}) == nil {
			list = append(list, g)
		}
	}
	return list
}

func call(r *rapid.T) *policy.Input {
	in := &policy.Input{
		Source: rapid.SampledFrom(ids).Draw(r, "source"), Destination: rapid.SampledFrom(append(ids, "")).Draw(r, "destination"),
		Protocol: rapid.SampledFrom([]policy.Protocol{policy.HTTP, policy.HTTP, policy.HTTP, policy.GRPC, policy.TCP}).Draw(r, "protocol"),
	}
	switch in.Protocol {
	case policy.HTTP:
		in.Method = rapid.SampledFrom(methods).Draw(r, "method")
		parts := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", ":b", "%3ab"}), 0, 5).Draw(r, "parts")
		in.Path = "/" + strings.Join(parts, "/")
		if len(parts) > 0 && rapid.Bool().Draw(r, "slash") {
			in.Path += "/"
		}
	case policy.GRPC:
		in.Path = "/" + rapid.SampledFrom(services).Draw(r, "service") + "/" + rapid.SampledFrom(rpcs).Draw(r, "rpc")
	}
	return in
}

func contains(rows []Access, in *policy.Input) bool {
	return slices.ContainsFunc(rows, func(a Access) bool { return a.Contains(in) })
}

func TestDifferenceIsExact(t *testing.T) {
	seen := map[string]int{}
	rapid.Check(t, func(r *rapid.T) {
		a, b := grantsOf(r, "a"), grantsOf(r, "b")
		if rapid.Bool().Draw(r, "alike") { // differ in little
			b = append(slices.Clone(a), b...)
			if len(b) > 0 {
				i := rapid.IntRange(0, len(b)-1).Draw(r, "without")
				b = slices.Delete(slices.Clone(b), i, i+1)
			}
			for i := range b {
				b[i].ID = fmt.Sprint(i)
			}
		}
		d, err := Grants(a, b, now)
		if err != nil {
			r.Fatal(err)
		}
		if same, _ := Grants(a, a, now); len(same.Added)+len(same.Removed) > 0 {
			r.Fatalf("a policy differs from itself by %+v", same)
		}
		back, err := Grants(b, a, now)
		if err != nil || !reflect.DeepEqual(back.Added, d.Removed) || !reflect.DeepEqual(back.Removed, d.Added) {
			r.Fatalf("the other way round it is %+v, %v; want the opposite of %+v", back, err, d)
		}
		for range 40 {
			in := call(r)
			before, after := grant.Decide(a, in, now).Allow, grant.Decide(b, in, now).Allow
			added, removed := contains(d.Added, in), contains(d.Removed, in)
			seen[fmt.Sprint(before, after)]++
			if added != (!before && after) || removed != (before && !after) {
				r.Fatalf("%s: allowed before: %v, after: %v; in added: %v, in removed: %v\nadded %s\nremoved %s", text(in), before, after, added, removed, text(d.Added), text(d.Removed))
			}
		}
	})
	if len(seen) < 4 {
		t.Errorf("the calls were %v; want all four cases", seen)
	}
}

func text(v any) string {
	b, _ := json.MarshalIndent(v, "", " ")
	return string(b)
}

// What the rows say can be written into a policy: every pattern is one that a grant
// may have.
func TestRowsAreMadeOfGrantPatterns(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		d, err := Grants(grantsOf(r, "a"), grantsOf(r, "b"), now)
		if err != nil {
			r.Fatal(err)
		}
		for i, row := range append(d.Added, d.Removed...) {
			for _, patterns := range [][]string{row.Paths, row.PathsExcept} {
				if row.Protocol != policy.HTTP || patterns == nil {
					continue
				}
				g := grant.Grant{ID: fmt.Sprint(i), HTTP: &grant.HTTP{Paths: patterns}}
				if err := grant.Check([]grant.Grant{g}); err != nil {
					r.Fatalf("%q: %v", patterns, err)
				}
			}
		}
	})
}

// Patterns that overlap in every way end with an error, not with all memory.
func TestOverlapIsBounded(t *testing.T) {
	// Which of 20 segments are "a" decides which of the next 20 has to be "b".
	const n = 20
	var list []string
	for i := range n {
		parts := slices.Repeat([]string{"{x}"}, 2*n)
		parts[i], parts[n+i] = "a", "b"
		list = append(list, "/"+strings.Join(parts, "/"))
	}
	g := grant.Grant{ID: "a", HTTP: &grant.HTTP{Paths: list}}
	if d, err := Grants(nil, []grant.Grant{g}, now); !errors.Is(err, errOverlap) {
		t.Errorf("%+v, %v; want %v", d, err, errOverlap)
	}
}

func BenchmarkGrants(b *testing.B) {
	var list []grant.Grant
	for i := range 10_000 {
		list = append(list, grant.Grant{
			ID: fmt.Sprintf("g%05d", i), From: []string{fmt.Sprintf("spiffe://x.test/s%d", i%997)}, To: []string{fmt.Sprintf("spiffe://x.test/d%d", i%211)},
			HTTP: &grant.HTTP{Methods: []string{"GET"}, Paths: []string{fmt.Sprintf("/p%d/*", i%31)}},
		})
	}
	other := slices.Clone(list)
	for i := range other {
		if i%10 == 0 {
			other[i].HTTP = &grant.HTTP{Methods: []string{"GET", "POST"}, Paths: []string{"/p/{x}"}}
		}
	}
	for b.Loop() {
		if d, err := Grants(list, other, now); err != nil || len(d.Added) == 0 {
			b.Fatal(err)
		}
	}
}
