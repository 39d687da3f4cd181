package engine

// This file finds the errors that partial evaluation keeps to itself. Within a negation
// OPA (1.22) takes an error for the end of all that can hold: of
//
//	not flagged(input.parsed_path[0])
//
// is left what was found before the error, and the negation of too little holds for too
// many calls. Its trace tells: what ends by itself is seen to fail or to go back, and
// what an error ends is not.

import (
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// unended is a tracer that knows what has begun and not ended: expressions that were
// evaluated, and rules that held.
type unended struct {
	since map[begun]int // in order
	n     int
}

type begun struct {
	query uint64
	what  ast.Node // *ast.Expr or *ast.Rule
}

func newUnended() *unended { return &unended{since: map[begun]int{}} }

func (u *unended) Enabled() bool { return true }

func (u *unended) Config() topdown.TraceConfig { return topdown.TraceConfig{} }

func (u *unended) TraceEvent(e topdown.Event) {
	expr, isExpr := e.Node.(*ast.Expr)
	_, isRule := e.Node.(*ast.Rule)
	at := begun{e.QueryID, e.Node}
	switch {
	case !isExpr && !isRule:
	case e.Op == topdown.RedoOp, e.Op == topdown.FailOp:
		delete(u.since, at)
	case isExpr && e.Op == topdown.EvalOp && !expr.Negated, isRule && e.Op == topdown.ExitOp: // a negation that holds does not go back
		u.n++
		u.since[at] = u.n
	}
}

// last is the place of what began last and has not ended; false where all has.
func (u *unended) last() (at *ast.Location, found bool) {
	latest := 0
	for what, n := range u.since {
		if n > latest {
			latest, at = n, what.what.Loc()
		}
	}
	return at, latest > 0
}
