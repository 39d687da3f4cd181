package engine

// This file turns the Rego of a policy into a compiled form, or says in terms
// of the author's file why not. It runs when a policy is built, when the CA
// takes it in, and again wherever it is loaded (T30).

import (
	_ "embed" // the module
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy/engine/residual"
)

// Module is the Rego module, fixed, that evaluates compiled grants and asks
// the policy's own Rego. A policy bundle carries it under ModuleName.
//
//go:embed merlon.rego
var Module string

// ModuleName is the name of Module among a policy's modules.
const ModuleName = "merlon/merlon.rego"

// maxModuleBytes bounds one Rego file.
const maxModuleBytes = 1 << 20

// Error is a refused Rego file.
type Error struct {
	File         string
	Line, Column int // 0 where the file as a whole is meant
	Reason       string
}

// Error says where and why, as "file:line:column: reason".
func (e *Error) Error() string {
	if e.Line == 0 {
		return e.File + ": " + e.Reason
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Reason)
}

func errorAt(loc *ast.Location, file, format string, args ...any) *Error {
	e := &Error{File: file, Reason: fmt.Sprintf(format, args...)}
	if loc != nil {
		e.Line, e.Column = loc.Row, loc.Col
	}
	return e
}

// CheckModules reports the first reason why the Rego modules of a policy, by
// file name, cannot be used: syntax, types, recursion, a built-in function
// that is not allowed, a package that is Merlon's, or a part of the input that no
// call has. Module is added where it
// is absent.
func CheckModules(modules map[string]string) error {
	if module, present := modules[ModuleName]; !hasOwnRego(modules) && (!present || module == Module) {
		return nil // tests compile Module
	}
	if err := checkAsked(modules); err != nil {
		return err
	}
	if _, err := compile(modules, nil); err != nil {
		return err
	}
	return checkTypes(modules)
}

// checkAsked refuses Rego that is never asked: without a module in package
// authz the author's rules would decide nothing, and nothing would say so.
func checkAsked(modules map[string]string) error {
	var stray *ast.Module
	var file string
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		if name == ModuleName {
			continue
		}
		m, err := parseModule(name, modules[name])
		if err != nil {
			return err
		}
		if answers(m) {
			return nil
		}
		if stray == nil {
			stray, file = m, name
		}
	}
	if stray == nil {
		return nil // there is none
	}
	return errorAt(stray.Package.Location, file, "%s is never asked; put boolean rules allow and deny into package authz", stray.Package)
}

// ReadsGrants says whether the policy's own Rego in modules, which have passed
// CheckModules, may read grants as data, also those of other destinations.
func ReadsGrants(modules map[string]string) bool {
	for name, source := range modules {
		if name == ModuleName {
			continue
		}
		m, err := parseModule(name, source)
		if err != nil {
			return true
		}
		found := false
		ast.WalkRefs(m, func(ref ast.Ref) bool {
			found = found || readsGrants(ref)
			return found
		})
		if found {
			return true
		}
	}
	return false
}

// readsGrants says whether ref, as it is written, may lead to grants. A name below data
// that is not written out may be any: it can be the outcome of a function, even of
// constants alone.
func readsGrants(ref ast.Ref) bool {
	if !ref.HasPrefix(ast.DefaultRootRef) {
		return false
	}
	if len(ref) == 1 {
		return true
	}
	name, written := ref[1].Value.(ast.String)
	return !written || name == "merlon"
}

// answers says whether m is in a package whose allow and deny are asked.
func answers(m *ast.Module) bool {
	p := m.Package.Path.String()
	return p == "data.authz" || p == "data.envoy.authz"
}

// compiled is a policy as OPA takes it, with the two questions that are put to it.
type compiled struct {
	compiler *ast.Compiler
	// decides has the decision, decidesAndRecords also the dry-run matches.
	decides, decidesAndRecords query
	// forPrograms has the same policy as partial evaluation must get it, or says
	// why no program of it would be exact.
	forPrograms func() (*ast.Compiler, error)
}

type query struct {
	body     ast.Body
	compiler ast.QueryCompiler
}

// The variables that queries bind.
const (
	verdictVar  = ast.Var("verdict")
	dryRunVar   = ast.Var("dry_run")
	responseVar = ast.Var("response")
)

// grantsOnly is the program of every policy without Rego of its own.
var grantsOnly = sync.OnceValues(func() (*compiled, error) { return newProgram(nil, nil) })

// newProgram compiles a policy's own Rego, if any, together with Module.
func newProgram(own map[string]string, prepare func(*ast.Compiler)) (*compiled, error) {
	compiler, err := compile(own, prepare)
	if err != nil {
		return nil, err
	}
	decides := "verdict = data.merlon.granted"
	if len(own) > 0 {
		decides = "verdict = data.merlon.verdict"
		if residual.AnswersObjects(compiler) {
			decides += "; response = data.merlon.response"
		}
	}
	p := &compiled{compiler: compiler, forPrograms: sync.OnceValues(func() (*ast.Compiler, error) {
		if err := residual.Check(compiler); err != nil {
			return nil, err
		}
		return compile(own, func(c *ast.Compiler) {
			if prepare != nil {
				prepare(c)
			}
			c.WithStageAfterID(ast.StageBuildRequiredCapabilities, residual.Guard)
		})
	})}
	if p.decides, err = newQuery(compiler, ast.MustParseBody(decides)); err != nil {
		return nil, err
	}
	p.decidesAndRecords, err = newQuery(compiler, ast.MustParseBody(decides+"; dry_run = data.merlon.dry_run"))
	return p, err
}

