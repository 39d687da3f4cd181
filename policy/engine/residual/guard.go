package residual

// This file keeps partial evaluation from losing a condition. In
//
//	user := input.attributes.request.http.headers.user
//	not banned(user)
//
// a call without that header does not reach the second line. OPA (1.22) puts the
// header itself in the place of user, which leaves "not banned(…)" alone, and that
// holds where there is no header. So each variable whose place is taken behind a
// negation, in a closure or in a function gets a condition of its own: that it
// has a value.
//
// And a variable that gets its value from an array taken apart loses what it is
// compared with by way of a rule or a function:
//
//	["customers", id] = input.parsed_path
//	id == customer
//
// leaves nothing of the second line (OPA 1.22). So such a variable gets its value
// from a reference of its own, id = input.parsed_path[1], and the array names none.

// And x = x is true to partial evaluation also where there is no x, and so are
//
//	headers.accept == input.attributes.request.http.headers.accept
//
// where a rule called headers names a part of the input. So each reference that
// something is compared with gets such a condition, too; where the comparison is
// negated, exact.go refuses it.

import (
	"crypto/rand"
	"fmt"

	"github.com/open-policy-agent/opa/v1/ast"
)

// nothingIs is a value that nothing of a call, and nothing that a policy can write
// down, is equal to: to differ from it is to have a value.
var nothingIs = ast.ObjectTerm([2]*ast.Term{ast.StringTerm("has a value"), ast.StringTerm(rand.Text())})

// Guard is a last stage of compiling a policy for partial evaluation: it adds the
// conditions to all rules.
var Guard = ast.CompilerStageDefinition{Name: "guard variables", MetricName: "guard_variables", Stage: func(c *ast.Compiler) *ast.Error {
	guardModules(c)
	return nil
}}

func guardModules(c *ast.Compiler) {
	g := guard{}
	for _, m := range c.Modules {
		for _, top := range m.Rules {
			for rule := top; rule != nil; rule = rule.Else {
				known := ast.NewVarSet()
				for _, arg := range rule.Head.Args {
					known.Update(arg.Vars())
				}
				rule.Body = g.body(rule.Body, known)
				known.Update(rule.Body.Vars(ast.VarVisitorParams{SkipClosures: true}))
				g.closures(rule.Head, known)
			}
		}
	}
}

// guard makes names for variables, which no policy can have.
type guard struct{ names int }

// body is b with conditions, in it and in the bodies in it. known are the variables
// that have a value before it.
func (g *guard) body(b ast.Body, known ast.VarSet) ast.Body {
	var apart ast.Body
	known = known.Copy()
	for _, e := range b {
		outside := known.Copy()
		outside.Update(e.Vars(ast.VarVisitorParams{SkipClosures: true}))
		g.closures(e, outside)
		g.takeApart(&apart, e, known)
		known = outside
	}
	return g.withValues(apart)
}

// closures gives the bodies in a part of a rule conditions.
func (g *guard) closures(in any, known ast.VarSet) {
	ast.NewGenericVisitor(func(x any) bool {
		switch x := x.(type) {
		case *ast.ArrayComprehension:
			x.Body = g.body(x.Body, known)
		case *ast.SetComprehension:
			x.Body = g.body(x.Body, known)
		case *ast.ObjectComprehension:
			x.Body = g.body(x.Body, known)
		case *ast.Not:
			x.Body = g.body(x.Body, known)
		case *ast.Every:
			within := known.Copy()
			within.Update(x.KeyValueVars())
			x.Body = g.body(x.Body, within)
			g.closures(x.Domain, known)
		default:
			return false
		}
		return true
	}).Walk(in)
}

// takeApart appends e to out; where it takes an array apart, so that the array names
// none of the variables that get a value by it. known have one before.
func (g *guard) takeApart(out *ast.Body, e *ast.Expr, known ast.VarSet) {
	array, of, ok := takesApart(e)
	if ok {
		v, isVar := of.Value.(ast.Var)
		ok = !isVar || known.Contains(v) // else it is made of the array
	}
	if !ok {
		out.Append(e)
		return
	}
	shape := make([]*ast.Term, array.Len())
	var values []*ast.Expr
	for i := range shape {
		shape[i] = array.Elem(i)
		if v, isVar := shape[i].Value.(ast.Var); isVar && !v.IsWildcard() {
			shape[i] = g.newVar()
			values = append(values, ast.Equality.Expr(array.Elem(i), elementOf(of, i)).SetLocation(e.Loc()))
		}
	}
	out.Append(ast.Equality.Expr(ast.ArrayTerm(shape...), of).SetLocation(e.Loc()))
	for _, value := range values {
		out.Append(value)
	}
}

