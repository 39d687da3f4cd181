package residual

// This file reads single terms of what partial evaluation left: fields of a call,
// constants, and comparisons of the two.

import (
	"math"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy/program"
)

func boolean(b bool) program.Expr {
	if b {
		return program.Expr{Op: program.True}
	}
	return program.Expr{}
}

// defined holds where the call has v.
func (v meaning) defined() program.Expr {
	switch {
	case v.text != nil && v.text.Field == program.Text:
		return boolean(true)
	case v.text != nil:
		return program.Expr{Op: program.Defined, A: *v.text}
	case v.list != nil:
		return program.Expr{Op: program.Listed, List: *v.list}
	case v.count != nil:
		return program.Expr{Op: program.Listed, List: *v.count}
	case v.object: // is there with the request
		return program.Expr{Op: program.Defined, A: program.Operand{Field: program.Method}}
	}
	return boolean(v.constant != nil)
}

func (t *translator) term(term *ast.Term, s scope) (meaning, error) {
	switch v := term.Value.(type) {
	case ast.String:
		return meaning{text: &program.Operand{Text: string(v)}}, nil
	case ast.Number, ast.Boolean, ast.Null:
		return meaning{constant: v}, nil
	case *ast.Array, ast.Object, ast.Set:
		if ast.IsConstant(v) {
			return meaning{constant: v}, nil
		}
	case ast.Var:
		if is, ok := s.bound[v]; ok {
			return is, nil
		}
	case ast.Ref:
		return t.ref(v, s)
	case *ast.ArrayComprehension, *ast.SetComprehension, *ast.ObjectComprehension:
		return meaning{}, notNative(term.Loc(), "a comprehension has no native form")
	case ast.Call:
		name := v[0].Value.String()
		if n, ok := results[name]; ok && len(v) == n+1 {
			return t.result(name, v[1:], term.Loc(), s)
		}
		return meaning{}, notNative(term.Loc(), "%s has no native form", name)
	}
	return meaning{}, notNative(term.Loc(), "%s has no native form", term)
}

// fieldsOfInput are the texts of the input, by their place.
var fieldsOfInput = map[string]program.Field{
	"input.attributes.source.principal":    program.SourceID,
	"input.spiffe.source.id":               program.SourceID,
	"input.spiffe.source.trust_domain":     program.SourceTrust,
	"input.spiffe.source.path":             program.SourcePath,
	"input.protocol":                       program.Protocol,
	"input.attributes.request.http.method": program.Method,
	"input.attributes.request.http.path":   program.URL,
	"input.attributes.request.http.host":   program.Host,
	"input.grpc.service":                   program.Service,
	"input.grpc.method":                    program.RPC,
}

// ref is a field, a list, or an element of a list at a place that is known.
func (t *translator) ref(ref ast.Ref, s scope) (meaning, error) {
	if ofVariable := len(ref) == 2 && ref[1].IsGround(); !ref.IsGround() && !ofVariable {
		return meaning{}, notNative(ref[0].Loc(), "%s has no native form: which part of it is read depends on the call", ref)
	}
	if v, ok := ref[0].Value.(ast.Var); ok && len(ref) == 2 {
		if is, bound := s.bound[v]; bound && is.list != nil {
			return elementAt(is.list, ref[1])
		}
	}
	if field, ok := fieldsOfInput[ref.String()]; ok {
		return meaning{text: &program.Operand{Field: field}}, nil
	}
	switch ref.String() {
	case "input.attributes.request", "input.attributes.request.http", "input.attributes.request.http.headers",
		"input.attributes.request.http.headers_all", "input.parsed_query":
		return meaning{object: true}, nil
	}
	if v, ok := listOfInput(ref); ok {
		return v, nil
	}
	if last := len(ref) - 1; last > 0 {
		if v, ok := listOfInput(ref[:last]); ok && v.list != nil {
			return elementAt(v.list, ref[last])
		}
	}
	return meaning{}, notNative(ref[0].Loc(), "%s has no native form", ref)
}

