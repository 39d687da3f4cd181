// Programs against OPA: generated policies, inside and outside of what a program
// can hold, on generated calls. DIFFERENTIAL=n tries n pairs of a policy and a
// call; see `make differential`.

package engine

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"merlon.dev/policy"
	"merlon.dev/policy/program"
)

// writer makes policies. Its choices are few enough that calls meet them.
type writer struct {
	*rand.Rand
	helpers []string
	names   int
	v2      bool // as "import rego.v2" has it: "and", "or", and bodies behind "not"
}

func (w *writer) one(of ...string) string { return of[w.IntN(len(of))] }

// texts, lists and constants that a call can have and be compared with.
func (w *writer) text() string {
	if w.IntN(14) == 0 {
		return w.value()
	}
	return w.one("input.attributes.source.principal", "input.spiffe.source.id", "input.spiffe.source.trust_domain", "input.spiffe.source.path",
		"input.attributes.request.http.method", "input.attributes.request.http.path", "input.attributes.request.http.host",
		"input.protocol", "input.grpc.service", "input.grpc.method", `input.attributes.request.http.headers["x-a"]`, "input.attributes.request.http.headers.accept",
		"input.parsed_path[0]", "input.parsed_path[1]", "input.parsed_query.a[0]", `input.attributes.request.http.headers_all["x-a"][1]`,
		"lower(input.attributes.request.http.host)", "upper(input.attributes.request.http.method)", "input.attributes.destination.principal",
		"input.spiffe.destination.trust_domain", "input.spiffe.destination.path", `split(input.attributes.request.http.headers["x-a"], " ")[1]`)
}

// value writes a rule or function whose value is a text, and is how it is asked for.
func (w *writer) value() string {
	name := fmt.Sprintf("v%d", w.next())
	asks, rule := name, ""
	switch w.IntN(6) {
	case 0:
		rule = fmt.Sprintf("%s := %s\n", name, w.text())
	case 4:
		object, member, _ := strings.Cut(w.one("input.attributes.request.http.headers accept", "input.attributes.request.http.headers b",
			"input.attributes.request.http method", "input.attributes.request http.host", "input.spiffe.source path", "input.parsed_query a[0]"), " ")
		asks, rule = name+"."+member, fmt.Sprintf("%s := %s\n", name, object)
	case 1:
		rule = fmt.Sprintf("%s := %s if %s\n", name, w.text(), w.text())
	case 2:
		asks = fmt.Sprintf("%s(%s)", name, w.text())
		rule = fmt.Sprintf("%s(x) := x\n", name)
	case 3:
		asks = fmt.Sprintf("%s(%s)", name, w.list())
		rule = fmt.Sprintf("%s(x) := y if [_, y] = x\n", name)
	default:
		rule = fmt.Sprintf("%s := x if [x, _] = %s\n", name, w.list())
	}
	w.helpers = append(w.helpers, rule)
	return asks
}

func (w *writer) list() string {
	return w.one("input.parsed_path", "input.parsed_query.a", `input.attributes.request.http.headers_all["x-a"]`, `input.parsed_query["b"]`,
		`split(input.attributes.request.http.path, "/")`)
}

var (
	callSources = []string{"spiffe://a.test/web", "spiffe://a.test/ns/x/cart", "spiffe://b.test/web", "spiffe://a.test"}
	callTargets = []string{"spiffe://a.test/orders", "spiffe://a.test/ns/x/db", "spiffe://b.test/orders"}
	callPaths   = []string{"/", "/orders", "/orders/1", "/a/b", "/x.Y/Get", "/x.Y/List", "/web", "/a/b/c", "/Orders/", "/caf%C3%A9"}
	callHosts   = []string{"orders", "Orders", "", "a.test"}
	callValues  = []string{"a", "b", "Bearer a", "a b", "", "GET", "web", "a,b", "/web"}
	callQueries = []string{"", "a=a", "a=b&a=a", "b=%61&a=1", "a", "a=%zz&b=b", "a=a;b=b", "a+=b"}
)

