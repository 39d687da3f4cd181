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

import (
	"github.com/open-policy-agent/opa/v1/ast"
)

// nothingIs is a value that no text and no list of a call is equal to: to differ
// from it is to have a value.
var nothingIs = ast.ObjectTerm([2]*ast.Term{ast.StringTerm("merlon"), ast.StringTerm("has a value")})

// Guard is a last stage of compiling a policy for partial evaluation: it adds the
// conditions to all rules.
var Guard = ast.CompilerStageDefinition{Name: "guard variables", MetricName: "guard_variables", Stage: func(c *ast.Compiler) *ast.Error {
	guardModules(c)
	return nil
}}

func guardModules(c *ast.Compiler) {
	for _, m := range c.Modules {
		visitor := ast.NewGenericVisitor(func(x any) bool {
			switch x := x.(type) {
			case *ast.Rule:
				x.Body = guarded(x.Body)
			case *ast.ArrayComprehension:
				x.Body = guarded(x.Body)
			case *ast.SetComprehension:
				x.Body = guarded(x.Body)
			case *ast.ObjectComprehension:
				x.Body = guarded(x.Body)
			case *ast.Every:
				x.Body = guarded(x.Body)
			case *ast.Not:
				x.Body = guarded(x.Body)
			}
			return false
		})
		visitor.Walk(m)
	}
}

func guarded(body ast.Body) ast.Body {
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
	}
	return out
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
	for _, t := range terms[1:] {
		ast.NewGenericVisitor(func(x any) bool {
			switch x := x.(type) {
			case *ast.ArrayComprehension, *ast.SetComprehension, *ast.ObjectComprehension:
				return true
			case ast.Var:
				if !ast.RootDocumentNames.Contains(ast.NewTerm(x)) {
					vars = append(vars, x)
				}
			}
			return false
		}).Walk(t)
	}
	return vars
}
