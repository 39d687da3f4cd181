// Hand-written policies, each with a form that evaluation without a call could lose,
// simplify or make true; see testdata/nasty.txtar.

package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/txtar"

	"merlon.dev/policy"
)

var shortHands = strings.NewReplacer(
	"$headers", "input.attributes.request.http.headers", "$all", "input.attributes.request.http.headers_all", "$method", "input.attributes.request.http.method",
	"$path", "input.attributes.request.http.path", "$host", "input.attributes.request.http.host", "$parsed", "input.parsed_path", "$query", "input.parsed_query",
	"$source", "input.attributes.source.principal", "$destination", "input.attributes.destination.principal",
)

// nasty are the policies by name, "native/…" or "opa/…".
func nasty(t testing.TB) map[string]map[string]string {
	t.Helper()
	archive, err := txtar.ParseFile("testdata/nasty.txtar")
	if err != nil {
		t.Fatal(err)
	}
	policies := map[string]map[string]string{}
	for _, f := range archive.Files {
		modules := map[string]string{"table.rego": tableModule}
		for i, text := range strings.Split(shortHands.Replace(string(f.Data)), "\n--- b\n") {
			if !strings.HasPrefix(text, "package") {
				text = "package authz\n\n" + text
			}
			modules[fmt.Sprintf("%c.rego", 'a'+i)] = text
		}
		policies[f.Name] = modules
	}
	return policies
}

const nastyGrants = `grants:
  - {id: g1, from: ["spiffe://a.test/web"], http: {methods: [GET], paths: ["/orders/*", "/a/*", "/web"]}}
  - {id: g2, to: ["spiffe://a.test/*"], http: {methods: [POST]}}
  - {id: g3, grpc: {services: [x.Y], methods: [Get]}}
  - {id: g4, from: ["spiffe://b.test"], effect: deny, http: {paths: ["/orders"]}}
  - {id: g5, mode: dry-run, http: {methods: [GET]}}
`

func TestNastyPolicies(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	calls := max(20, pairs(t)/1000)
	for name, modules := range nasty(t) {
		w := &writer{Rand: rand.New(rand.NewPCG(seed, uint64(len(name))))}
		e, err := New(t.Context(), Source{Modules: modules, Grants: parseGrants(t, w.one("", nastyGrants))})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		e.limit = time.Minute
		destination := w.one(callTargets...) // a program takes as long to make as the calls to compare
		_, err = e.Program(t.Context(), destination)
		if (err == nil) != (path.Dir(name) == "native") || e.Mismatches() > 0 {
			t.Errorf("%s: Program = %v", name, err)
		}
		for range calls {
			in := w.anyCall()
			in.Destination = destination
			if answersOtherwise(t, e, in) {
				t.Errorf("which is by the policy %s", name)
				break
			}
		}
	}
}

// answersOtherwise says whether the program, what is kept or what the engine chooses
// differs from OPA on the whole input.
func answersOtherwise(t testing.TB, e *Engine, in *policy.Input) (differs bool) {
	t.Helper()
	lazy := e.parts
	e.parts = allParts
	want, a := e.decideByOPA(context.Background(), in)
	e.parts = lazy
	if errors.Is(a.err, errStopped) || errors.Is(a.err, errStuck) {
		return false
	}
	same := func(what string, got policy.Decision, dryRun []string) {
		if got.Allow != want.Allow || got.Reason != want.Reason || got.RuleID != want.RuleID || !got.Response.Equal(want.Response) || !slices.Equal(dryRun, a.dryRun) {
			t.Errorf("call %+v:\nOPA %+v (%v)\n%s %+v", *in, want, a.err, what, got)
			differs = true
		}
	}
	if p, err := e.Program(context.Background(), in.Destination); err == nil {
		v := p.Decide(in, time.Now())
		same("program", policy.Decision{Allow: v.Allow(), Reason: v.Reason, RuleID: v.RuleID, Response: v.Response}, v.DryRun)
	} else {
		// A call that grants cannot tell from it, so that its decision may be kept for in.
		other := *in
		other.Query, other.Host, other.Headers = "a=b", "other", policy.HeaderMap{"accept": {"b"}}
		e.decideKept(context.Background(), &other)
		d, b := e.decideKept(context.Background(), in)
		same("kept", d, b.dryRun)
	}
	d, b := e.decide(context.Background(), in)
	same("engine", d, b.dryRun)
	return differs
}

// Whatever is between the quotes of a policy: no panic, and no answer that is not OPA's.
func FuzzPolicies(f *testing.F) {
	for _, modules := range nasty(f) {
		f.Add(modules["a.rego"], uint64(1))
	}
	for _, dir := range exampleFolders(f, examples) {
		for _, text := range readExample(f, dir).modules {
			f.Add(text, uint64(2))
		}
	}
	for i := range uint64(20) {
		w := &writer{Rand: rand.New(rand.NewPCG(i, i))}
		f.Add(w.module(), i)
	}
	f.Fuzz(func(t *testing.T, module string, seed uint64) {
		modules := map[string]string{"a.rego": module, "table.rego": tableModule}
		if CheckModules(modules) != nil {
			return
		}
		e, err := New(context.Background(), Source{Modules: modules})
		if err != nil {
			return
		}
		e.limit = 5 * time.Second // a policy can take long
		w := &writer{Rand: rand.New(rand.NewPCG(seed, seed))}
		for range 5 {
			if in := w.anyCall(); answersOtherwise(t, e, in) || e.Mismatches() > 0 {
				t.Fatal("the answers differ")
			}
		}
	})
}
