package engine

// This file refuses policies that OPA's compiler could not get through: values that
// are composed of one another, x1 := [x0, x0], x2 := [x1, x1] and so on, of which a few
// lines make a type whose comparison takes hours, in the CA that takes it in and in
// every agent (attack T31).

import (
	"maps"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
)

// maxComposed bounds what it takes to compare the types of two values: each of the
// parts twice, and so on down. It takes about 0.3 s.
const maxComposed = 1 << 22

// checkComposed is a stage before the types are found.
var checkComposed = ast.CompilerStageDefinition{Name: "check composed values", MetricName: "check_composed", Stage: func(c *ast.Compiler) *ast.Error {
	w := weights{compiler: c, rules: map[*ast.Rule]int{}}
	for _, name := range slices.Sorted(maps.Keys(c.Modules)) {
		for _, rule := range c.Modules[name].Rules {
			for r := rule; r != nil; r = r.Else {
				if _, heaviest := w.rule(r); heaviest > maxComposed {
					return ast.NewError(ast.CompileErr, r.Loc(), "%s is composed of too much: OPA would take too long to find its type", r.Head.Name)
				}
			}
		}
	}
	return nil
}}

// weights finds what values weigh: one, and twice what their parts weigh.
type weights struct {
	compiler *ast.Compiler
	rules    map[*ast.Rule]int // the weight of their values
}

// value is the weight of the value of rule.
func (w *weights) value(rule *ast.Rule) int {
	if _, known := w.rules[rule]; !known {
		w.rules[rule] = 1 // for a reference that may be to itself
		w.rules[rule], _ = w.rule(rule)
	}
	return w.rules[rule]
}

// rule gives the weights of the value of rule, and of the heaviest value that occurs
// in it.
func (w *weights) rule(rule *ast.Rule) (own, heaviest int) {
	vars := map[ast.Var]int{}
	ast.WalkExprs(rule, func(e *ast.Expr) bool { // by now in an order in which variables have values before they are used
		terms, ok := e.Terms.([]*ast.Term)
		if !ok {
			return false
		}
		for _, t := range terms[1:] {
			heaviest = max(heaviest, w.term(t, vars))
		}
		if len(terms) == 3 && (e.IsEquality() || e.IsAssignment()) {
			bind(vars, terms[1], w.term(terms[2], vars))
			bind(vars, terms[2], w.term(terms[1], vars))
		} else if f, ok := terms[0].Value.(ast.Ref); ok && f.HasPrefix(ast.DefaultRootRef) { // a function of the policy
			bind(vars, terms[len(terms)-1], w.term(terms[0], vars))
		}
		return heaviest > maxComposed
	})
	for _, t := range []*ast.Term{rule.Head.Value, rule.Head.Key} {
		if t != nil {
			own += 2 * w.term(t, vars)
		}
	}
	return own, max(heaviest, own)
}

func bind(vars map[ast.Var]int, t *ast.Term, weight int) {
	if v, isVar := t.Value.(ast.Var); isVar {
		vars[v] = max(vars[v], weight)
	}
}

func (w *weights) term(t *ast.Term, vars map[ast.Var]int) int {
	n := 1
	add := func(t *ast.Term) {
		if n <= maxComposed {
			n += 2 * w.term(t, vars)
		}
	}
	switch v := t.Value.(type) {
	case ast.Var:
		return max(1, vars[v])
	case *ast.Array, ast.Object, ast.Set:
		each(v, add)
	case *ast.ArrayComprehension:
		add(v.Term)
	case *ast.SetComprehension:
		add(v.Term)
	case *ast.ObjectComprehension:
		add(v.Key)
		add(v.Value)
	case ast.Ref:
		if v.HasPrefix(ast.DefaultRootRef) {
			for _, rule := range w.compiler.GetRules(v.ConstantPrefix()) {
				for ; rule != nil; rule = rule.Else {
					n = max(n, w.value(rule))
				}
			}
		} else if head, isVar := v[0].Value.(ast.Var); isVar {
			n = max(n, vars[head])
		}
	}
	return n
}
