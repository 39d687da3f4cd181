package residual

// This file makes sure that no function of a policy can fail for some call. OPA
// makes a failure an error, which denies the call; partial evaluation drops a body
// that cannot hold, and with it the failures that would have come first. So each
// function must be given what it takes, wherever it stands. What that is follows
// from where values come from: fields of the call have known types; arguments of
// rules are what all their callers give.

import (
	"github.com/open-policy-agent/opa/v1/ast"
)

// kinds are what a term can be, one bit each.
type kinds uint8

const (
	isText  kinds = 1 << iota
	isList        // of texts
	isKnown       // any value that no call decides: partial evaluation meets its failures
	isOther
)

// neverFail are the functions that take anything.
var neverFail = map[string]bool{
	"eq": true, "equal": true, "assign": true, "neq": true, "lt": true, "lte": true, "gt": true, "gte": true,
	"internal.member_2": true, "internal.member_3": true, "internal.print": true,
	"is_array": true, "is_boolean": true, "is_null": true, "is_number": true, "is_object": true, "is_set": true, "is_string": true,
	"type_name": true, "walk": true,
}

// take is what functions take, argument by argument, and what they give.
var take = map[string]struct {
	args  []kinds
	gives kinds
}{
	"startswith": {[]kinds{isText, isText}, isOther}, "endswith": {[]kinds{isText, isText}, isOther}, "contains": {[]kinds{isText, isText}, isOther},
	"lower": {[]kinds{isText}, isText}, "upper": {[]kinds{isText}, isText}, "trim_space": {[]kinds{isText}, isText},
	"trim": {[]kinds{isText, isText}, isText}, "trim_left": {[]kinds{isText, isText}, isText}, "trim_right": {[]kinds{isText, isText}, isText},
	"trim_prefix": {[]kinds{isText, isText}, isText}, "trim_suffix": {[]kinds{isText, isText}, isText},
	"replace": {[]kinds{isText, isText, isText}, isText}, "split": {[]kinds{isText, isText}, isList},
	"concat": {[]kinds{isText, isList}, isText}, "count": {[]kinds{isText | isList}, isOther},
}

// inference knows what the rules of a policy give and are given.
type inference struct {
	compiler *ast.Compiler
	depends  map[*ast.Rule]bool // on the call
	args     map[string][]kinds // of functions, by path
	values   map[string]kinds   // of rules, by path
	members  map[string]kinds   // of partial sets, by path
	changed  bool
	failing  error // the first call that may fail; nil while kinds are being found
	checking bool
}

// findFailing returns why some call to a function in rules may fail; nil if none
// may. rules are all that decide.
func findFailing(c *ast.Compiler, rules []*ast.Rule) error {
	in := &inference{compiler: c, depends: dependOnCall(c, rules), args: map[string][]kinds{}, values: map[string]kinds{}, members: map[string]kinds{}}
	for in.changed = true; in.changed; {
		in.changed = false
		for _, rule := range rules {
			in.rule(rule)
		}
	}
	in.checking = true
	for _, rule := range rules {
		in.rule(rule)
	}
	return in.failing
}

// dependOnCall are the rules whose value a call can change.
func dependOnCall(c *ast.Compiler, rules []*ast.Rule) map[*ast.Rule]bool {
	depends := map[*ast.Rule]bool{}
	for changed := true; changed; {
		changed = false
		for _, rule := range rules {
			if depends[rule] {
				continue
			}
			on := len(rule.Head.Args) > 0
			ast.WalkRefs(rule, func(ref ast.Ref) bool {
				on = on || ref.HasPrefix(ast.InputRootRef)
				return on
			})
			for dependency := range c.Graph.Dependencies(rule) {
				other, ok := dependency.(*ast.Rule)
				on = on || ok && depends[other]
			}
			if on {
				depends[rule], changed = true, true
			}
		}
	}
	return depends
}

func pathOf(rule *ast.Rule) string { return rule.Ref().GroundPrefix().String() }

// rule takes in one rule.
func (in *inference) rule(rule *ast.Rule) {
	vars := map[ast.Var]kinds{}
	for i, arg := range rule.Head.Args {
		if v, ok := arg.Value.(ast.Var); ok && i < len(in.args[pathOf(rule)]) {
			vars[v] = in.args[pathOf(rule)][i]
		}
	}
	in.body(rule.Body, vars)
	if rule.Head.RuleKind() == ast.MultiValue {
		in.grow(in.members, pathOf(rule), in.kind(rule.Head.Key, vars))
	} else {
		in.grow(in.values, pathOf(rule), in.kind(rule.Head.Value, vars))
	}
}

func (in *inference) grow(of map[string]kinds, path string, k kinds) {
	if of[path]|k != of[path] {
		of[path] |= k
		in.changed = true
	}
}

