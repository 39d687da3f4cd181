package engine

// Three ways to one decision: the engine, the same module entered as another
// OPA enters it, and the plain matcher of policy/grant. They must agree on
// everything, the reason and the nearest miss included.

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"pgregory.net/rapid"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

var (
	ids = []string{
		"spiffe://a.test/ns/x/web", "spiffe://a.test/ns/x", "spiffe://a.test/ns/x-evil/web", "spiffe://a.test/web",
		"spiffe://b.test/ns/x/web", "spiffe://b.test/web", "spiffe://a.test", "spiffe://a.test/ns/x/y/z",
	}
	patterns = append([]string{"spiffe://a.test/*", "spiffe://a.test/ns/*", "spiffe://a.test/ns/x/*", "spiffe://b.test", "spiffe://b.test/*"}, ids...)
	paths    = []string{
		"/", "/orders", "/orders/", "/orders/1", "/orders/1/", "/orders/1/lines", "/orders/1/2/lines", "/orders-evil/1", "/Orders", "/%20", "/caf%C3%A9", "/caf%c3%a9", "/café", "/café/1", "/a:b", "/a%3Ab", "/a%3ab/1", "/a+b", "/a%2Bb", "/a b", "/{id}", "/%7Bid%7D", "/*", "/%2A",
		"/a//b", "/a/../b", "/%61", "/a;b", "", "/shop.Orders/Get", "/shop.Orders/List", "/shop.Carts/Get", "/shop.Orders", "/shop.Orders/Get/x",
	}
	pathPatterns = []string{
		"/", "/*", "/orders", "/orders/", "/orders/*", "/orders/{id}", "/orders/{id}/*", "/orders/{id}/lines", "/{a}/{b}", "/{a}/*", "/%20", "/caf%C3%A9", "/café/*", "/caf%c3%a9/{x}", "/a:b", "/a%3Ab/*", "/a+b", "/%7Bid%7D", "/%2A",
		"/shop.Orders/Get", "/shop.Orders/*",
	}
	methods = []string{"GET", "POST", "get", "DELETE"}
	instant = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
)

// some draws nil (any) or a list without repeats.
func some(t *rapid.T, from []string, label string) []string {
	if rapid.IntRange(0, 4).Draw(t, label+" any") == 0 {
		return nil
	}
	return rapid.SliceOfNDistinct(rapid.SampledFrom(from), 1, 3, func(s string) string { return s }).Draw(t, label)
}

var anyGrant = rapid.Custom(func(t *rapid.T) grant.Grant {
	g := grant.Grant{
		From: some(t, patterns, "from"), To: some(t, patterns, "to"),
		Effect: rapid.SampledFrom([]grant.Effect{"", grant.Allow, grant.Allow, grant.Deny}).Draw(t, "effect"),
		Mode:   rapid.SampledFrom([]grant.Mode{"", grant.Enforce, grant.Enforce, grant.DryRun}).Draw(t, "mode"),
	}
	switch rapid.IntRange(0, 4).Draw(t, "protocol") {
	case 0:
		g.TCP = &grant.TCP{}
	case 1:
		g.GRPC = &grant.GRPC{Services: some(t, []string{"shop.Orders", "shop.Carts"}, "services"), Methods: some(t, []string{"Get", "List"}, "rpcs")}
	default:
		g.HTTP = &grant.HTTP{Methods: some(t, methods, "methods"), Paths: some(t, pathPatterns, "paths")}
	}
	if rapid.IntRange(0, 3).Draw(t, "expires") == 0 {
		at := instant.Add(time.Duration(rapid.IntRange(-1, 1).Draw(t, "when")))
		g.Expires = &at
	}
	return g
})

var anyInput = rapid.Custom(func(t *rapid.T) *policy.Input {
	return &policy.Input{
		Source:      rapid.SampledFrom(append([]string{""}, ids...)).Draw(t, "source"),
		Destination: rapid.SampledFrom(ids).Draw(t, "destination"),
		Protocol:    rapid.SampledFrom([]policy.Protocol{policy.HTTP, policy.HTTP, policy.HTTP, policy.GRPC, policy.TCP}).Draw(t, "protocol"),
		Method:      rapid.SampledFrom(methods).Draw(t, "method"),
		Path:        rapid.SampledFrom(paths).Draw(t, "path"),
		Query:       rapid.SampledFrom([]string{"", "", "a=/../b"}).Draw(t, "query"),
	}
})

