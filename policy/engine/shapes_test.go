// What partial evaluation could lose or make true, for the policies that
// differential_test.go writes: names for names, functions of what a call lacks,
// "every" and "not" around them, tables, and values made of parts of a call.

package engine

import (
	"fmt"
	"strings"

	"merlon.dev/policy"
)

// shape is a condition of several lines, with the rules that it needs.
func (w *writer) shape(depth int) string {
	if w.v2 && w.IntN(3) == 0 {
		return w.logical(depth)
	}
	switch w.IntN(13) {
	case 0:
		return w.textOfAlias() + " " + w.one("==", "==", "!=", "<") + " " + w.one(w.textOfAlias(), w.text(), w.constant())
	case 1:
		return w.function(depth)
	case 2:
		return w.every(depth)
	case 3:
		return w.members(depth)
	case 4:
		return w.rows(depth)
	case 5:
		return w.boolean(depth)
	case 6:
		return w.byDefault()
	case 7:
		return w.literal(depth)
	case 8:
		return w.apart(depth)
	case 9:
		return w.chain(depth)
	case 10:
		return w.elseChain(depth)
	case 11:
		return w.byKey(depth)
	}
	return w.negated(depth)
}

// rule adds one to the policy.
func (w *writer) rule(format string, args ...any) {
	w.helpers = append(w.helpers, fmt.Sprintf(format, args...)+"\n")
}

func (w *writer) name(prefix string) string { return fmt.Sprintf("%s%d_", prefix, w.next()) }

// textOfAlias is a part of the call by a name of a name for something that it is in.
func (w *writer) textOfAlias() string {
	object, member, _ := strings.Cut(w.one("input.attributes.request.http.headers accept", "input.attributes.request.http.headers b", "input.attributes.request.http.headers x-a",
		"input.attributes.request.http method", "input.attributes.request http.headers.accept", "input.spiffe.source path", "input.parsed_query a[0]", "input.parsed_path 1",
		"input.attributes.request.http.headers_all x-a[0]", "input.spiffe.destination path"), " ")
	name := w.name("alias")
	w.rule("%s := %s", name, object)
	for range w.IntN(3) {
		further := w.name("alias")
		w.rule("%s := %s", further, name)
		name = further
	}
	switch {
	case member == "1":
		return name + "[1]"
	case strings.HasPrefix(member, "x-a"):
		return name + `["x-a"]` + strings.TrimPrefix(member, "x-a")
	}
	return name + "." + member
}

// side is one side of a comparison, often of what may be missing.
func (w *writer) side() string {
	switch w.IntN(4) {
	case 0:
		return w.textOfAlias()
	case 1:
		return w.constant()
	}
	return w.one("input.attributes.request.http.headers.accept", "input.attributes.request.http.headers.accept", "input.attributes.request.http.headers.b",
		"input.parsed_path[1]", "input.attributes.request.http.method", "input.parsed_query.a[0]", w.text())
}

// function asks one that is given parts of the call.
func (w *writer) function(int) string {
	f := w.name("f")
	not := w.one("", "", "not ")
	switch w.IntN(8) {
	case 0:
		w.rule("%s(_) if %s == %s", f, w.side(), w.side())
		return not + fmt.Sprintf("%s(%s)", f, w.side())
	case 1:
		w.rule("%s(_) := true", f)
		return not + fmt.Sprintf("%s(%s)", f, w.side())
	case 2:
		w.rule("%s(x, y) if x == y", f)
		return not + fmt.Sprintf("%s(%s, %s)", f, w.side(), w.side())
	case 3:
		w.rule("%s(x, y) if {\n\tz := x\n\tz %s y\n}", f, w.one("==", "!=", "<", "in ["+w.constant()+"]\n\tx =="))
		return not + fmt.Sprintf("%s(%s, %s)", f, w.side(), w.side())
	case 4:
		w.rule("%s(x) if {\n\tp := split(x, %q)\n\tp[%d] == %s\n}", f, w.one(" ", "/", ","), w.IntN(2), w.side())
		return not + fmt.Sprintf("%s(%s)", f, w.side())
	case 5:
		g := w.name("g")
		w.rule("%s(x) := %s", g, w.one("x", "lower(x)", "upper(x)", "split(x, \" \")[0]"))
		w.rule("%s(x) := %s(x)", f, g)
		return fmt.Sprintf("%s%s(%s) %s %s", not, f, w.side(), w.one("==", "!="), w.side())
	case 6:
		w.rule("default %s(_) := %s", f, w.one("false", "true", `"a"`))
		w.rule("%s(x) := %s if x == %s", f, w.one("true", `"a"`, `"b"`, "false"), w.constant())
		return not + fmt.Sprintf("%s(%s)%s", f, w.side(), w.one("", ` == "a"`, " == true"))
	}
	w.rule("%s(%s) := %s", f, w.constant(), w.one("1", "true", "false"))
	w.rule("%s(%s) := %s", f, w.constant(), w.one("1", "true", "true"))
	return not + fmt.Sprintf("%s(%s)%s", f, w.side(), w.one("", "", " == 1", " == true"))
}