// takesApart takes e as array = of, where of is a reference or a variable.
func takesApart(e *ast.Expr) (array *ast.Array, of *ast.Term, ok bool) {
	terms, isCall := e.Terms.([]*ast.Term)
	if !isCall || e.Negated || len(terms) != 3 || !e.IsEquality() && !e.IsAssignment() {
		return nil, nil, false
	}
	for _, pair := range [][2]*ast.Term{{terms[1], terms[2]}, {terms[2], terms[1]}} {
		if array, ok = pair[0].Value.(*ast.Array); !ok || array.IsGround() {
			continue
		}
		switch pair[1].Value.(type) {
		case ast.Ref, ast.Var:
			return array, pair[1], true
		}
	}
	return nil, nil, false
}

func elementOf(list *ast.Term, i int) *ast.Term {
	at := ast.InternedTerm(i)
	if ref, ok := list.Value.(ast.Ref); ok {
		return ast.NewTerm(ref.Append(at))
	}
	return ast.NewTerm(ast.Ref{list, at})
}

func (g *guard) withValues(body ast.Body) ast.Body {
	var out ast.Body
	seen := ast.NewVarSet()
	for _, e := range body {
		out.Append(e)
		if e.Negated || isNot(e) {
			continue
		}
		for _, v := range ownVars(e) {
			if !seen.Contains(v) {
				seen.Add(v)
				out.Append(ast.NotEqual.Expr(ast.NewTerm(v), nothingIs).SetLocation(e.Loc()))
			}
		}
		for _, ref := range compared(e) {
			v := g.newVar()
			out.Append(ast.Equality.Expr(v, ast.NewTerm(ref)).SetLocation(e.Loc()))
			out.Append(ast.NotEqual.Expr(v, nothingIs).SetLocation(e.Loc()))
		}
	}
	return out
}

func (g *guard) newVar() *ast.Term {
	g.names++
	return ast.VarTerm(fmt.Sprintf("merlon %d_", g.names))
}

// compared are the references on both sides of e, outside of closures, where it
// compares two things neither of which is constant.
func compared(e *ast.Expr) (refs []ast.Ref) {
	terms, isCall := e.Terms.([]*ast.Term)
	if !isCall || len(terms) != 3 || !equates(e) || ast.IsConstant(terms[1].Value) || ast.IsConstant(terms[2].Value) {
		return nil
	}
	walkOperands(terms, func(x any) bool {
		ref, is := x.(ast.Ref)
		if is {
			refs = append(refs, ref)
		}
		return is
	})
	if len(refs) == 1 && (isVar(terms[1]) || isVar(terms[2])) {
		return nil // which gets its value from the reference, and has a condition
	}
	return refs
}

func isVar(t *ast.Term) bool {
	_, ok := t.Value.(ast.Var)
	return ok
}

func equates(e *ast.Expr) bool {
	return e.IsEquality() || e.IsAssignment() || e.IsCall() && e.Operator().Equal(ast.Equal.Ref())
}

func isNot(e *ast.Expr) bool {
	_, not := e.Terms.(*ast.Not)
	return not
}

// ownVars are the variables of e outside of closures, in their order.
func ownVars(e *ast.Expr) (vars []ast.Var) {
	terms, call := e.Terms.([]*ast.Term)
	if !call {
		return nil
	}
	walkOperands(terms, func(x any) bool {
		if v, is := x.(ast.Var); is && !ast.RootDocumentNames.Contains(ast.NewTerm(v)) {
			vars = append(vars, v)
		}
		return false
	})
	return vars
}

// walkOperands visits the operands of a call outside of closures, and nothing below
// that for which f returns true.
func walkOperands(terms []*ast.Term, f func(x any) bool) {
	for _, t := range terms[1:] {
		ast.NewGenericVisitor(func(x any) bool {
			switch x.(type) {
			case *ast.ArrayComprehension, *ast.SetComprehension, *ast.ObjectComprehension:
				return true
			}
			return f(x)
		}).Walk(t)
	}
}
