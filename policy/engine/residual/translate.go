// Package residual turns what partial evaluation leaves of a policy's own Rego into
// conditions of package program, where that is exact: the condition holds for the
// calls that OPA says yes to, and for no others, whatever is undefined or an error.
// Check and Guard are for before partial evaluation, Translate for after it.
package residual

// This file reads what partial evaluation left of a policy, and puts it into
// conditions of package program. It takes only what it can put exactly: operands
// whose type is known, functions that cannot fail on them. All else is an error
// that names the place in the policy.

import (
	"crypto/rand"
	"errors"
	"maps"
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy/program"
)

// Namespace is the package below data that partial evaluation is to put its rules into:
// none that a policy can name.
var Namespace = "partial" + rand.Text()

// translator puts one residual into conditions.
type translator struct {
	rules map[string][]*ast.Rule // of the support modules, by path
	size  int
}

// maxResidual bounds the expressions of one program; data can multiply them.
const maxResidual = 20_000

// Translate puts the answer of partial evaluation, any of bodies, into a condition.
// An error is a *NotNative.
func Translate(bodies []ast.Body, support []*ast.Module) (program.Expr, error) {
	t := &translator{rules: map[string][]*ast.Rule{}}
	for _, m := range support {
		for _, rule := range m.Rules {
			path := m.Package.Path.Extend(rule.Head.Ref()).String()
			t.rules[path] = append(t.rules[path], rule)
		}
	}
	either := program.Expr{Op: program.Or}
	for _, body := range bodies {
		one, err := t.body(body, scope{})
		if err != nil {
			return program.Expr{}, err
		}
		either.Of = append(either.Of, one)
	}
	return either, nil
}

// scope is what the variables of a body stand for, and how many lists are being
// walked through.
type scope struct {
	bound map[ast.Var]meaning
	depth int
}

func (s scope) with(v ast.Var, is meaning) scope {
	bound := maps.Clone(s.bound)
	if bound == nil {
		bound = map[ast.Var]meaning{}
	}
	bound[v] = is
	return scope{bound, s.depth}
}

// meaning is what a term stands for: a text, a list of texts, their number, a
// constant that is no text, or an object of the request, of which it is only asked
// whether it is there.
type meaning struct {
	text     *program.Operand
	list     *program.List
	count    *program.List
	constant ast.Value
	object   bool
}

// body is all of b's expressions. One that walks through a list takes in those
// behind it.
func (t *translator) body(b ast.Body, s scope) (program.Expr, error) {
	all := program.Expr{Op: program.And}
	for i, e := range b {
		if t.size++; t.size > maxResidual {
			return program.Expr{}, notNative(nil, "more than %d conditions remain", maxResidual)
		}
		if list, rest, within, err := t.walks(b[i:], s); err != nil {
			return program.Expr{}, err
		} else if list != nil {
			inner, err := t.body(rest, within)
			if err != nil {
				return program.Expr{}, err
			}
			all.Of = append(all.Of, program.Expr{Op: program.Some, List: *list, Of: []program.Expr{inner}})
			return all, nil
		}
		one, inner, err := t.expr(e, s)
		if err != nil {
			return program.Expr{}, within(err, e)
		}
		all.Of, s = append(all.Of, one), inner
	}
	return all, nil
}

// within places an error that has no place of its own at e.
func within(err error, e *ast.Expr) error {
	if why := (*NotNative)(nil); errors.As(err, &why) && why.Location == "" && e.Loc() != nil && e.Loc().File != "" {
		return notNative(e.Loc(), "%s", why.Reason)
	}
	return err
}

// walks says whether the first expression of b finds values for a variable in a
// list, and gives what must hold for one of its elements: b, with a variable for
// the element.
func (t *translator) walks(b ast.Body, s scope) (list *program.List, rest ast.Body, within scope, err error) {
	if b[0].Negated {
		return nil, nil, s, nil
	}
	switch b[0].Terms.(type) {
	case *ast.Every, *ast.Not:
		return nil, nil, s, nil
	}
	element := ast.Var("element " + strconv.Itoa(s.depth)) // which no policy can have
	first, err := ast.TransformRefs(b[0].Copy(), func(ref ast.Ref) (ast.Value, error) {
		index, isVar := ref[len(ref)-1].Value.(ast.Var)
		if _, known := s.bound[index]; list != nil || !isVar || len(ref) < 2 || known {
			return ref, nil
		}
		of, err := t.ref(ref[:len(ref)-1], s)
		if err != nil || of.list == nil {
			return ref, nil //nolint:nilerr // is explained when the reference is read
		}
		if b = withoutGuards(b, index); times(b, index) > 1 {
			return nil, notNative(b[0].Loc(), "the position in a list is used")
		}
		list = of.list
		return element, nil
	})
	if err != nil || list == nil {
		return nil, nil, s, err
	}
	within = s.with(element, meaning{text: &program.Operand{Field: program.Element, N: s.depth}})
	within.depth++
	return list, append(ast.Body{first.(*ast.Expr)}, b[1:]...), within, nil
}