// every is one over what is known or not, with a body that may need what is missing.
func (w *writer) every(depth int) string {
	e, k := w.name("e"), w.name("k")
	body := w.one(
		fmt.Sprintf("%s != %s", e, w.side()), fmt.Sprintf("%s == %s", e, w.side()), fmt.Sprintf("not %s == %s", w.constant(), e),
		fmt.Sprintf("l := %s\n\tl != %s", w.side(), e), fmt.Sprintf("startswith(%s, %s)", w.side(), w.constant()), fmt.Sprintf("not startswith(%s, %s)", w.side(), w.constant()),
		fmt.Sprintf("l := %s\n\tnot l == %s", w.side(), w.side()), fmt.Sprintf("%s in {%s, %s}", e, w.constant(), w.constant()),
		fmt.Sprintf("every i%d in [%s, %s] { %s != i%d; %s != %s }", depth, w.constant(), w.constant(), e, depth, w.side(), e),
	)
	over := w.one(`["a", "b"]`, `{"a", "GET"}`, "[]", w.list(), w.list(), `data.authz.table.by[input.attributes.destination.principal]`, "data.authz.table.names")
	if w.IntN(4) == 0 {
		body = fmt.Sprintf("input.attributes.request.http.headers[%s] %s %s", k, w.one("==", "!="), e)
		over = fmt.Sprintf("{\"accept\": %s, \"b\": %s}", w.constant(), w.constant())
		return fmt.Sprintf("every %s, %s in %s {\n\t%s\n}", k, e, over, body)
	}
	if w.IntN(3) == 0 {
		all := w.name("all")
		w.rule("%s if every %s in %s {\n\t%s\n}", all, e, over, body)
		return "not " + all
	}
	if w.IntN(3) == 0 {
		l := w.name("l")
		return fmt.Sprintf("%s := %s\n\tevery %s in %s {\n\t%s\n}", l, over, e, l, body)
	}
	return fmt.Sprintf("every %s in %s {\n\t%s\n}", e, over, body)
}

// members asks a set that a call may have a part in.
func (w *writer) members(depth int) string {
	s := w.name("s")
	for range w.IntN(2) + 1 {
		switch w.IntN(4) {
		case 0:
			w.rule("%s contains %s", s, w.side())
		case 1:
			w.rule("%s contains x if some x in %s", s, w.one(w.list(), `["a", "b", "GET"]`))
		case 2:
			w.rule("%s contains [%s, %s]", s, w.side(), w.side())
		default:
			w.rule("%s contains %s if %s", s, w.side(), w.body(depth+1))
		}
	}
	switch w.IntN(5) {
	case 0:
		return fmt.Sprintf("not %s[%s]", s, w.side())
	case 1:
		return fmt.Sprintf("%s in %s", w.side(), s)
	case 2:
		return fmt.Sprintf("%s[[%s, %s]]", s, w.side(), w.side())
	case 3:
		return fmt.Sprintf("some x%d in %s\n\tx%d == %s", depth, s, depth, w.side())
	}
	return fmt.Sprintf("%s[%s]", s, w.side())
}

// rows looks a table up by parts of the call, some of whose fields are absent.
func (w *writer) rows(depth int) string {
	table, r := w.name("rows"), w.name("r")
	w.rule("%s := [{\"h\": %s, \"m\": \"GET\"}, {\"h\": \"b\"}, {\"h\": %s, \"m\": %s, \"n\": false}]", table, w.constant(), w.constant(), w.constant())
	lines := []string{fmt.Sprintf("some %s in %s", r, table)}
	for range w.IntN(3) + 1 {
		lines = append(lines, w.one(
			r+".h == "+w.side(), r+".m == "+w.side(), "not "+r+".m", "not "+r+".n", r+".m != "+w.side(), "startswith(input.attributes.request.http.path, "+w.constant()+")",
			w.side()+" in {"+r+".h, \"a\"}", "not "+w.side()+" in ["+r+".h]",
		))
	}
	if w.IntN(2) == 0 {
		return strings.Join(lines, "\n\t")
	}
	h := w.name("found")
	w.rule("%s if {\n\t%s\n}", h, strings.Join(lines, "\n\t"))
	return w.one("", "not ") + h
}

