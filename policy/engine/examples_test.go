// The policies in examples/policies: those of opa-envoy-plugin run unchanged on a
// stock OPA and here, with the same answers, and all of them have the same answers by
// whatever decides.

package engine

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
	"merlon.dev/policy/program"
)

const (
	examples      = "../../examples/policies"
	envoyExamples = examples + "/envoy"
	refused       = "raw-jwt" // is there to show the refusal
)

// example is a policy folder.
type example struct {
	name           string
	grants         []grant.Grant
	modules, tests map[string]string
}

func readExample(t testing.TB, dir string) example {
	t.Helper()
	x := example{name: filepath.Base(dir), modules: map[string]string{}, tests: map[string]string{}}
	files, err := filepath.Glob(dir + "/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		switch name := filepath.Base(file); {
		case err != nil:
			t.Fatal(err)
		case strings.HasSuffix(name, "_test.rego"):
			x.tests[name] = string(text)
		case strings.HasSuffix(name, ".rego"):
			x.modules[name] = string(text)
		case name == "grants.yaml":
			x.grants = parseGrants(t, string(text))
		}
	}
	return x
}

// exampleFolders are all policy folders in dir but the refused one.
func exampleFolders(t testing.TB, dir string) (folders []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if policies, _ := filepath.Glob(path + "/*.rego"); err == nil && entry.IsDir() && policies != nil && entry.Name() != refused {
			folders = append(folders, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return folders
}

// lines are the JSON values of a file.
func lines(t *testing.T, file string) (all [][]byte) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		all = append(all, slices.Clone(s.Bytes()))
	}
	return all
}

