package engine

// This file runs the tests that stand beside a policy: the table of
// grants_test.yaml, and the rules test_… of *_test.rego by OPA's own runner.

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/tester"
	"github.com/open-policy-agent/opa/v1/topdown"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
	"merlon.dev/policy/strictyaml"
)

// TestResult is the outcome of one test.
type TestResult struct {
	File string `json:"file"`
	Line int    `json:"line"`
	Name string `json:"name"`
	Pass bool   `json:"pass"`
	// Detail says why a test failed, and what it printed.
	Detail string `json:"detail,omitempty"`
}

// testCase is one item of grants_test.yaml.
type testCase struct {
	Name        string `yaml:"name"`
	Source      string `yaml:"source"`
	Destination string `yaml:"destination"`
	Protocol    string `yaml:"protocol"`
	Method      string `yaml:"method"`
	Path        string `yaml:"path"`
	Want        string `yaml:"want"`
	Reason      string `yaml:"reason"`
	Where       strictyaml.Position
}

// RunGrantTests decides each call in the table data, called name in results,
// and compares. What it reaches goes into reached, if that is not nil. The error is
// about the table itself.
func (e *Engine) RunGrantTests(ctx context.Context, name string, data []byte, reached *Coverage) ([]TestResult, error) {
	var cases []testCase
	if err := strictyaml.Decode(name, data, &cases); err != nil {
		return nil, err
	}
	results := make([]TestResult, 0, len(cases))
	for _, c := range cases {
		in, err := c.input(name)
		if err != nil {
			return nil, err
		}
		d := e.Explain(ctx, in, How{})
		if reached != nil {
			reached.call(ctx, in, &d)
		}
		got := "deny"
		if d.Allow {
			got = "allow"
		}
		r := TestResult{File: name, Line: c.Where.Line, Name: c.Name, Pass: got == c.Want && (c.Reason == "" || c.Reason == string(d.Reason))}
		if !r.Pass {
			r.Detail = fmt.Sprintf("got %s %s, want %s: %s", got, d.Reason, strings.TrimSpace(c.Want+" "+c.Reason), strings.Join(d.Details, "; "))
		}
		results = append(results, r)
	}
	return results, nil
}

func (c *testCase) input(file string) (*policy.Input, error) {
	fail := func(key, format string, args ...any) *strictyaml.Error {
		p := c.Where.Of(key)
		return &strictyaml.Error{File: file, Line: p.Line, Column: p.Column, Field: key, Reason: fmt.Sprintf(format, args...)}
	}
	switch {
	case c.Name == "":
		return nil, fail("name", "is missing")
	case c.Want != "allow" && c.Want != "deny":
		return nil, fail("want", "%q is neither allow nor deny", c.Want)
	case c.Reason != "" && !slices.Contains(policy.Reasons(), policy.Reason(c.Reason)):
		e := fail("reason", "%q is no reason", c.Reason)
		e.Suggestion = strictyaml.Suggest(c.Reason, reasonNames())
		return nil, e
	}
	short, err := json.Marshal(map[string]string{
		"source": c.Source, "destination": c.Destination, "protocol": c.Protocol, "method": c.Method, "path": c.Path,
	})
	if err != nil {
		return nil, fail("name", "%v", err)
	}
	in, err := policy.ParseInput(short)
	if err != nil {
		return nil, fail("name", "%v", err)
	}
	return in, nil
}

func reasonNames() []string {
	names := make([]string, 0, len(policy.Reasons()))
	for _, r := range policy.Reasons() {
		names = append(names, string(r))
	}
	return names
}

// regoTestTimeout is how long one Rego test may take.
const regoTestTimeout = 5 * time.Second

// RunRegoTests compiles tests together with the policy of src and runs every
// rule whose name begins with test_. Modules of tests may be in any package
// that policies may. What they reach goes into reached, if that is not nil. The error
// is about a module that does not compile.
func RunRegoTests(ctx context.Context, src Source, tests map[string]string, reached *Coverage) (results []TestResult, err error) {
	modules := maps.Clone(src.Modules)
	maps.Copy(modules, tests)
	parsed, err := parse(modules)
	if err != nil {
		return nil, err
	}
	store := inmem.NewFromObjectWithOpts(map[string]any{"merlon": grant.Compile(src.Grants)}, inmem.OptRoundTripOnWrite(false))
	compiler := ast.NewCompiler().WithCapabilities(Capabilities()).WithEnablePrintStatements(true)
	runner := tester.NewRunner().
		SetCompiler(compiler).SetStore(store).SetModules(parsed).SetTimeout(regoTestTimeout).
		RaiseBuiltinErrors(true).CapturePrintOutput(true)
	if reached != nil {
		runner.SetCoverageQueryTracer(reached.lines)
	}
	err = storage.Txn(ctx, store, storage.TransactionParams{}, func(txn storage.Transaction) error {
		found, err := runner.RunTests(ctx, txn)
		if err != nil {
			return firstError(err)
		}
		var all []*tester.Result
		for r := range found {
			all = append(all, r)
		}
		for _, r := range all {
			var why []string
			if r.Fail {
				why = whyNot(ctx, compiler, store, txn, r.Package+"."+r.Name)
			}
			results = append(results, testResult(r, why))
		}
		return nil
	})
	slices.SortFunc(results, func(a, b TestResult) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Name, b.Name))
	})
	return results, err
}

// whyNot says which expressions keep a test from being true; nothing where it is not a
// rule that can be asked by its name alone.
func whyNot(ctx context.Context, c *ast.Compiler, store storage.Store, txn storage.Transaction, test string) []string {
	body, err := ast.ParseBodyWithOpts(test+" = answer", ast.ParserOptions{RegoVersion: ast.RegoV1})
	if err != nil {
		return nil
	}
	q, err := newQuery(c, body)
	if err != nil {
		return nil
	}
	var r recorder
	if err := run(ctx, topdown.NewQuery(q.body).WithQueryCompiler(q.compiler).WithCompiler(c).WithStore(store).WithTransaction(txn).
		WithIndexing(false).WithEarlyExit(false), &r); err != nil {
		return []string{err.Error()}
	}
	return newSteps(r.events, nil).failed()
}

func testResult(r *tester.Result, why []string) TestResult {
	t := TestResult{Name: r.Package + "." + r.Name, Pass: r.Pass()}
	if r.Location != nil {
		t.File, t.Line = r.Location.File, r.Location.Row
	}
	var detail []string
	switch {
	case r.Skip:
		t.Pass, detail = true, append(detail, "skipped")
	case r.Error != nil:
		detail = append(detail, r.Error.Error())
	case r.Fail:
		detail = append(detail, "the rule is not true")
		detail = append(detail, why...)
	}
	if out := strings.TrimSpace(string(r.Output)); out != "" {
		detail = append(detail, "printed: "+out)
	}
	t.Detail = strings.Join(detail, "; ")
	return t
}
