package residual

// This file decides whether evaluation without a call may stand for evaluation
// with one. OPA's partial evaluation answers "can this be true"; a decision is
// also an error where rules disagree, and that must not be lost. What is checked
// here is enough, and errs on OPA's side.

import (
	"fmt"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
)

// NotNative says why a policy, or what it says of one destination, is evaluated
// by OPA.
type NotNative struct {
	Location string // "file:line" of the policy; empty where it is all of it
	Reason   string
}

// Error puts the place in front.
func (e *NotNative) Error() string {
	if e.Location == "" {
		return e.Reason
	}
	return e.Location + ": " + e.Reason
}

func notNative(at *ast.Location, format string, args ...any) error {
	e := &NotNative{Reason: strings.ReplaceAll(fmt.Sprintf(format, args...), Namespace+".", "")}
	if at != nil && at.File != "" {
		e.Location = fmt.Sprintf("%s:%d", at.File, at.Row)
	}
	return e
}

// Failed is why there is no program where evaluation without a call fails at a place.
func Failed(at *ast.Location) error { return notNative(at, "evaluation without a call fails here") }

// asked are the rules whose values decide.
var asked = []string{"data.authz.allow", "data.authz.deny", "data.envoy.authz.allow", "data.envoy.authz.deny"}

// Check returns why no condition for the policy that c has compiled would be exact,
// a *NotNative; nil if one would. It looks at all rules that a decision can reach.
func Check(c *ast.Compiler) error {
	groups := map[string][]*ast.Rule{}
	rules := reachable(c)
	for _, rule := range rules {
		if err := exactRule(rule); err != nil {
			return err
		}
		path := pathOf(rule)
		groups[path] = append(groups[path], rule)
	}
	for path, rules := range groups {
		check := exactValue
		if slices.Contains(asked, path) {
			check = exactAnswer
		}
		if err := check(rules); err != nil {
			return err
		}
	}
	if err := oneOfObjects(c); err != nil {
		return err
	}
	return findFailing(c, rules)
}

func reachable(c *ast.Compiler) (all []*ast.Rule) {
	seen := map[*ast.Rule]bool{}
	var visit func(rules []*ast.Rule)
	visit = func(rules []*ast.Rule) {
		for _, rule := range rules {
			if seen[rule] {
				continue
			}
			seen[rule] = true
			all = append(all, rule)
			for dependency := range c.Graph.Dependencies(rule) {
				if r, ok := dependency.(*ast.Rule); ok {
					visit([]*ast.Rule{r})
				}
			}
		}
	}
	for _, path := range asked {
		visit(c.GetRules(ast.MustParseRef(path))) // those of its members, too
	}
	slices.SortFunc(all, func(a, b *ast.Rule) int { return a.Loc().Compare(b.Loc()) })
	return all
}

// exactRule refuses what partial evaluation cannot be trusted with in rule.
func exactRule(rule *ast.Rule) (found error) {
	if rule.Else != nil {
		return notNative(rule.Loc(), "%s has an else", rule.Head.Name)
	}
	for _, arg := range rule.Head.Args {
		if _, isVar := arg.Value.(ast.Var); !isVar && !arg.IsGround() { // see guard.go
			return notNative(rule.Loc(), "%s takes an argument apart", rule.Head.Name)
		}
	}
	for i, arg := range rule.Head.Args {
		if slices.ContainsFunc(rule.Head.Args[:i], arg.Equal) { // guard.go sees no comparison
			return notNative(rule.Loc(), "%s has one argument twice", rule.Head.Name)
		}
	}
	ast.WalkVars(rule.Body, func(v ast.Var) bool {
		// Partial evaluation writes x of its 12th query and x1 of its 2nd alike; the
		// compiler has renamed those that are declared.
		if last := v[len(v)-1]; found == nil && '0' <= last && last <= '9' && !v.IsWildcard() {
			found = notNative(rule.Loc(), "the name of variable %s ends in a digit, and it is not declared (with := or some)", v)
		}
		return found != nil
	})
	ast.WalkExprs(rule, func(e *ast.Expr) bool {
		if found == nil {
			found = exactExpr(e)
		}
		return found != nil
	})
	ast.WalkClosures(rule, func(x any) bool {
		// Within a negation, partial evaluation passes over what OPA makes an error.
		if o, is := x.(*ast.ObjectComprehension); is && found == nil {
			found = notNative(o.Key.Loc(), "an object is made of all that holds, and its values could disagree")
		}
		return found != nil
	})
	ast.WalkRefs(rule, func(ref ast.Ref) bool {
		if found == nil && ref.HasPrefix(ast.InputRootRef) {
			if part, whole := asWhole(ref); whole {
				found = notNative(ref[0].Loc(), "%s is read as a whole, and part of it depends on the call", part)
			}
		}
		return found != nil
	})
	if t := wholeInput(rule); t != nil && found == nil {
		found = notNative(t.Loc(), "input is read as a whole")
	}
	return found
}