func fromJSON(t testing.TB, text []byte) (v any) {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// stockOPA is what `opa eval -d FOLDER data.envoy.authz.allow` answers to an input: an
// OPA that knows nothing of Merlon.
func stockOPA(t testing.TB, x example, query string, more ...func(*rego.Rego)) func(input any) any {
	t.Helper()
	options := append([]func(*rego.Rego){rego.Query(query)}, more...)
	for name, text := range x.modules {
		options = append(options, rego.Module(name, text))
	}
	q, err := rego.New(options...).PrepareForEval(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return func(input any) any {
		rs, err := q.Eval(context.Background(), rego.EvalInput(input))
		if err != nil {
			t.Fatal(err)
		}
		if len(rs) == 0 {
			return nil
		}
		return rs[0].Expressions[0].Value
	}
}

func TestEnvoyPoliciesRunUnchanged(t *testing.T) {
	folders := exampleFolders(t, envoyExamples)
	if len(folders) < 10 {
		t.Fatalf("%d policies", len(folders))
	}
	compiled := 0
	for _, dir := range folders {
		x := readExample(t, dir)
		t.Run(x.name, func(t *testing.T) {
			stock, e := stockOPA(t, x, "data.envoy.authz.allow"), load(t, nil, x.modules)
			inputs, wants := lines(t, dir+"/inputs.jsonl"), lines(t, dir+"/wants.jsonl")
			if len(inputs) < 4 || len(inputs) != len(wants) {
				t.Fatalf("%d inputs, %d wanted outputs", len(inputs), len(wants))
			}
			if _, err := e.Program(t.Context(), "spiffe://shop.test/orders"); err == nil {
				compiled++
			} else {
				t.Log("decided by OPA: ", err)
			}
			verdicts := map[bool]int{}
			for i, line := range inputs {
				input, want := fromJSON(t, line), fromJSON(t, wants[i])
				if got := stock(input); !cmp.Equal(got, want) {
					t.Errorf("input %d: a stock OPA answers %v; want %v", i, got, want)
				}
				in, err := policy.ParseInput(line)
				if err != nil {
					t.Fatal(err)
				}
				sameInput(t, input.(map[string]any), in)
				d := byAll(t, e, in)
				verdicts[d.Allow]++
				allow, send := answerOf(t, want)
				if d.Allow != allow || !cmp.Equal(d.Response, send) {
					t.Errorf("input %d: decision %+v %+v; want %s", i, d, d.Response, wants[i])
				}
			}
			if verdicts[true] == 0 || verdicts[false] == 0 {
				t.Errorf("%d inputs are allowed, %d denied", verdicts[true], verdicts[false])
			}
			results, err := RunRegoTests(t.Context(), Source{Modules: x.modules}, x.tests, nil)
			if err != nil || len(results) < 2 {
				t.Errorf("%d Rego tests, %v", len(results), err)
			}
			for _, r := range results {
				if !r.Pass {
					t.Errorf("%s:%d: %s: %s", r.File, r.Line, r.Name, r.Detail)
				}
			}
		})
	}
	if want := len(folders) - 3; compiled != want { // annotate, claims, network
		t.Errorf("%d policies are compiled; want %d", compiled, want)
	}
}

// answerOf is what a raw answer of opa-envoy-plugin's kind means.
func answerOf(t *testing.T, want any) (allow bool, send *policy.Response) {
	t.Helper()
	if allow, ok := want.(bool); ok {
		return allow, nil
	}
	v, err := ast.InterfaceToValue(want)
	if err == nil {
		send, err = responseOf(v.(ast.Object))
	}
	if err != nil {
		t.Fatal(err)
	}
	return want.(map[string]any)["allowed"].(bool), send
}

// sameInput makes sure that a policy gets of a call what the plugin gives it.
func sameInput(t *testing.T, given map[string]any, in *policy.Input) {
	t.Helper()
	ours, err := ast.JSON(document(in))
	if err != nil {
		t.Fatal(err)
	}
	var within func(path string, given, ours any)
	within = func(path string, given, ours any) {
		object, ok := given.(map[string]any)
		if !ok || path == ".parsed_query" {
			if !cmp.Equal(given, ours) && path != ".jwt.exp" { // a number all the same
				t.Errorf("input%s is %v; given %v", path, ours, given)
			}
			return
		}
		there, _ := ours.(map[string]any)
		for key, value := range object {
			if path+"."+key != ".version" {
				within(path+"."+key, value, there[key])
			}
		}
	}
	within("", given, ours)
}

func TestPoliciesThatDecodeRawTokensAreRefused(t *testing.T) {
	err := CheckModules(readExample(t, envoyExamples+"/"+refused).modules)
	e, ok := errors.AsType[*Error](err)
	if !ok || e.File != "authz.rego" || e.Line != 9 || !strings.Contains(e.Reason, "io.jwt.decode reads unverified tokens; input.jwt has the claims") {
		t.Errorf("error %v; want the line, and the hint to input.jwt", err)
	}
}

// Every example decides alike by program, by what is kept, by our OPA and by a stock
// one, on calls made of its own words. `make differential` makes more of them.
func TestExamplesDecideAlike(t *testing.T) {
	folders := exampleFolders(t, examples)
	n := pairs(t) / len(folders) / 30
	allowed := 0
	for _, dir := range folders {
		x := readExample(t, dir)
		data := map[string]any{"merlon": grant.Compile(x.grants)}
		e := load(t, x.grants, x.modules)
		other := otherOPAOf(t, data, x.modules)
		r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
		for _, in := range exampleCalls(t, e, dir, n, r) {
			d := byAll(t, e, in)
			if stock := other(in); stock != string(d.Reason) && d.Reason != policy.Error {
				t.Fatalf("%s: %+v: %+v; a stock OPA says %s", x.name, *in, d, stock)
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

// exampleCalls are n calls of the words of a policy and of its inputs, changed at
// random.
func exampleCalls(t *testing.T, e *Engine, dir string, n int, r *rand.Rand) (calls []*policy.Input) {
	t.Helper()
	destinations := []string{"spiffe://shop.test/orders", "spiffe://shop.test/stock", "spiffe://shop.test/ledger"}
	destination := destinations[r.IntN(len(destinations))]
	src, err := e.programSource(t.Context(), destination)
	if err != nil {
		src = program.Source{Destination: destination}
	}
	src.Generation = r.Uint64()
	calls = sampleCalls(&src, n)
	for i, in := range calls {
		in.SourceAddress = []string{"", "10.20.0.1:1", "10.1.0.1:2", "192.0.2.1:3"}[i%4]
	}
	if _, err := os.Stat(dir + "/inputs.jsonl"); err != nil {
		return calls
	}
	given := lines(t, dir+"/inputs.jsonl")
	one := func() *policy.Input {
		in, err := policy.ParseInput(given[r.IntN(len(given))])
		if err != nil {
			t.Fatal(err)
		}
		return in
	}
	for range n {
		a, b := one(), one()
		a.Destination = destination
		for _, take := range []func(){
			func() { a.Source = b.Source }, func() { a.Method = b.Method }, func() { a.Path = b.Path }, func() { a.Query = b.Query },
			func() { a.Headers = b.Headers }, func() { a.Host = b.Host }, func() { a.JWT = b.JWT }, func() { a.Protocol = policy.GRPC },
		} {
			if r.IntN(4) == 0 {
				take()
			}
		}
		calls = append(calls, a)
	}
	return calls
}

// otherOPAOf answers the reason by data.merlon.decision in an OPA that knows nothing
// of Merlon.
func otherOPAOf(t *testing.T, data map[string]any, modules map[string]string) func(*policy.Input) string {
	t.Helper()
	x := example{modules: map[string]string{ModuleName: Module}}
	maps.Copy(x.modules, modules)
	stock := stockOPA(t, x, "data.merlon.decision", rego.Data(data))
	return func(in *policy.Input) string {
		document, err := ast.JSON(document(in))
		if err != nil {
			t.Fatal(err)
		}
		m, _ := stock(document).(map[string]any)
		reason, _ := m["reason"].(string)
		return reason
	}
}