// body takes in the expressions of b, and gives its variables what they are. The
// compiler has put them into an order in which each is bound before it is used.
func (in *inference) body(b ast.Body, vars map[ast.Var]kinds) {
	for _, e := range b {
		in.closures(e, vars)
		switch terms := e.Terms.(type) {
		case *ast.Every:
			in.bind(terms.Value, in.element(terms.Domain, vars), vars)
			if terms.Key != nil {
				in.bind(terms.Key, isOther, vars)
			}
			in.body(terms.Body, vars)
		case *ast.Not:
			in.body(terms.Body, vars)
		case []*ast.Term:
			in.call(e, terms[0], terms[1:], vars)
		}
		ast.WalkTerms(e, func(t *ast.Term) bool { // functions within functions
			if call, ok := t.Value.(ast.Call); ok {
				in.call(e, call[0], call[1:], vars)
			}
			return false
		})
	}
}

// closures takes in the comprehensions of e.
func (in *inference) closures(e *ast.Expr, vars map[ast.Var]kinds) {
	ast.WalkClosures(e, func(x any) bool {
		switch x := x.(type) {
		case *ast.ArrayComprehension:
			in.body(x.Body, vars)
		case *ast.SetComprehension:
			in.body(x.Body, vars)
		case *ast.ObjectComprehension:
			in.body(x.Body, vars)
		}
		return false
	})
}

// bind gives the variables of t, if it is one or an array of them, a kind.
func (in *inference) bind(t *ast.Term, k kinds, vars map[ast.Var]kinds) {
	switch v := t.Value.(type) {
	case ast.Var:
		vars[v] |= k
	case *ast.Array:
		within := isOther
		if k == isList {
			within = isText
		}
		v.Foreach(func(t *ast.Term) { in.bind(t, within, vars) })
	case ast.Object, ast.Set:
		ast.WalkVars(v, func(v ast.Var) bool { vars[v] |= isOther; return false })
	}
}

func (in *inference) call(e *ast.Expr, operator *ast.Term, args []*ast.Term, vars map[ast.Var]kinds) {
	name := operator.Value.String()
	ref, _ := operator.Value.(ast.Ref)
	switch {
	case name == "eq" || name == "equal" || name == "assign":
		in.bind(args[0], in.kind(args[1], vars), vars)
		in.bind(args[1], in.kind(args[0], vars), vars)
	case ref.HasPrefix(ast.DefaultRootRef):
		in.pass(ref, args, vars)
	case neverFail[name]:
		in.result(args, ast.BuiltinMap[name].Decl.Arity(), isOther, vars)
	default:
		in.function(e, name, args, vars)
	}
}

// pass gives the arguments of a rule their kinds, and its result.
func (in *inference) pass(ref ast.Ref, args []*ast.Term, vars map[ast.Var]kinds) {
	rules := in.compiler.GetRulesExact(ref)
	if len(rules) == 0 {
		return
	}
	path, n := pathOf(rules[0]), len(rules[0].Head.Args)
	if in.args[path] == nil {
		in.args[path] = make([]kinds, n)
	}
	for i := range min(n, len(args)) {
		if k := in.kind(args[i], vars); in.args[path][i]|k != in.args[path][i] {
			in.args[path][i] |= k
			in.changed = true
		}
	}
	in.result(args, n, in.values[path], vars)
}

// function is a call of a function that may fail.
func (in *inference) function(e *ast.Expr, name string, args []*ast.Term, vars map[ast.Var]kinds) {
	b := ast.BuiltinMap[name]
	n := len(args)
	if b != nil {
		n = min(n, b.Decl.Arity())
	}
	f, known := take[name]
	fits, constant := known && n == len(f.args), true
	for i, arg := range args[:n] {
		k := in.kind(arg, vars)
		constant = constant && (k == isKnown || ast.IsConstant(arg.Value))
		fits = fits && k != 0 && k&^f.args[i] == 0
	}
	switch {
	case constant:
		in.result(args, n, isKnown, vars)
		return
	case name == "regex.match" && n == 2 && in.kind(args[1], vars) == isText, name == "strings.any_prefix_match" && n == 2, name == "strings.any_suffix_match" && n == 2:
		fits = in.constantTexts(name, args, vars)
	}
	if !fits && in.checking && in.failing == nil {
		in.failing = notNative(e.Loc(), "%s could fail, which OPA makes an error", name)
	}
	gives := f.gives
	if gives == 0 {
		gives = isOther
	}
	in.result(args, n, gives, vars)
}

// constantTexts says whether the constant argument of a function that takes one is
// such that it cannot fail.
func (in *inference) constantTexts(name string, args []*ast.Term, vars map[ast.Var]kinds) bool {
	if name == "regex.match" {
		_, ok := args[0].Value.(ast.String) // partial evaluation would not take a bad one
		return ok
	}
	items, ok := constants(args[1].Value)
	for _, item := range items {
		_, isString := item.Value.(ast.String)
		ok = ok && isString
	}
	return ok && in.kind(args[0], vars) == isText
}

