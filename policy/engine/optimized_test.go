// A policy bundle decides the same when OPA's own optimizer has been over it.

package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	opacompile "github.com/open-policy-agent/opa/v1/compile"
	"github.com/open-policy-agent/opa/v1/rego"
	"pgregory.net/rapid"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

// bundleOf is the bundle of a policy, as `opa build -O=LEVEL -e merlon/decision` makes
// it.
func bundleOf(t testing.TB, grants []grant.Grant, modules map[string]string, level int) *bundle.Bundle {
	t.Helper()
	text, err := json.Marshal(map[string]any{"merlon": grant.Compile(grants)})
	if err != nil {
		t.Fatal(err)
	}
	b := &bundle.Bundle{Data: fromJSON(t, text).(map[string]any)}
	b.Manifest.Init()
	all := map[string]string{ModuleName: Module}
	maps.Copy(all, modules)
	for name, source := range all {
		b.Modules = append(b.Modules, bundle.ModuleFile{URL: name, Path: name, RelativePath: name, Raw: []byte(source), Parsed: ast.MustParseModule(source)})
	}
	c := opacompile.New().WithBundle(b).WithOptimizationLevel(level).WithEntrypoints("merlon/decision").WithOutput(&bytes.Buffer{})
	if err := c.Build(context.Background()); err != nil {
		t.Fatal(err)
	}
	return c.Bundle()
}

// failed is what an OPA that makes an error of a call answers; the engine denies it.
var failed = map[string]any{"reason": string(policy.Error)}

func decidesBy(t testing.TB, b *bundle.Bundle) func(*policy.Input) any {
	q, err := rego.New(rego.Query("data.merlon.decision"), rego.ParsedBundle("main", b)).PrepareForEval(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return func(in *policy.Input) any {
		rs, err := q.Eval(context.Background(), rego.EvalParsedInput(document(in)), rego.EvalTime(instant))
		if err != nil {
			return failed
		}
		if len(rs) != 1 {
			t.Fatalf("%v", rs)
		}
		return rs[0].Expressions[0].Value
	}
}

// Grants at random, and the example policies: by the bundle as it is, by what `opa
// build -O=1` makes of it, and by the engine.
func TestOptimizedBundlesAgree(t *testing.T) {
	seed := int(time.Now().UnixNano() % 1_000_000)
	t.Logf("seed %d", seed)
	policies := map[string]example{}
	for i := range max(pairs(t)/1000, 3) {
		x := example{grants: rapid.SliceOfN(anyGrant, 1, 8).Example(seed + i)}
		for i := range x.grants {
			x.grants[i].ID = fmt.Sprintf("g%d", i)
		}
		if i%2 == 0 {
			x.modules = ownRego
		}
		policies[fmt.Sprint("grants ", i)] = x
	}
	for _, dir := range exampleFolders(t, examples) {
		policies[dir] = readExample(t, dir)
	}
	for name, modules := range nasty(t) { // those that come first, of which there are more where more is asked for
		if len(policies) >= max(pairs(t)/1000, 3)+20 {
			break
		}
		policies[name] = example{modules: modules}
	}
	allowed := 0
	for name, x := range policies {
		e := load(t, x.grants, x.modules)
		e.now = func() time.Time { return instant }
		plain, optimized := decidesBy(t, bundleOf(t, x.grants, x.modules, 0)), decidesBy(t, bundleOf(t, x.grants, x.modules, 1))
		calls := rapid.SliceOfN(anyInput, 20, 20).Example(seed)
		if x.grants == nil && x.name == "" {
			w := &writer{Rand: rand.New(rand.NewPCG(uint64(seed), 1))}
			for i := range calls {
				calls[i] = w.call()
			}
		}
		if x.name != "" {
			calls = exampleCalls(t, e, name, 10, rand.New(rand.NewPCG(uint64(seed), 1)))
		}
		for _, in := range calls {
			a, b := plain(in), optimized(in)
			if !cmp.Equal(a, b) {
				t.Fatalf("%s: %+v: %v; optimized %v", name, *in, a, b)
			}
			d := e.AuthorizeByOPA(t.Context(), in)
			if m := a.(map[string]any); m["reason"] != string(d.Reason) && d.Reason != policy.Error {
				t.Fatalf("%s: %+v: %v; the engine says %+v", name, *in, a, d)
			}
			if d.Allow {
				allowed++
			}
		}
	}
	if allowed == 0 {
		t.Error("no call was allowed")
	}
}