// ownRego stands for a policy's own modules where it decides nothing.
var ownRego = map[string]string{"a.rego": "package authz\n\nallow if input.nothing\n\ndeny := false\n"}

// Compilers of an OPA that knows nothing of Merlon's capabilities; made once,
// because that takes longer than all the rest.
var (
	plainCompiler   = sync.OnceValue(func() *ast.Compiler { return ast.MustCompileModules(map[string]string{ModuleName: Module}) })
	ownRegoCompiler = sync.OnceValue(func() *ast.Compiler {
		return ast.MustCompileModules(map[string]string{ModuleName: Module, "a.rego": ownRego["a.rego"]})
	})
)

func reference(grants []grant.Grant, in *policy.Input) grant.Outcome {
	switch {
	case in.Source == "":
		return grant.Outcome{Reason: policy.NoIdentity}
	case in.Protocol != policy.TCP && policy.CheckPath(in.Path) != nil:
		return grant.Outcome{Reason: policy.BadRequest}
	}
	return grant.Decide(grants, in, instant)
}

func TestEngineAndOPAAgreeWithTheReference(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		grants := rapid.SliceOfN(anyGrant, 0, 8).Draw(rt, "grants")
		for i := range grants {
			grants[i].ID = fmt.Sprintf("g%d", (i*7+3)%11)
		}
		if err := grant.Check(grants); err != nil {
			rt.Fatal(err)
		}
		data := map[string]any{"merlon": grant.Compile(grants)}
		var modules map[string]string
		if rapid.Bool().Draw(rt, "own Rego") {
			modules = ownRego
		}
		e, err := New(context.Background(), Source{Modules: modules, Grants: grants})
		if err != nil {
			rt.Fatal(err)
		}
		e.now, e.limit = func() time.Time { return instant }, time.Minute
		other := otherOPA(rt, data, modules)
		for _, in := range rapid.SliceOfN(anyInput, 20, 20).Draw(rt, "inputs") {
			compare(rt, e, other, grants, in)
		}
	})
}

func compare(t *rapid.T, e *Engine, other func(*policy.Input) string, grants []grant.Grant, in *policy.Input) {
	want := reference(grants, in)
	d, a := e.decideByOPA(context.Background(), in)
	if d.Allow != want.Allow || d.Reason != want.Reason || d.RuleID != want.GrantID || !slices.Equal(a.dryRun, want.DryRun) {
		t.Fatalf("%+v:\nengine    %+v %v (%v)\nreference %+v", *in, d, a.dryRun, a.err, want)
	}
	p, err := e.Program(context.Background(), in.Destination)
	if err != nil {
		t.Fatal(err)
	}
	v := p.Decide(in, instant)
	if v.Allow() != want.Allow || v.Reason != want.Reason || v.RuleID != want.GrantID || !slices.Equal(v.DryRun, want.DryRun) {
		t.Fatalf("%+v:\nprogram   %+v\nreference %+v", *in, v, want)
	}
	// A dry-run grant differs if the reference decides otherwise with it, and all
	// others in dry run, enforced.
	enforced := slices.Clone(grants)
	for i := range enforced {
		enforced[i].Mode = ""
	}
	differs := reference(enforced, in).Allow != want.Allow
	if byOPA := e.differing(d.Reason, a.dryRun); differs != (len(v.Differing) > 0) || !slices.Equal(byOPA, v.Differing) {
		t.Fatalf("%+v:\nprogram %q and engine %q differ; with dry-run grants enforced it is another decision: %v", *in, v.Differing, byOPA, differs)
	}
	inOrder := fmt.Sprintf("%v %s %q %v", want.Allow, want.Reason, want.GrantID, append([]string{}, want.DryRun...))
	if got := other(in); got != inOrder {
		t.Fatalf("%+v:\nother OPA %s\nreference %s", *in, got, inOrder)
	}
}