// result binds the answer of a function with n arguments, where it is asked for.
func (in *inference) result(args []*ast.Term, n int, k kinds, vars map[ast.Var]kinds) {
	if len(args) > n {
		in.bind(args[n], k, vars)
	}
}

// kind is what t can be; 0 while nothing is known of it.
func (in *inference) kind(t *ast.Term, vars map[ast.Var]kinds) kinds {
	switch v := t.Value.(type) {
	case ast.String:
		return isText
	case ast.Var:
		return vars[v]
	case ast.Ref:
		return in.ref(v, vars)
	case ast.Call:
		name := v[0].Value.String()
		if f, ok := take[name]; ok {
			return f.gives
		}
		return isOther
	case *ast.Array, ast.Object, ast.Set:
		if ast.IsConstant(v) {
			return isKnown
		}
		return isOther
	case *ast.ArrayComprehension, *ast.SetComprehension, *ast.ObjectComprehension:
		return isOther
	}
	return isKnown // a number, boolean or null
}

// element is what the elements of t can be.
func (in *inference) element(t *ast.Term, vars map[ast.Var]kinds) kinds {
	switch k := in.kind(t, vars); k {
	case 0, isKnown:
		return k
	case isList:
		return isText
	}
	return isOther
}

func (in *inference) ref(ref ast.Ref, vars map[ast.Var]kinds) kinds {
	switch head := ref[0]; {
	case head.Equal(ast.InputRootDocument):
		return kindOfInput(ref)
	case head.Equal(ast.DefaultRootDocument):
		return in.data(ref)
	default:
		v, ok := head.Value.(ast.Var)
		if !ok {
			return isOther
		}
		switch k := vars[v]; {
		case k == 0, k == isKnown:
			return k
		case k == isList && len(ref) == 2:
			return isText
		}
		return isOther
	}
}

// data is a value of data: of a rule, or one that no call changes.
func (in *inference) data(ref ast.Ref) kinds {
	rules := in.compiler.GetRulesDynamicWithOpts(ref, ast.RulesOptions{IncludeHiddenModules: true})
	depends := false
	for _, rule := range rules {
		depends = depends || in.depends[rule]
	}
	if !depends {
		return isKnown
	}
	if place, ok := placeOfInput(rules, ref); ok {
		return kindOfInput(place)
	}
	path := pathOf(rules[0])
	for _, rule := range rules[1:] {
		if pathOf(rule) != path {
			return isOther
		}
	}
	switch whole := ast.MustParseRef(path); {
	case rules[0].Head.RuleKind() == ast.MultiValue && len(ref) == len(whole)+1:
		return in.members[path]
	case rules[0].Head.RuleKind() == ast.MultiValue:
		return isOther
	case len(ref) == len(whole):
		return in.values[path]
	case len(ref) == len(whole)+1 && in.values[path] == isList:
		return isText
	case in.values[path] == isKnown:
		return isKnown
	case in.values[path] == 0:
		return 0
	}
	return isOther
}

// placeOfInput is the part of the input that ref stands for, where it names a rule
// that does nothing but name one: headers := input.attributes.request.http.headers.
func placeOfInput(rules []*ast.Rule, ref ast.Ref) (ast.Ref, bool) {
	whole := ast.MustParseRef(pathOf(rules[0]))
	if len(rules) > 1 || rules[0].Default || len(rules[0].Head.Args) > 0 || len(rules[0].Body) != 1 || !ref.HasPrefix(whole) {
		return nil, false
	}
	e := rules[0].Body[0]
	terms, ok := e.Terms.([]*ast.Term)
	if !ok || len(terms) != 3 || e.Negated || len(e.With) > 0 || !e.IsEquality() || !terms[1].Equal(rules[0].Head.Value) {
		return nil, false
	}
	place, ok := terms[2].Value.(ast.Ref)
	return append(place.Copy(), ref[len(whole):]...), ok && place.HasPrefix(ast.InputRootRef) && place.IsGround()
}

// kindOfInput is what the part of the input that ref names is, whatever the call.
func kindOfInput(ref ast.Ref) kinds {
	path := ref.String()
	if _, ok := fieldsOfInput[path]; ok {
		return isText
	}
	switch path {
	case "input.attributes.destination.principal", "input.spiffe.destination.id", "input.spiffe.destination.trust_domain", "input.spiffe.destination.path":
		return isText
	case "input.parsed_path":
		return isList
	}
	for prefix, k := range map[string][2]kinds{
		"input.parsed_path": {isText, isOther}, "input.attributes.request.http.headers": {isText, isOther},
		"input.attributes.request.http.headers_all": {isList, isText}, "input.parsed_query": {isList, isText},
	} {
		whole := ast.MustParseRef(prefix)
		if below := len(ref) - len(whole); ref.HasPrefix(whole) && (below == 1 || below == 2) {
			return k[below-1]
		}
	}
	return isOther
}