// boolean makes a value of a comparison, and asks that.
func (w *writer) boolean(depth int) string {
	b := w.name("b")
	value := w.one(
		fmt.Sprintf("%s %s %s", w.side(), w.one("==", "!=", "<", ">="), w.side()), fmt.Sprintf("%s(%s, %s)", w.one("startswith", "endswith", "contains"), w.text(), w.constant()),
		fmt.Sprintf("%s in {%s, %s}", w.side(), w.constant(), w.constant()), "input.attributes.destination.principal == \"spiffe://a.test/orders\"", "regex.match(`^/`, "+w.text()+")",
	)
	use := w.one(b, "not "+b, b+" == false", b+" == true", b+" != true", fmt.Sprintf("%s == (%s == %s)", b, w.side(), w.side()))
	if w.IntN(2) == 0 {
		return fmt.Sprintf("%s := %s\n\t%s", b, value, use)
	}
	if w.IntN(4) == 0 {
		w.rule("default %s := %s", b, w.one("true", "false"))
		w.rule("%s := %s if %s == %s", b, w.one("true", "false"), w.side(), w.constant())
		return use
	}
	w.rule("%s := %s", b, value)
	return use
}

// byDefault asks what has a value also where the call lacks it.
func (w *writer) byDefault() string {
	d := w.name("d")
	w.rule("default %s := %s", d, w.constant())
	w.rule("%s := %s", d, w.side())
	return w.one("", "", "not ") + fmt.Sprintf("%s %s %s", d, w.one("==", "!="), w.side())
}

// literal makes a value of parts of the call, and takes one out of it again.
func (w *writer) literal(depth int) string {
	o := w.name("o")
	value, part := fmt.Sprintf("{\"a\": %s, \"m\": %s}", w.side(), w.side()), o+w.one(".a", ".m", `["a"]`)
	switch w.IntN(4) {
	case 0:
		value, part = fmt.Sprintf("[%s, %s]", w.side(), w.side()), o+w.one("[0]", "[1]", "[_]")
	case 1:
		w.rule("%s.a := %s if %s", o, w.side(), w.body(depth+1))
		w.rule("%s.b := %s", o, w.side())
		return w.one("not ", "", "") + fmt.Sprintf("%s%s%s", o, w.one(".a", ".b", "["+w.side()+"]"), w.one("", " == "+w.side()))
	}
	use := w.one(part, part, "not "+o+w.one(".a", "[0]")) + w.one("", " == "+w.side(), " != "+w.side())
	if w.IntN(2) == 0 {
		return fmt.Sprintf("%s := %s\n\t%s", o, value, use)
	}
	w.rule("%s := %s", o, value)
	return use
}

// apart takes an array or object apart.
func (w *writer) apart(depth int) string {
	x, y := w.name("x"), w.name("y")
	list := w.list()
	if w.IntN(3) == 0 {
		alias := w.name("list")
		w.rule("%s := %s", alias, list)
		list = alias
	}
	shape := w.one(fmt.Sprintf("[%s, %s]", x, y), fmt.Sprintf("[_, %s]\n\t%s := %s", x, y, w.side()), fmt.Sprintf("[%s, _]\n\t%s := %s", x, y, w.side()))
	array, more, _ := strings.Cut(shape, "\n")
	lines := fmt.Sprintf("%s = %s\n%s\n\t%s %s %s", array, list, more, w.one(x, "not "+x), w.one("==", "!="), w.one(y, y, w.side()))
	switch w.IntN(4) {
	case 0:
		return lines
	case 1:
		return fmt.Sprintf("{\"a\": %s} = {\"a\": %s}\n\t%s == %s", x, w.side(), x, w.side())
	}
	h := w.name("apart")
	w.rule("%s if {\n\t%s\n}", h, lines)
	return w.one("", "not ") + h
}