// withoutGuards drops from b what guard.go added about v, the place of an element:
// it has a value wherever there is an element.
func withoutGuards(b ast.Body, v ast.Var) (rest ast.Body) {
	for _, e := range b {
		terms, _ := e.Terms.([]*ast.Term)
		if len(terms) == 3 && terms[1].Value.Compare(v) == 0 && terms[2].Equal(nothingIs) {
			continue
		}
		rest = append(rest, e)
	}
	return rest
}

func times(b ast.Body, v ast.Var) (n int) {
	ast.WalkVars(b, func(w ast.Var) bool {
		if w == v {
			n++
		}
		return false
	})
	return n
}

// expr is one expression, and the scope behind it.
func (t *translator) expr(e *ast.Expr, s scope) (program.Expr, scope, error) {
	if len(e.With) > 0 {
		return program.Expr{}, s, notNative(e.Loc(), `"with" replaces what is asked`)
	}
	if e.Negated {
		inner, err := t.body(ast.Body{e.ComplementNoWith()}, s)
		return program.Expr{Op: program.Not, Of: []program.Expr{inner}}, s, err
	}
	switch terms := e.Terms.(type) {
	case *ast.Not:
		inner, err := t.body(terms.Body, s)
		return program.Expr{Op: program.Not, Of: []program.Expr{inner}}, s, err
	case *ast.Every:
		is, err := t.every(terms, s)
		return is, s, err
	case *ast.Term:
		is, err := t.truth(terms, s)
		return is, s, err
	case []*ast.Term:
		name := terms[0].Value.String()
		if equates(e) && len(terms) == 3 { // not equal(a, b, whether), which is a value
			return t.equality(terms[1], terms[2], s)
		}
		return t.call(name, terms[1:], e.Loc(), s)
	}
	return program.Expr{}, s, notNative(e.Loc(), "%s has no native form", e)
}

// truth is a term alone: it holds where it is there, and not false.
func (t *translator) truth(term *ast.Term, s scope) (program.Expr, error) {
	if ref, ok := term.Value.(ast.Ref); ok {
		if rules, ok := t.rules[ref.String()]; ok {
			return t.rule(rules, s)
		}
	}
	v, err := t.term(term, s)
	if err != nil {
		return program.Expr{}, err
	}
	if v.constant != nil {
		return boolean(!ast.Boolean(false).Equal(v.constant)), nil
	}
	return v.defined(), nil
}

// rule is a rule that partial evaluation made: any of its bodies.
func (t *translator) rule(rules []*ast.Rule, s scope) (program.Expr, error) {
	either := program.Expr{Op: program.Or}
	for _, rule := range rules {
		if rule.Else != nil || rule.Head.RuleKind() == ast.MultiValue || len(rule.Head.Args) > 0 || !ast.Boolean(!rule.Default).Equal(rule.Head.Value.Value) {
			return program.Expr{}, notNative(rule.Loc(), "%s has no native form", rule.Head.Name)
		}
		if rule.Default {
			continue
		}
		one, err := t.body(rule.Body, scope{nil, s.depth}) // a rule sees none of its caller's variables
		if err != nil {
			return program.Expr{}, err
		}
		either.Of = append(either.Of, one)
	}
	return either, nil
}

func (t *translator) every(e *ast.Every, s scope) (program.Expr, error) {
	if key, ok := e.Key.Value.(ast.Var); ok && times(e.Body, key) > 0 {
		return program.Expr{}, notNative(e.Loc(), "the position in a list is used")
	}
	domain, err := t.term(e.Domain, s)
	if err != nil {
		return program.Expr{}, err
	}
	element, ok := e.Value.Value.(ast.Var)
	if domain.list == nil || !ok {
		return program.Expr{}, notNative(e.Loc(), `"every" over this has no native form`)
	}
	within := s.with(element, meaning{text: &program.Operand{Field: program.Element, N: s.depth}})
	within.depth++
	inner, err := t.body(e.Body, within)
	return program.Expr{Op: program.Every, List: *domain.list, Of: []program.Expr{inner}}, err
}