func newQuery(c *ast.Compiler, question ast.Body) (query, error) {
	q := query{compiler: c.QueryCompiler()}
	var err error
	if q.body, err = q.compiler.Compile(question); err != nil {
		return query{}, fmt.Errorf("load policy: %v", err)
	}
	return q, nil
}

// compile returns the compiled modules; prepare, if any, sets up the compiler.
func compile(modules map[string]string, prepare func(*ast.Compiler)) (c *ast.Compiler, err error) {
	defer noPanic(&err)
	parsed, err := parse(modules)
	if err != nil {
		return nil, err
	}
	c = ast.NewCompiler().WithCapabilities(Capabilities()).WithStrict(false).WithStageAfterID(ast.StageCheckRecursion, checkComposed)
	if prepare != nil {
		prepare(c)
	}
	if c.Compile(parsed); c.Failed() { // it compiles copies
		return nil, firstError(c.Errors)
	}
	return c, nil
}

// noPanic makes an error of a panic: a policy that finds a bug, OPA's or ours, must stop
// neither the CA nor an agent.
func noPanic(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("panic: %v", r)
	}
}

// parsedModule is Module, which no compiler changes.
var parsedModule = sync.OnceValues(func() (*ast.Module, error) { return parseModule(ModuleName, Module) })

func parse(modules map[string]string) (map[string]*ast.Module, error) {
	parsed := make(map[string]*ast.Module, len(modules)+1)
	var err error
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		if name == ModuleName && modules[name] == Module {
			continue
		}
		if parsed[name], err = parseModule(name, modules[name]); err != nil {
			return nil, err
		}
	}
	if parsed[ModuleName] == nil {
		parsed[ModuleName], err = parsedModule()
	}
	return parsed, err
}

func parseModule(name, source string) (*ast.Module, error) {
	if len(source) > maxModuleBytes {
		return nil, &Error{File: name, Reason: fmt.Sprintf("is longer than %d bytes", maxModuleBytes)}
	}
	if strings.TrimSpace(source) == "" {
		return nil, &Error{File: name, Reason: "is empty"}
	}
	m, err := ast.ParseModuleWithOpts(name, source, ast.ParserOptions{RegoVersion: ast.RegoV1, Capabilities: Capabilities(), ProcessAnnotation: true})
	if err != nil {
		return nil, firstError(err)
	}
	if err := checkBuiltins(name, m); err != nil {
		return nil, err
	}
	if name == ModuleName {
		return m, nil
	}
	return m, checkPackage(name, m)
}

// checkPackage keeps user Rego out of Merlon's own part of data: a rule in
// package merlon could answer in place of the grants.
func checkPackage(name string, m *ast.Module) error {
	path := m.Package.Path
	if len(path) < 2 {
		return errorAt(m.Package.Location, name, "has no package")
	}
	root, _ := path[1].Value.(ast.String)
	if root == "merlon" || root == "system" {
		return errorAt(m.Package.Location, name, "%s is reserved; policies are in package authz", m.Package)
	}
	for _, rule := range m.Rules {
		switch path.Extend(rule.Head.Ref()).String() { // as package envoy can have it, too: authz.allow
		case "data.authz.allow", "data.authz.deny", "data.envoy.authz.allow", "data.envoy.authz.deny":
			if answer := rule.Head.Ref().String(); len(rule.Head.Args) > 0 || rule.Head.RuleKind() == ast.MultiValue {
				return errorAt(rule.Location, name, "%s must be a boolean rule, such as: %s if { … }", answer, answer)
			}
		}
	}
	return nil
}

// checkBuiltins finds uses of functions that are not allowed, also as the
// replacement in a "with" (CVE-2022-36085), to explain them; the compiler
// refuses them too, because they are not among its capabilities.
func checkBuiltins(name string, m *ast.Module) (found error) {
	ast.WalkRefs(m, func(ref ast.Ref) bool {
		if found == nil {
			if reason := refusal(ref.String()); reason != "" {
				found = errorAt(ref[0].Location, name, "%s", reason)
			}
		}
		return found != nil
	})
	return found
}

// firstError puts the first of OPA's errors into our form.
func firstError(err error) error {
	var several ast.Errors
	if !errors.As(err, &several) || len(several) == 0 {
		return err
	}
	slices.SortStableFunc(several, func(a, b *ast.Error) int {
		if a.Location == nil || b.Location == nil {
			return 0
		}
		return strings.Compare(a.Location.File, b.Location.File)
	})
	e := several[0]
	file := "policy"
	if e.Location != nil {
		file = e.Location.File
	}
	return errorAt(e.Location, file, "%s", strings.TrimPrefix(e.Code+": "+e.Message, "rego_type_error: "))
}

// Roots lists the top-level packages of modules, sorted: what a bundle of them
// owns of OPA's data document.
func Roots(modules map[string]string) ([]string, error) {
	parsed, err := parse(modules)
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, m := range parsed {
		root, _ := m.Package.Path[1].Value.(ast.String)
		seen[string(root)] = true
	}
	return slices.Sorted(maps.Keys(seen)), nil
}