// otherOPA evaluates data.merlon.decision as an OPA does that knows nothing
// of Merlon.
func otherOPA(t *rapid.T, data map[string]any, modules map[string]string) func(*policy.Input) string {
	compiled := plainCompiler
	if modules != nil {
		compiled = ownRegoCompiler
	}
	q, err := rego.New(rego.Query("data.merlon.decision"), rego.Compiler(compiled()), rego.Store(inmem.NewFromObject(data))).PrepareForEval(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return func(in *policy.Input) string {
		rs, err := q.Eval(context.Background(), rego.EvalParsedInput(document(in)), rego.EvalTime(instant))
		if err != nil || len(rs) != 1 {
			t.Fatalf("other OPA: %v %v", rs, err)
		}
		m := rs[0].Expressions[0].Value.(map[string]any)
		return fmt.Sprintf("%v %s %q %v", m["allow"], m["reason"], m["rule_id"], m["dry_run"])
	}
}

// The path rules of the module are those of policy.CheckPath.
func TestModuleKnowsAmbiguousPaths(t *testing.T) {
	q, err := rego.New(rego.Query("data.merlon.decision.reason"), rego.Module(ModuleName, Module),
		rego.Store(inmem.NewFromObject(map[string]any{"merlon": grant.Compile(nil)}))).PrepareForEval(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	check := func(t interface{ Fatalf(string, ...any) }, path string) {
		path = strings.ToValidUTF8(path, "?")
		if strings.Contains(path, "?") {
			return // is a query to the module
		}
		want := "NO_GRANT"
		if policy.CheckPath(path) != nil {
			want = "BAD_REQUEST"
		}
		rs, err := q.Eval(context.Background(), rego.EvalParsedInput(document(get(path))))
		if err != nil || rs[0].Expressions[0].Value != want {
			t.Fatalf("%q: %v %v; want %s", path, rs, err, want)
		}
	}
	for c := range 256 {
		check(t, fmt.Sprintf("/a%%%02x/b", c))
		check(t, fmt.Sprintf("/%%%02XZ", c))
		check(t, "/a"+string(rune(c)))
	}
	piece := rapid.OneOf(
		rapid.SampledFrom([]string{"/", "a", ".", "..", "%", "\\", ";", "#", "é", "%c3%a9", "%C0%AF", "%e2%82%ac", "%ed%a0%80", "%f0%9f%98%80", "%f4%90%80%80", "%f0%80%80%80", "%e0%80%80", "\n"}),
		rapid.Map(rapid.IntRange(0, 255), func(n int) string { return fmt.Sprintf("%%%02x", n) }))
	rapid.Check(t, func(t *rapid.T) {
		check(t, "/"+strings.Join(rapid.SliceOfN(piece, 0, 8).Draw(t, "pieces"), ""))
	})
}

func TestDocumentHasTheShapeOfOPAEnvoyPlugin(t *testing.T) {
	in := get("/orders/caf%C3%A9")
	in.Query, in.Host, in.SourceAddress = "a=1&a=2", "orders", "10.0.0.1:4711"
	in.Headers = policy.HeaderMap{"accept": {"*/*"}, "x": {"1", "2"}}
	got, err := ast.JSON(document(in))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"attributes":{"destination":{"address":{},"principal":"spiffe://shop.test/orders"},"request":{"http":{"headers":{"accept":"*/*","x":"1,2"},` +
		`"headers_all":{"accept":["*/*"],"x":["1","2"]},"host":"orders","method":"GET","path":"/orders/caf%C3%A9?a=1&a=2"}},` +
		`"source":{"address":{"socketAddress":{"address":"10.0.0.1","portValue":4711}},"principal":"spiffe://shop.test/web"}},` +
		`"parsed_body":null,"parsed_path":["orders","café"],"parsed_query":{"a":["1","2"]},"protocol":"http",` +
		`"spiffe":{"destination":{"id":"spiffe://shop.test/orders","path":"/orders","trust_domain":"shop.test"},"source":{"id":"spiffe://shop.test/web","path":"/web","trust_domain":"shop.test"}},` +
		`"truncated_body":false}`
	text, err := ast.InterfaceToValue(got)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := ast.ParseTerm(want)
	if err != nil {
		t.Fatal(err)
	}
	if text.Compare(parsed.Value) != 0 {
		t.Errorf("got  %v\nwant %v", text, parsed)
	}
}

// document is the input as another OPA would get it.
func document(in *policy.Input) ast.Value { return object(envoyFields(in, &allParts)...).Value }