// equality is a = b, which gives a variable its value where it has none.
func (t *translator) equality(a, b *ast.Term, s scope) (program.Expr, scope, error) {
	for _, pair := range [][2]*ast.Term{{a, b}, {b, a}} {
		v, isVar := pair[0].Value.(ast.Var)
		if _, known := s.bound[v]; isVar && !known {
			is, err := t.term(pair[1], s)
			return is.defined(), s.with(v, is), err
		}
		if ref, ok := pair[0].Value.(ast.Ref); ok && t.rules[ref.String()] != nil && ast.Boolean(true).Equal(pair[1].Value) {
			is, err := t.rule(t.rules[ref.String()], s)
			return is, s, err
		}
	}
	for _, pair := range [][2]*ast.Term{{a, b}, {b, a}} {
		if array, ok := pair[0].Value.(*ast.Array); ok {
			return t.arrayIs(array, pair[1], s)
		}
	}
	is, err := t.compare(program.Equal, a, b, s)
	return is, s, err
}

// arrayIs is a list that has the elements of array, in which variables without a
// value get one: input.parsed_path = ["users", id].
func (t *translator) arrayIs(array *ast.Array, of *ast.Term, s scope) (program.Expr, scope, error) {
	is, err := t.term(of, s)
	if err != nil {
		return program.Expr{}, s, err
	}
	if is.list == nil || array.Len() > maxDestructured {
		return program.Expr{}, s, notNative(of.Loc(), "it compares what is no text")
	}
	all := program.Expr{Op: program.And, Of: []program.Expr{{Op: program.CountIs, List: *is.list, N: array.Len()}}}
	for i := range array.Len() {
		element := meaning{text: &program.Operand{Field: program.ListAt, N: i, List: is.list}}
		if v, isVar := array.Elem(i).Value.(ast.Var); isVar {
			if _, known := s.bound[v]; !known {
				s = s.with(v, element)
				continue
			}
		}
		other, err := t.term(array.Elem(i), s)
		if err != nil {
			return program.Expr{}, s, err
		}
		one, err := compareValues(program.Equal, element, other, of.Loc())
		if err != nil {
			return program.Expr{}, s, err
		}
		all.Of = append(all.Of, one)
	}
	return all, s, nil
}

// maxDestructured bounds the arrays that are compared element by element.
const maxDestructured = 64

// call is a function as an expression: a predicate, or one whose result is its
// last argument.
func (t *translator) call(name string, args []*ast.Term, at *ast.Location, s scope) (program.Expr, scope, error) {
	if n, ok := results[name]; ok && len(args) == n+1 {
		is, err := t.result(name, args[:n], at, s)
		if err != nil {
			return program.Expr{}, s, err
		}
		if v, isVar := args[n].Value.(ast.Var); isVar {
			if _, known := s.bound[v]; !known {
				return is.defined(), s.with(v, is), nil
			}
		}
		other, err := t.term(args[n], s)
		if err != nil {
			return program.Expr{}, s, err
		}
		c, err := compareValues(program.Equal, is, other, at)
		return c, s, err
	}
	wanted := true // a predicate whose answer is compared
	if n, ok := predicates[name]; ok && len(args) == n+1 {
		answer, ok := args[n].Value.(ast.Boolean)
		if !ok {
			return program.Expr{}, s, notNative(at, "the answer of %s is used", name)
		}
		args, wanted = args[:n], bool(answer)
	}
	is, err := t.predicate(name, args, at, s)
	if err == nil && !wanted {
		return program.Expr{}, s, notNative(at, "the answer of %s is used", name)
	}
	return is, s, err
}

// results are the functions that give a value, and predicates those that hold or
// not, with the number of their arguments.
var (
	results    = map[string]int{"lower": 1, "upper": 1, "split": 2, "count": 1}
	predicates = map[string]int{
		"equal": 2, "neq": 2, "lt": 2, "lte": 2, "gt": 2, "gte": 2, "startswith": 2, "endswith": 2, "contains": 2,
		"internal.member_2": 2, "regex.match": 2, "strings.any_prefix_match": 2, "strings.any_suffix_match": 2,
	}
)

func (t *translator) result(name string, args []*ast.Term, at *ast.Location, s scope) (meaning, error) {
	of, err := t.term(args[0], s)
	if err != nil {
		return meaning{}, err
	}
	switch {
	case name == "count" && of.list != nil:
		return meaning{count: of.list}, nil
	case of.text == nil || name == "count":
	case name == "split":
		if separator, ok := args[1].Value.(ast.String); ok && separator != "" {
			return meaning{list: &program.List{Kind: program.Split, Key: string(separator), Of: of.text}}, nil
		}
	case of.text.Case == program.AsIs:
		changed := *of.text
		changed.Case = map[string]program.Case{"lower": program.Lower, "upper": program.Upper}[name]
		return meaning{text: &changed}, nil
	}
	return meaning{}, notNative(at, "%s of this has no native form", name)
}

