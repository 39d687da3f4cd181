package residual

// This file makes conditions smaller without changing when they hold: constants
// go, and where many alternatives ask for one value of the same field, as those
// do that data multiplied, they are found by it.

import (
	"cmp"
	"maps"
	"reflect"
	"slices"

	"merlon.dev/policy/program"
)

// Simplify makes e smaller; it holds for the same calls.
func Simplify(e program.Expr) program.Expr {
	for i := range e.Of {
		e.Of[i] = Simplify(e.Of[i])
	}
	switch e.Op {
	case program.And:
		return needed(joined(e, program.True, program.False))
	case program.Or:
		return dispatched(joined(e, program.False, program.True))
	case program.Not:
		switch inner := e.Of[0]; inner.Op {
		case program.True:
			return boolean(false)
		case program.False:
			return boolean(true)
		}
	case program.Equal:
		if e.A.Field == program.Text && e.B.Field != program.Text {
			e.A, e.B = e.B, e.A // the constant stands on the right
		}
	}
	return e
}

// joined flattens a conjunction or disjunction: neutral parts go, and one that
// decides it is it.
func joined(e program.Expr, neutral, decides program.Op) program.Expr {
	var of []program.Expr
	for _, part := range e.Of {
		switch part.Op {
		case neutral:
		case decides:
			return part
		case e.Op:
			of = append(of, part.Of...)
		default:
			of = append(of, part)
		}
	}
	switch len(of) {
	case 0:
		return program.Expr{Op: neutral}
	case 1:
		return of[0]
	}
	return program.Expr{Op: e.Op, Of: of}
}

// needed drops from a conjunction what another part of it says too: that the call
// has a field.
func needed(e program.Expr) program.Expr {
	if e.Op != program.And {
		return e
	}
	said := func(o *program.Operand, by int) bool {
		for i := range e.Of {
			p := &e.Of[i]
			switch p.Op {
			case program.Defined: // the first one stays
				if i < by && sameOperand(&p.A, o) {
					return true
				}
			case program.In, program.Matches, program.Switch:
				if sameOperand(&p.A, o) {
					return true
				}
			case program.Equal, program.Differs, program.Less, program.AtMost, program.Prefix, program.Suffix, program.Contains:
				if sameOperand(&p.A, o) || sameOperand(&p.B, o) {
					return true
				}
			}
		}
		return false
	}
	var of []program.Expr
	for i := range e.Of {
		if p := &e.Of[i]; p.Op == program.Defined && said(&p.A, i) {
			continue
		}
		of = append(of, e.Of[i])
	}
	if len(of) == 1 {
		return of[0]
	}
	return program.Expr{Op: program.And, Of: of}
}

// sameOperand says whether a is there when b is.
func sameOperand(a, b *program.Operand) bool {
	return a.Field == b.Field && a.Text == b.Text && a.N == b.N && reflect.DeepEqual(a.List, b.List)
}

// enough alternatives of one field are found by its value.
const enough = 4

// plain is a field that can be looked up.
type plain struct {
	field program.Field
	text  string
	of    program.Case
}

func (a plain) compare(b plain) int {
	return cmp.Or(cmp.Compare(a.field, b.field), cmp.Compare(a.text, b.text), cmp.Compare(a.of, b.of))
}

// asksFor is the field that e wants to be a constant, and what else e wants.
func asksFor(e *program.Expr) (where plain, is string, rest program.Expr, ok bool) {
	parts := []program.Expr{*e}
	if e.Op == program.And {
		parts = e.Of
	}
	for i := range parts {
		p := &parts[i]
		if p.Op == program.Equal && p.B.Field == program.Text && p.B.Case == program.AsIs && lookable(p.A.Field) {
			rest = joined(program.Expr{Op: program.And, Of: slices.Delete(slices.Clone(parts), i, i+1)}, program.True, program.False)
			return plain{p.A.Field, p.A.Text, p.A.Case}, p.B.Text, rest, true
		}
	}
	return plain{}, "", program.Expr{}, false
}

func lookable(f program.Field) bool {
	return f != program.Text && f != program.Element && f != program.ListAt
}

func dispatched(e program.Expr) program.Expr {
	if e.Op != program.Or || len(e.Of) < enough {
		return e
	}
	count := map[plain]int{}
	for i := range e.Of {
		if where, _, _, ok := asksFor(&e.Of[i]); ok {
			count[where]++
		}
	}
	out := program.Expr{Op: program.Or}
	cases := map[plain]map[string][]program.Expr{}
	for i := range e.Of {
		where, is, rest, ok := asksFor(&e.Of[i])
		if !ok || count[where] < enough {
			out.Of = append(out.Of, e.Of[i])
			continue
		}
		if cases[where] == nil {
			cases[where] = map[string][]program.Expr{}
		}
		cases[where][is] = append(cases[where][is], rest)
	}
	for _, where := range slices.SortedFunc(maps.Keys(cases), plain.compare) {
		out.Of = append(out.Of, choice(where, cases[where]))
	}
	return joined(out, program.False, program.True)
}

// choice finds what else is wanted by the value of a field.
func choice(where plain, cases map[string][]program.Expr) program.Expr {
	e := program.Expr{Op: program.Switch, A: program.Operand{Field: where.field, Text: where.text, Case: where.of}}
	always := true
	for _, is := range slices.Sorted(maps.Keys(cases)) {
		rest := Simplify(program.Expr{Op: program.Or, Of: cases[is]})
		e.Set, e.Of = append(e.Set, is), append(e.Of, rest)
		always = always && rest.Op == program.True
	}
	if always {
		e.Op, e.Of = program.In, nil
	}
	return e
}