// listOfInput is the header or list that ref names.
func listOfInput(ref ast.Ref) (meaning, bool) {
	if ref.String() == "input.parsed_path" {
		return meaning{list: &program.List{Kind: program.Segments}}, true
	}
	last := len(ref) - 1
	key, ok := ref[last].Value.(ast.String)
	if !ok {
		return meaning{}, false
	}
	switch ref[:last].String() {
	case "input.attributes.request.http.headers":
		return meaning{text: &program.Operand{Field: program.Header, Text: string(key)}}, true
	case "input.attributes.request.http.headers_all":
		return meaning{list: &program.List{Kind: program.HeaderValues, Key: string(key)}}, true
	case "input.parsed_query":
		return meaning{list: &program.List{Kind: program.QueryValues, Key: string(key)}}, true
	}
	return meaning{}, false
}

func elementAt(list *program.List, at *ast.Term) (meaning, error) {
	n, ok := small(at.Value)
	if !ok {
		return meaning{}, notNative(at.Loc(), "%s is no place in a list", at)
	}
	return meaning{text: &program.Operand{Field: program.ListAt, N: n, List: list}}, nil
}

// small is v as the place of an element.
func small(v ast.Value) (int, bool) {
	number, ok := v.(ast.Number)
	if !ok {
		return 0, false
	}
	n, ok := number.Int()
	return n, ok && n >= 0 && n < math.MaxInt16
}

func (t *translator) compare(op program.Op, a, b *ast.Term, s scope) (program.Expr, error) {
	x, err := t.term(a, s)
	if err != nil {
		return program.Expr{}, err
	}
	y, err := t.term(b, s)
	if err != nil {
		return program.Expr{}, err
	}
	at := a.Loc()
	if at == nil {
		at = b.Loc()
	}
	return compareValues(op, x, y, at)
}

func compareValues(op program.Op, x, y meaning, at *ast.Location) (program.Expr, error) {
	switch {
	case x.text != nil && y.text != nil:
		return program.Expr{Op: op, A: *x.text, B: *y.text}, nil
	case x.constant != nil && y.constant != nil && op == program.Equal:
		return boolean(x.constant.Compare(y.constant) == 0), nil
	case x.text != nil && y.constant != nil, x.constant != nil && y.text != nil:
		// Values of two types are never equal; their order is not taken on.
		switch op {
		case program.Equal:
			return boolean(false), nil
		case program.Differs:
			return program.Expr{Op: program.And, Of: []program.Expr{x.defined(), y.defined()}}, nil
		}
	case op == program.Differs && y.constant != nil && nothingIs.Value.Compare(y.constant) == 0:
		return x.defined(), nil
	case x.count != nil && y.constant != nil:
		if n, ok := small(y.constant); ok {
			return countIs(op, x.count, n), nil
		}
	case x.constant != nil && y.count != nil:
		if n, ok := small(x.constant); ok {
			return countMirrored(op, y.count, n), nil
		}
	}
	return program.Expr{}, notNative(at, "it compares what is no text")
}

// countIs compares the number of l's elements with n.
func countIs(op program.Op, l *program.List, n int) program.Expr {
	fewer := func(n int) program.Expr {
		return program.Expr{Op: program.And, Of: []program.Expr{
			{Op: program.Listed, List: *l},
			{Op: program.Not, Of: []program.Expr{{Op: program.CountUp, List: *l, N: n}}},
		}}
	}
	switch op {
	case program.Equal:
		return program.Expr{Op: program.CountIs, List: *l, N: n}
	case program.Less:
		return fewer(n)
	case program.AtMost:
		return fewer(n + 1)
	}
	return program.Expr{Op: program.And, Of: []program.Expr{ // Differs
		{Op: program.Listed, List: *l},
		{Op: program.Not, Of: []program.Expr{{Op: program.CountIs, List: *l, N: n}}},
	}}
}

// countMirrored compares n with the number of l's elements.
func countMirrored(op program.Op, l *program.List, n int) program.Expr {
	switch op {
	case program.Less: // n < count
		return program.Expr{Op: program.CountUp, List: *l, N: n + 1}
	case program.AtMost:
		return program.Expr{Op: program.CountUp, List: *l, N: n}
	}
	return countIs(op, l, n)
}