func (w *writer) constant() string {
	return strconv.Quote(w.one(
		w.one(callSources...), w.one(callTargets...), w.one(callPaths...), w.one(callHosts...), w.one(callValues...), w.one(callValues...),
		"http", "grpc", "tcp", "GET", "POST", "x.Y", "Get", "a.test", "/web", "orders", "/orders", "ORDERS",
	))
}

func (w *writer) set() string {
	items := make([]string, w.IntN(3)+1)
	for i := range items {
		items[i] = w.constant()
	}
	if w.IntN(6) == 0 {
		items = append(items, "1", "true")
	}
	all := strings.Join(items, ", ")
	return w.one("{"+all+"}", "["+all+"]", "data.authz.table.names", "data.authz.table.by[input.attributes.destination.principal]")
}

// condition is one line of a body.
func (w *writer) condition(depth int) string {
	switch n := w.IntN(36); {
	case n < 6:
		return fmt.Sprintf("%s %s %s", w.text(), w.one("==", "==", "!=", "<", ">=", "<=", ">"), w.either())
	case n < 8:
		return fmt.Sprintf("%s(%s, %s)", w.one("startswith", "endswith", "contains"), w.text(), w.either())
	case n < 10:
		return fmt.Sprintf("%s in %s", w.text(), w.set())
	case n < 11:
		return fmt.Sprintf("%s in %s", w.either(), w.list())
	case n < 12:
		return fmt.Sprintf("regex.match(`%s`, %s)", w.one("^/orders", "[a-z]+$", "^spiffe://a", "b"), w.text())
	case n < 13:
		return fmt.Sprintf("count(%s) %s %d", w.list(), w.one("==", "!=", "<", "<=", ">", ">="), w.IntN(4))
	case n < 14:
		return fmt.Sprintf("some v%d in %s\n\tv%d %s %s", depth, w.list(), depth, w.one("==", "!="), w.either())
	case n < 15 && depth < 3:
		return fmt.Sprintf("every e%d in %s { e%d != %s }", depth, w.list(), depth, w.either())
	case n < 16 && depth < 3:
		return "not " + w.helper(depth+1)
	case n < 17 && depth < 3:
		return w.helper(depth + 1)
	case n < 18:
		return "not " + strings.SplitN(w.condition(9), "\n", 2)[0]
	case n < 19:
		return fmt.Sprintf("some r in data.authz.table.roles[%s]\n\tr == %s", w.text(), w.one(`"admin"`, `"user"`, w.text()))
	case n < 20:
		return fmt.Sprintf("data.authz.table.flags[%s]", w.one("input.attributes.destination.principal", w.text()))
	case n < 21:
		return fmt.Sprintf("x%d := %s\n\tx%d == %s", w.next(), w.text(), w.names, w.either())
	case n < 22 && w.IntN(2) == 0:
		return fmt.Sprintf("[%s, p%d_] = %s\n\tp%d_ %s %s", w.one("_", `"orders"`, `"a"`), depth, w.list(), depth, w.one("==", "!="), w.either())
	case n < 22:
		return fmt.Sprintf("%s[_] == %s", w.list(), w.either())
	case n < 23:
		return w.text()
	case n < 35 && depth < 3:
		return w.shape(depth)
	}
	return w.rare()
}

