package residual

// This file decides which answers allow and deny can have: booleans, and for allow
// the objects of opa-envoy-plugin, as long as each is written down whole. An answer
// that a call has a part in is left to OPA.

import (
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Answer is a value that an allow can have.
type Answer struct {
	Rule  ast.Ref // data.authz.allow or data.envoy.authz.allow
	Value ast.Value
	// Default is set for the answer where no rule has another.
	Default bool
}

// Allows says whether it is true, or an object with "allowed": true.
func (a *Answer) Allows() bool {
	if object, ok := a.Value.(ast.Object); ok {
		return isTrue(object.Get(ast.InternedTerm("allowed")))
	}
	return ast.Boolean(true).Equal(a.Value)
}

func isTrue(t *ast.Term) bool { return t != nil && ast.Boolean(true).Equal(t.Value) }

// AnswersObjects says whether an allow of the policy that c has compiled can be
// anything but a boolean.
func AnswersObjects(c *ast.Compiler) bool {
	for _, path := range asked {
		for _, rule := range c.GetRules(ast.MustParseRef(path)) {
			for ; rule != nil; rule = rule.Else {
				if pathOf(rule) != path || rule.Head.Value == nil { // a set has none
					return true
				}
				if _, boolean := rule.Head.Value.Value.(ast.Boolean); !boolean && strings.HasSuffix(path, ".allow") {
					return true
				}
			}
		}
	}
	return false
}

// Answers are those of the rule allow in both packages, which Check has passed:
// no two are the same, and the default comes last.
func Answers(c *ast.Compiler) (all []Answer) {
	for _, path := range asked {
		if !strings.HasSuffix(path, ".allow") {
			continue
		}
		ref := ast.MustParseRef(path)
		var byDefault []Answer
		var byRules []Answer
		for _, rule := range c.GetRulesExact(ref) {
			value, _ := answerOf(rule)
			if a := (Answer{ref, value, rule.Default}); rule.Default {
				byDefault = append(byDefault, a)
			} else {
				byRules = append(byRules, a)
			}
		}
		for i, a := range byRules {
			same := func(b Answer) bool { return a.Value.Compare(b.Value) == 0 }
			if !slices.ContainsFunc(byRules[:i], same) && !slices.ContainsFunc(byDefault, same) {
				all = append(all, a)
			}
		}
		all = append(all, byDefault...)
	}
	return all
}

// answerOf is the value of rule, if it is a constant: in its head, or one that its
// body gives a variable.
func answerOf(rule *ast.Rule) (ast.Value, bool) {
	if rule.Head.Value == nil { // of a set
		return nil, false
	}
	value := rule.Head.Value.Value
	v, isVar := value.(ast.Var)
	if !isVar {
		return value, ast.IsConstant(value)
	}
	for _, e := range rule.Body {
		terms, ok := e.Terms.([]*ast.Term)
		if !ok || len(terms) != 3 || e.Negated || !e.IsEquality() && !e.IsAssignment() {
			continue
		}
		for _, pair := range [][2]*ast.Term{{terms[1], terms[2]}, {terms[2], terms[1]}} {
			if pair[0].Value.Compare(v) == 0 && ast.IsConstant(pair[1].Value) {
				return pair[1].Value, true
			}
		}
	}
	return nil, false
}

// exactAnswer is for allow and deny: no by default, and by rules always the same,
// or such that no two rules hold for one call.
func exactAnswer(rules []*ast.Rule) error {
	var valued []*ast.Rule
	for _, rule := range rules {
		value, ok := answerOf(rule)
		a := Answer{Value: value}
		switch {
		case !ok || !isAnswer(rule, value):
			return notNative(rule.Loc(), "%s is not always a constant: a boolean, or for allow an object with a boolean allowed", rule.Head.Name)
		case rule.Default && a.Allows():
			return notNative(rule.Loc(), "%s is true by default", rule.Head.Name)
		case !rule.Default:
			valued = append(valued, rule)
		}
	}
	for i, a := range valued {
		for _, b := range valued[:i] {
			x, _ := answerOf(a)
			y, _ := answerOf(b)
			if x.Compare(y) != 0 && !exclude(a.Body, b.Body) {
				return notNative(a.Loc(), "%s has one value by one rule and another by another", a.Head.Name)
			}
		}
	}
	return nil
}

func isAnswer(rule *ast.Rule, value ast.Value) bool {
	switch v := value.(type) {
	case ast.Boolean:
		return true
	case ast.Object:
		allowed := v.Get(ast.InternedTerm("allowed"))
		if allowed == nil || !strings.HasSuffix(pathOf(rule), ".allow") {
			return false
		}
		_, boolean := allowed.Value.(ast.Boolean)
		return boolean
	}
	return false
}

// oneOfObjects refuses members of allow or deny that have rules of their own, and
// objects beside a second package that is asked: which of two is sent depends on
// both.
func oneOfObjects(c *ast.Compiler) error {
	var allows []*ast.Rule
	for _, path := range asked {
		for _, rule := range c.GetRules(ast.MustParseRef(path)) {
			if pathOf(rule) != path {
				return notNative(rule.Loc(), "%s is an object of several rules", path)
			}
		}
		if strings.HasSuffix(path, ".allow") {
			allows = append(allows, c.GetRulesExact(ast.MustParseRef(path))...)
		}
	}
	for _, rule := range allows {
		if pathOf(rule) != pathOf(allows[0]) && AnswersObjects(c) {
			return notNative(rule.Loc(), "allow answers objects, and stands in both packages")
		}
	}
	return nil
}