// exactExpr refuses what partial evaluation cannot be trusted with by itself.
func exactExpr(e *ast.Expr) error {
	terms, _ := e.Terms.([]*ast.Term)
	switch e.Terms.(type) {
	case *ast.LogicalAnd, *ast.LogicalOr: // failing.go looks into neither
		return notNative(e.Loc(), `"and" and "or" have no native form`)
	}
	switch {
	case len(e.With) > 0:
		return notNative(e.Loc(), `"with" replaces what is asked`)
	case len(terms) == 3 && terms[1].Equal(terms[2]): // which it takes for true, also where there is none
		return notNative(e.Loc(), "%s is compared with itself", terms[1])
	case len(terms) > 3 && equates(e): // and for any answer, where that is asked for
		return notNative(e.Loc(), "whether two things are equal is used as a value")
	case e.Negated && len(compared(e)) > 0: // see guard.go
		return notNative(e.Loc(), "that two parts of the call are equal is negated")
	}
	return nil
}

// wholeInput is where rule names the input other than as the head of a reference
// to a part of it; nil if it does not.
func wholeInput(rule *ast.Rule) (whole *ast.Term) {
	ast.WalkTerms(rule, func(t *ast.Term) bool {
		if v, ok := t.Value.(ast.Var); ok && whole == nil && v.Equal(ast.InputRootDocument.Value) && !insideRef(rule, t) {
			whole = t
		}
		return whole != nil
	})
	return whole
}

// insideRef says whether t is the head of a reference, which asWhole judges.
func insideRef(rule *ast.Rule, t *ast.Term) (inside bool) {
	ast.WalkRefs(rule, func(ref ast.Ref) bool {
		inside = inside || ref[0] == t
		return inside
	})
	return inside
}

// asWhole says whether ref, which begins with input, names something of which a
// part is known without a call and a part is not.
func asWhole(ref ast.Ref) (string, bool) {
	switch ground := ref.GroundPrefix().String(); ground {
	case "input", "input.attributes", "input.attributes.destination", "input.spiffe", "input.merlon":
		return ground, true
	default:
		return ground, strings.HasPrefix(ground, "input.merlon.")
	}
}

// exactValue makes sure that rules of one name cannot have two values for one
// call, which OPA makes an error.
func exactValue(rules []*ast.Rule) error {
	var valued []*ast.Rule
	for _, rule := range rules {
		switch {
		case rule.Head.RuleKind() == ast.MultiValue, rule.Default:
		case !rule.Head.Ref().IsGround():
			return notNative(rule.Loc(), "%s is an object, whose values could disagree", rule.Head.Name)
		default:
			valued = append(valued, rule)
		}
	}
	if len(valued) == 1 && !constant(valued[0]) && iterates(valued[0]) {
		return notNative(valued[0].Loc(), "%s could have several values", valued[0].Head.Name)
	}
	for i, a := range valued {
		for _, b := range valued[:i] {
			same := constant(a) && constant(b) && a.Head.Value.Equal(b.Head.Value)
			if !same && !exclude(a.Body, b.Body) {
				return notNative(a.Loc(), "%s could have several values", a.Head.Name)
			}
		}
		if len(valued) > 1 && !constant(a) && iterates(a) {
			return notNative(a.Loc(), "%s could have several values", a.Head.Name)
		}
	}
	return nil
}

func constant(rule *ast.Rule) bool { return ast.IsConstant(rule.Head.Value.Value) }

// exclude says whether a and b cannot both hold, because they want different
// constants for one reference.
func exclude(a, b ast.Body) bool {
	for _, x := range a {
		ref, want, ok := fixed(x)
		if !ok {
			continue
		}
		for _, y := range b {
			if other, value, ok := fixed(y); ok && ref.Equal(other) && !want.Equal(value) {
				return true
			}
		}
	}
	return false
}

// fixed takes e as "reference = constant".
func fixed(e *ast.Expr) (ref ast.Ref, value *ast.Term, ok bool) {
	if e.Negated || !e.IsEquality() && !e.IsCall() {
		return nil, nil, false
	}
	terms, isCall := e.Terms.([]*ast.Term)
	if !isCall || len(terms) != 3 {
		return nil, nil, false
	}
	if name := terms[0].Value.String(); name != "eq" && name != "equal" {
		return nil, nil, false
	}
	for _, pair := range [][2]*ast.Term{{terms[1], terms[2]}, {terms[2], terms[1]}} {
		r, isRef := pair[0].Value.(ast.Ref)
		if isRef && r.IsGround() && ast.IsConstant(pair[1].Value) {
			return r, pair[1], true
		}
	}
	return nil, nil, false
}

// iterates says whether the body of rule can hold in several ways: whether some
// reference in it finds values for a variable. Comprehensions may: they have one
// value.
func iterates(rule *ast.Rule) bool {
	bound := map[ast.Var]bool{}
	for _, arg := range rule.Head.Args {
		ast.WalkVars(arg, func(v ast.Var) bool { bound[v] = true; return false })
	}
	for _, e := range rule.Body {
		found := false
		walk := ast.NewGenericVisitor(func(x any) bool {
			switch x := x.(type) {
			case *ast.ArrayComprehension, *ast.SetComprehension, *ast.ObjectComprehension, *ast.Every:
				return true
			case ast.Ref:
				if x.String() == "walk" {
					found = true
				}
				for _, t := range x[1:] {
					if v, ok := t.Value.(ast.Var); ok && !bound[v] {
						found = true
					}
				}
			}
			return found
		})
		if walk.Walk(e); found {
			return true
		}
		ast.WalkVars(e, func(v ast.Var) bool { bound[v] = true; return false })
	}
	return false
}