// rare conditions are outside of what programs hold, or at its edge.
func (w *writer) rare() string {
	return w.one(
		"time.now_ns() > 0", "input.attributes.request.http == input.attributes.request.http", "count(input.attributes.request.http.headers) > 1",
		"sprintf(\"%s\", [input.protocol]) == \"http\"", "object.get(input.attributes, \"x\", 1) == 1", "input.parsed_body == null", "input.truncated_body == false", "not input.attributes.request.http.headers", "input.parsed_query",
		`{p | some p in input.parsed_path} == {"a", "b"}`, "input.nothing", "not input.nothing", "some k, v in input.attributes.request.http.headers\n\tk == v",
		"to_number(input.attributes.request.http.host) == 1", "input.attributes.source.address.socketAddress.portValue == 1",
		"true", "false", "1 == 1", "input.protocol == 1", "input.protocol != 1", "some i\n\tinput.parsed_path[i] == \"a\"\n\tinput.parsed_path[i+1] == \"b\"",
		"input.merlon", "startswith(input.parsed_path, \"a\")", "trim_prefix(input.attributes.request.http.path, \"/\") == \"a\"",
		"strings.any_prefix_match(input.attributes.request.http.path, [\"/a\", \"/orders\"])", "input.attributes.destination.address.socketAddress.portValue == 1",
		`input.parsed_path == ["orders", "1"]`, `input.parsed_path = ["a", x]; x == "b"`, `["orders", _] = input.parsed_path`, `input.parsed_path == ["orders", 1]`,
		`input.parsed_path != ["a"]`, `[input.protocol, "a"] == ["http", "a"]`, `input.parsed_query.a == ["a"]`, `split(input.attributes.request.http.path, "/") = ["", a, b]; a != b`,
		`walk(input.parsed_path, [_, "a"])`, "input.attributes.destination == input.attributes.source")
}

func (w *writer) either() string {
	if w.IntN(4) == 0 {
		return w.text()
	}
	return w.constant()
}

func (w *writer) next() int { w.names++; return w.names }

func (w *writer) body(depth int) string {
	lines := make([]string, w.IntN(3)+1)
	for i := range lines {
		lines[i] = "\t" + w.condition(depth)
	}
	return "{\n" + strings.Join(lines, "\n") + "\n}\n"
}

// helper writes a rule or function, and is the condition that asks it.
func (w *writer) helper(depth int) string {
	name := fmt.Sprintf("h%d", w.next())
	var asks, rule string
	switch w.IntN(6) {
	case 0, 1, 2:
		asks = name
		for range w.IntN(2) + 1 {
			rule += name + " if " + w.body(depth)
		}
	case 3:
		asks = fmt.Sprintf("%s(%s)", name, w.text())
		rule = fmt.Sprintf("%s(x) if x == %s\n\n%s(x) if startswith(x, %s)\n", name, w.constant(), name, w.constant())
	case 4:
		asks = fmt.Sprintf("%s == %s", name, w.constant())
		rule = fmt.Sprintf("%s := %s if %s", name, w.either(), w.body(depth))
		if w.IntN(2) == 0 {
			rule += fmt.Sprintf("%s := %s if %s", name, w.constant(), w.body(depth))
		}
		if w.IntN(3) == 0 {
			rule += fmt.Sprintf("default %s := %s\n", name, w.constant())
		}
	default:
		asks = fmt.Sprintf("%s in %s", w.text(), name)
		rule = fmt.Sprintf("%s contains %s if %s", name, w.either(), w.body(depth))
	}
	if w.IntN(4) == 0 && asks == name {
		rule += "default " + name + " := false\n"
	}
	w.helpers = append(w.helpers, rule)
	return asks
}

func (w *writer) module() string {
	var b strings.Builder
	b.WriteString("package authz\n\n")
	if w.v2 = w.IntN(6) == 0; w.v2 {
		b.WriteString("import rego.v2\n\n")
	}
	if w.IntN(2) == 0 {
		b.WriteString("default allow := false\n\n")
	}
	if w.IntN(5) == 0 {
		return w.objects() + strings.Join(w.helpers, "\n")
	}
	for range w.IntN(3) {
		fmt.Fprintf(&b, "allow if %s\n", w.body(0))
	}
	for range w.IntN(3) {
		fmt.Fprintf(&b, "deny if %s\n", w.body(0))
	}
	if w.IntN(20) == 0 {
		fmt.Fprintf(&b, "allow := %s if %s\n", w.one("false", `"yes"`, `{"allowed": true}`), w.body(0))
	}
	b.WriteString(strings.Join(w.helpers, "\n"))
	return b.String()
}