func (t *translator) predicate(name string, args []*ast.Term, at *ast.Location, s scope) (program.Expr, error) {
	if len(args) != predicates[name] || len(args) != 2 {
		return program.Expr{}, notNative(at, "%s has no native form", name)
	}
	switch name {
	case "equal":
		return t.compare(program.Equal, args[0], args[1], s)
	case "neq":
		return t.compare(program.Differs, args[0], args[1], s)
	case "lt":
		return t.compare(program.Less, args[0], args[1], s)
	case "lte":
		return t.compare(program.AtMost, args[0], args[1], s)
	case "gt":
		return t.compare(program.Less, args[1], args[0], s)
	case "gte":
		return t.compare(program.AtMost, args[1], args[0], s)
	case "startswith":
		return t.texts(program.Prefix, args, at, s)
	case "endswith":
		return t.texts(program.Suffix, args, at, s)
	case "contains":
		return t.texts(program.Contains, args, at, s)
	case "internal.member_2":
		return t.member(args[0], args[1], at, s)
	case "strings.any_prefix_match":
		return t.anyOf(program.Prefix, args, at, s)
	case "strings.any_suffix_match":
		return t.anyOf(program.Suffix, args, at, s)
	}
	pattern, ok := args[0].Value.(ast.String) // regex.match
	of, err := t.term(args[1], s)
	if err == nil && (!ok || of.text == nil) {
		err = notNative(at, "%s of this has no native form", name)
	}
	if err == nil && program.PatternCost(string(pattern)) > program.MaxPatternCost {
		err = notNative(at, "the regular expression is too large to be matched without a limit")
	}
	if err != nil {
		return program.Expr{}, err
	}
	return program.Expr{Op: program.Matches, A: *of.text, Pattern: string(pattern)}, nil
}

// texts is a predicate of two texts.
func (t *translator) texts(op program.Op, args []*ast.Term, at *ast.Location, s scope) (program.Expr, error) {
	a, err := t.term(args[0], s)
	if err != nil {
		return program.Expr{}, err
	}
	b, err := t.term(args[1], s)
	if err == nil && (a.text == nil || b.text == nil) {
		err = notNative(at, "it compares what is no text")
	}
	if err != nil {
		return program.Expr{}, err
	}
	return program.Expr{Op: op, A: *a.text, B: *b.text}, nil
}

// anyOf is a predicate of a text and a constant collection of texts.
func (t *translator) anyOf(op program.Op, args []*ast.Term, at *ast.Location, s scope) (program.Expr, error) {
	of, err := t.term(args[0], s)
	if err != nil {
		return program.Expr{}, err
	}
	items, ok := constants(args[1].Value)
	if of.text == nil || !ok {
		return program.Expr{}, notNative(at, "it compares what is no text")
	}
	either := program.Expr{Op: program.Or}
	for _, item := range items {
		text, ok := item.Value.(ast.String)
		if !ok { // which is an error in OPA
			return program.Expr{}, notNative(at, "it compares what is no text")
		}
		either.Of = append(either.Of, program.Expr{Op: op, A: *of.text, B: program.Operand{Text: string(text)}})
	}
	return either, nil
}

// member is "item in collection".
func (t *translator) member(item, collection *ast.Term, at *ast.Location, s scope) (program.Expr, error) {
	of, err := t.term(item, s)
	if err != nil {
		return program.Expr{}, err
	}
	if items, ok := constants(collection.Value); ok && of.text != nil {
		in := program.Expr{Op: program.In, A: *of.text, Set: []string{}}
		for _, item := range items {
			if text, ok := item.Value.(ast.String); ok { // others are never equal to a text
				in.Set = append(in.Set, string(text))
			}
		}
		return in, nil
	}
	in, err := t.term(collection, s)
	if err != nil {
		return program.Expr{}, err
	}
	if in.list == nil || of.text == nil {
		return program.Expr{}, notNative(at, "membership in this has no native form")
	}
	element := program.Operand{Field: program.Element, N: s.depth}
	return program.Expr{Op: program.Some, List: *in.list, Of: []program.Expr{{Op: program.Equal, A: *of.text, B: element}}}, nil
}

// constants are the members of a constant array, set or object.
func constants(v ast.Value) (items []*ast.Term, ok bool) {
	if !ast.IsConstant(v) {
		return nil, false
	}
	switch v := v.(type) {
	case *ast.Array:
		v.Foreach(func(t *ast.Term) { items = append(items, t) })
	case ast.Set:
		items = v.Slice()
	case ast.Object:
		v.Foreach(func(_, t *ast.Term) { items = append(items, t) })
	default:
		return nil, false
	}
	return items, true
}