// chain gives several variables one value.
func (w *writer) chain(depth int) string {
	x, y, z := w.name("x"), w.name("y"), w.name("z")
	lines := []string{x + " = " + y, y + " = " + w.side(), z + " = " + w.one(x, w.side())}
	w.Shuffle(len(lines), func(i, j int) { lines[i], lines[j] = lines[j], lines[i] })
	lines = append(lines, w.one("not ", "", "")+fmt.Sprintf("%s %s %s", w.one(x, z), w.one("==", "!="), w.one(z, y, w.side())))
	if w.IntN(2) == 0 {
		return strings.Join(lines, "\n\t")
	}
	h := w.name("chain")
	w.rule("%s if {\n\t%s\n}", h, strings.Join(lines, "\n\t"))
	return w.one("", "not ") + h
}

// elseChain is for OPA.
func (w *writer) elseChain(depth int) string {
	e := w.name("else")
	w.rule("%s := %s if {\n\t%s == %s\n} else := %s if {\n\t%s\n} else := %s", e, w.constant(), w.side(), w.side(), w.side(), strings.SplitN(w.condition(9), "\n", 2)[0], w.constant())
	return w.one("", "not ") + e + " == " + w.side()
}

// byKey reads headers and tables by a variable that has known values.
func (w *writer) byKey(depth int) string {
	k := w.name("k")
	keys := w.one(`["accept", "b"]`, `{"accept", "x-a"}`, `["a"]`)
	of := w.one("input.attributes.request.http.headers", "input.attributes.request.http.headers_all", "input.parsed_query", "data.authz.table.flags", "data.authz.table.roles")
	if of == "input.parsed_query" || strings.HasSuffix(of, "_all") || strings.HasSuffix(of, "roles") {
		return fmt.Sprintf("some %s in %s\n\t%s%s[%s][0] == %s", k, keys, w.one("", "not "), of, k, w.side())
	}
	return fmt.Sprintf("some %s in %s\n\t%s%s[%s]%s", k, keys, w.one("", "not "), of, k, w.one("", " == "+w.side()))
}

// negated is a rule of several lines, asked whether it does not hold.
func (w *writer) negated(depth int) string {
	h := w.name("not")
	for range w.IntN(2) + 1 {
		w.rule("%s if %s", h, w.body(depth+1))
	}
	if w.IntN(2) == 0 {
		further := w.name("not")
		w.rule("%s if not %s", further, h)
		h = further
	}
	return "not " + h
}

// logical is what "import rego.v2" brings.
func (w *writer) logical(depth int) string {
	one := func() string { return strings.SplitN(w.condition(9), "\n", 2)[0] }
	switch w.IntN(4) {
	case 0:
		return fmt.Sprintf("not %s", strings.TrimSuffix(w.body(depth+1), "\n"))
	case 1:
		h := w.name("or")
		w.rule("%s if (%s) or (%s)", h, one(), one())
		return w.one("", "not ") + h
	case 2:
		return fmt.Sprintf("not { (%s) %s %s }", one(), w.one("and", "or"), w.helper(depth+1))
	}
	return fmt.Sprintf("(%s) %s not (%s)", one(), w.one("and", "or"), one())
}

// anyCall is one that may lack parts, or have strange ones.
func (w *writer) anyCall() *policy.Input {
	in := w.call()
	switch w.IntN(30) {
	case 0:
		in.Source = w.one("", "x", "spiffe://", "spiffe://a.test/")
	case 1:
		in.Protocol = policy.Protocol(w.one("", "udp", "HTTP"))
	case 2:
		in.Path = w.one("", "a", "/a//b", "/..", "/orders/%31", "/x.Y/")
	case 3:
		in.Method = ""
	case 4:
		in.Headers = policy.HeaderMap{"accept": {w.one("\xff", "ß", "İ", "true", "null", "1", "-0", "1.0")}, "b": {}, "": {"a"}, "X-A": {"a"}}
	case 5:
		in.SourceAddress = w.one("x", "10.0.0.1", "10.0.0.1:x", ":1")
	case 6:
		in.Query = w.one("a=", "A=a", "&&", "%61=b", "a[]=a", "a=a;b")
	case 7, 8, 9, 10:
		in.Path, in.Headers = w.one("/a/a", "/web/web", "/a/b", "/orders/a"), policy.HeaderMap{}
		for _, name := range []string{"accept", "b", "x-a"} {
			if w.IntN(2) == 0 {
				in.HeaderMap()[name] = []string{w.one("a", "b", "web", "orders", "GET")}
			}
		}
	}
	return in
}