// objects writes a policy of opa-envoy-plugin's kind.
func (w *writer) objects() string {
	var b strings.Builder
	fmt.Fprintf(&b, "package %s\n\n", w.one("authz", "envoy.authz"))
	if w.IntN(3) > 0 {
		fmt.Fprintf(&b, "default allow := %s\n\n", w.one("false", `{"allowed": false, "http_status": 401, "body": "no"}`, `{"allowed": false, "http_status": 404, "headers": {"x-a": "1"}}`, `{"allowed": false}`))
	}
	if w.IntN(3) == 0 {
		fmt.Fprintf(&b, "deny if %s\n", w.body(0))
	}
	answers := []string{
		`{"allowed": true, "headers": {"x-a": "1", "x-b": ["2", "3"]}, "request_headers_to_remove": ["accept"]}`, `{"allowed": true}`, "true", "false",
		`{"allowed": false, "http_status": 404, "headers": {"x-a": "1"}}`, `{"allowed": true, "response_headers_to_add": {"x-c": "4"}, "dynamic_metadata": {"a": 1}}`,
		`{"allowed": input.protocol == "http"}`, `{"allowed": true, "headers": {"x-a": "a\nb"}}`,
	}
	if w.IntN(2) == 0 { // rules that exclude each other
		for _, method := range []string{"GET", "POST"} {
			fmt.Fprintf(&b, "allow := %s if {\n\tinput.attributes.request.http.method == %q\n%s\n", w.one(answers...), method, strings.TrimPrefix(w.body(0), "{\n"))
		}
		return b.String()
	}
	answer := w.one(answers...)
	for range w.IntN(2) + 1 {
		fmt.Fprintf(&b, "allow := response if {\n\tresponse := %s\n%s\n", answer, strings.TrimPrefix(w.body(0), "{\n"))
	}
	return b.String()
}

const tableModule = `package authz.table

names := {"GET", "orders", "a", "x.Y"}
by := {"spiffe://a.test/orders": ["spiffe://a.test/web", "GET"], "spiffe://a.test/ns/x/db": ["spiffe://b.test/web"]}
roles := {"spiffe://a.test/web": ["admin", "user"], "spiffe://b.test/web": ["user"], "a": ["admin"], "GET": ["a"], "orders": ["user"], "x.Y": ["admin"]}
flags := {"spiffe://a.test/orders": true, "spiffe://b.test/orders": false, "a": true, "GET": true}
`

func (w *writer) call() *policy.Input {
	in := &policy.Input{
		Source: w.one(callSources...), Destination: w.one(callTargets...),
		Protocol: policy.Protocol(w.one("http", "http", "http", "grpc", "tcp")), Method: w.one("GET", "POST", "get"), Path: w.one(callPaths...),
		Query: w.one(callQueries...), Host: w.one(callHosts...),
	}
	if w.IntN(3) > 0 {
		headers := policy.HeaderMap{}
		in.Headers = headers
		for _, name := range []string{"x-a", "accept", "b"} {
			if w.IntN(2) == 0 {
				continue
			}
			for range w.IntN(3) {
				headers[name] = append(headers[name], w.one(callValues...))
			}
		}
	}
	if w.IntN(3) == 0 {
		in.SourceAddress = w.one("10.0.0.1:1", "[::1]:2")
	}
	return in
}

// attempt is the program of one destination, or why there is none.
type attempt struct {
	program *program.Program
	err     error
}

// compareKept compares what is kept of OPA's decisions with OPA; 1 if something was.
func compareKept(t *testing.T, e *Engine, in *policy.Input, module string) (kept int) {
	t.Helper()
	if e.kept == nil {
		return 0
	}
	if _, ok := e.kept.Find(in, time.Now().UnixNano()); ok {
		kept = 1
	}
	d, a := e.decideKept(context.Background(), in)
	lazy := e.parts
	e.parts = allParts
	want, b := e.decideByOPA(context.Background(), in)
	e.parts = lazy
	if d.Allow != want.Allow || d.Reason != want.Reason || d.RuleID != want.RuleID || !d.Response.Equal(want.Response) || (a.err == nil) != (b.err == nil) {
		t.Fatalf("call %+v:\nOPA  %+v (%v)\nkept %+v (%v)\n%s", *in, want, b.err, d, a.err, module)
	}
	return kept
}

// calls is how many are made for each policy.
const calls = 80

// pairs is how many pairs are compared.
func pairs(t testing.TB) int {
	n := 3_500
	if text := os.Getenv("DIFFERENTIAL"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

func TestProgramsAnswerAsOPADoes(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("MERLON_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("MERLON_SEED=%d", seed)
	n, tried := pairs(t), 0
	native, byOPA, compared, allowed, failed, kept, responses := 0, map[string]int{}, 0, 0, 0, 0, 0
	for i := 0; compared < n && tried < 4*n; i++ {
		w := &writer{Rand: rand.New(rand.NewPCG(seed, uint64(i)))}
		module := w.module()
		e, err := New(context.Background(), Source{
			Modules: map[string]string{"a.rego": module, "table.rego": tableModule},
		})
		if err != nil {
			continue // what OPA refuses, unsafe variables above all
		}
		e.limit = time.Minute
		programs := map[string]*attempt{}
		for range calls {
			tried++
			in := w.anyCall()
			r := programs[in.Destination]
			if r == nil {
				r = &attempt{}
				if r.program, r.err = e.Program(context.Background(), in.Destination); r.err != nil {
					if strings.Contains(r.err.Error(), "the compiled form says") {
						t.Fatalf("%v\n%s", r.err, module)
					}
					_, reason, _ := strings.Cut(r.err.Error(), ": ")
					byOPA[reason]++
				} else {
					native++
				}
				programs[in.Destination] = r
			}
			if r.err != nil {
				kept += compareKept(t, e, in, module)
				// Another one that differs in what the policy may not read.
				other := w.anyCall()
				other.Source, other.Destination, other.Protocol, other.Method, other.Path = in.Source, in.Destination, in.Protocol, in.Method, in.Path
				kept += compareKept(t, e, other, module)
				continue
			}
			compared++
			d, a := e.decideByOPA(context.Background(), in)
			v := r.program.Decide(in, time.Now())
			if d.Allow {
				allowed++
			}
			if d.Reason == policy.Error {
				failed++
			}
			if v.Response != nil {
				responses++
			}
			if v.Allow() != d.Allow || v.Reason != d.Reason || v.RuleID != d.RuleID || !v.Response.Equal(d.Response) {
				src, _ := e.programSource(context.Background(), in.Destination)
				t.Fatalf("policy %d, call %+v:\nOPA     %+v (%v)\nprogram %+v\n%s\nallow %+v\ndeny %+v", i, *in, d, a.err, v, module, src.Allow, src.Deny)
			}
		}
	}
	t.Logf("%d pairs compared, %d allowed; %d programs, %d times OPA only", compared, allowed, native, len(byOPA))
	if testing.Verbose() {
		for reason, n := range byOPA {
			t.Logf("%5d %s", n, reason)
		}
	}
	t.Logf("%d decisions of OPA were kept, %d programs' answers were objects", kept, responses)
	if kept == 0 || responses == 0 && n > 50_000 || compared < n || allowed == 0 || allowed == compared {
		t.Errorf("of %d pairs %d were compared, %d allowed: too little is shown", tried, compared, allowed)
	}
}
