// What is compiled, what is not and why: each refusal keeps a difference between
// evaluation without a call and with one from deciding anything.

package engine

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy"
	"merlon.dev/policy/engine/residual"
	"merlon.dev/policy/grant"
	"merlon.dev/policy/program"
)

func TestWhatHasNoCompiledForm(t *testing.T) {
	tests := map[string]struct{ rego, why string }{
		"else":                                {"allow if input.protocol == \"http\" else := false if input.protocol == \"tcp\"", "a.rego:3: allow has an else"},
		"with":                                {"allow if data.authz.x with input.protocol as \"http\"\n\nx if input.protocol == \"http\"", `a.rego:3: "with" replaces what is asked`},
		"all of the input":                    {"allow if count(input) > 2", "a.rego:3: input is read as a whole, and part of it depends on the call"},
		"what is known and what not":          {"allow if count(input.attributes.destination) == 1", "input.attributes.destination is read as a whole"},
		"by a variable":                       {"allow if input.spiffe[x].path == \"/web\"", "input.spiffe is read as a whole"},
		"ours":                                {"allow if input.merlon.allow", "input.merlon.allow is read as a whole"},
		"a value that is no boolean":          {"allow := \"yes\" if input.protocol == \"http\"", "a.rego:3: allow is not always a constant: a boolean"},
		"true by default":                     {"default deny := true\n\ndeny := false if input.protocol == \"http\"", "a.rego:3: deny is true by default"},
		"true and false":                      {"allow if input.protocol == \"http\"\n\nallow := false if input.attributes.request.http.method == \"PUT\"", "a.rego:5: allow has one value by one rule and another by another"},
		"an argument taken apart":             {"allow if f(input.parsed_path)\n\nf([\"users\", id]) if id == who\n\nwho := input.attributes.request.http.headers.user", "a.rego:5: f takes an argument apart"},
		"an object that a call has a part in": {"allow := {\"allowed\": true, \"headers\": {\"x-who\": input.attributes.source.principal}}", "a.rego:3: allow is not always a constant"},
		"an object without allowed":           {"allow := {\"http_status\": 200} if input.protocol == \"http\"", "a.rego:3: allow is not always a constant"},
		"an object that allows by default":    {"default allow := {\"allowed\": true}", "a.rego:3: allow is true by default"},
		"an object of several rules":          {"allow.allowed := true if input.protocol == \"http\"", "a.rego:3: data.authz.allow is an object of several rules"},
		"an object for deny":                  {"deny := {\"allowed\": false} if input.protocol == \"http\"", "a.rego:3: deny is not always a constant"},
		"a status that is none":               {"allow := {\"allowed\": false, \"http_status\": 99} if input.protocol == \"http\"", "the object that data.authz.allow is: http_status 99 is none of 200 to 599"},
		"two objects":                         {"allow := {\"allowed\": true} if input.protocol == \"http\"\n\nallow := {\"allowed\": false} if input.attributes.request.http.method == \"GET\"", "allow has one value by one rule and another by another"},
		"two values":                          {"allow if x == 1\n\nx := 1 if input.protocol == \"http\"\n\nx := 2 if input.attributes.request.http.method == \"GET\"", "x could have several values"},
		"two values of one rule":              {"allow if x == \"a\"\n\nx := y if some y in input.parsed_path", "a.rego:5: x could have several values"},
		"two values of a function":            {"allow if f(input.protocol) == 1\n\nf(p) := 1 if p == \"http\"\n\nf(_) := 2 if input.attributes.request.http.method == \"GET\"", "f could have several values"},
		"an object":                           {"allow if x.a == 1\n\nx[k] := 1 if some k in input.parsed_path", "x is an object, whose values could disagree"},
		"one argument twice":                  {"allow if f(input.protocol, input.protocol)\n\nf(a, a) := true", "has one argument twice"},
		"a comparison negated":                {"allow if not input.protocol == input.attributes.request.http.host", "that two parts of the call are equal is negated"},
		"equality as a value":                 {"allow if (input.protocol == \"http\") == false", "a.rego:3: whether two things are equal is used as a value"},
		"an object of all that holds":         {"allow if {\n\tm := {k: v | some [k, v] in [[\"a\", 1], [\"a\", 2]]}\n\tnot m.a == 1\n}", "a.rego:4: an object is made of all that holds"},
		"what is true and false":              {"allow if not open(input.parsed_path[0])\n\ntable := {\"a\": true, \"b\": false, \"c\": true}\n\nopen(x) := table[x]", "a.rego:7: evaluation without a call fails here"},
		"and":                                 {"import rego.v2\n\nallow if input.protocol == \"http\" and not input.grpc", "a.rego:5: \"and\" and \"or\" have no native form"},
		"a name that could become another":    {"allow if {\n\tx1 = input.protocol\n\tx1 == \"http\"\n}", "a.rego:3: the name of variable x1 ends in a digit"},
		"a comprehension":                     {"allow if [1 | input.protocol == \"http\"] == [1]", "a.rego:3: a comprehension has no native form"},
		"itself":                              {"allow if input.attributes.request == input.attributes.request", "is compared with itself"},
		"the clock":                           {"allow if time.now_ns() > 1", "a.rego:3: time.now_ns has no native form"},
		"a number":                            {"allow if input.attributes.source.address.socketAddress.portValue == 1", "portValue has no native form"},
		"an error":                            {"allow if to_number(input.spiffe.destination.path) == 1", "a.rego:3: to_number could fail, which OPA makes an error"},
		"an error that a call decides":        {"allow if startswith(input.parsed_path, \"/a\")", "a.rego:3: startswith could fail, which OPA makes an error"},
		"an error behind a false line":        {"allow if {\n\tstartswith(input.parsed_path, \"/a\")\n\tinput.attributes.destination.principal == \"spiffe://shop.test/other\"\n}", "a.rego:4: startswith could fail"},
		"an error in a function":              {"allow if f(input.parsed_path)\n\nf(x) if startswith(x, \"/a\")\n\ndeny if f(input.protocol)", "a.rego:5: startswith could fail"},
		"an error in what is found":           {"allow if lower(x) == \"a\"\n\nx := input.attributes.source.address.socketAddress.portValue", "a.rego:3: lower could fail"},
		"a pattern from a call":               {"allow if regex.match(input.attributes.request.http.headers.x, input.attributes.request.http.path)", "a.rego:3: regex.match could fail"},
		"a large pattern":                     {"allow if regex.match(`(a?b?){200}c`, input.attributes.request.http.path)", "a.rego:3: the regular expression is too large"},
		"a place in a list":                   {"allow if {\n\tsome i\n\tinput.parsed_path[i] == \"a\"\n\ti > 0\n}", "the position in a list is used"},
		"names of headers":                    {"allow if {\n\tsome name, _ in input.attributes.request.http.headers\n\tname > \"x-\"\n}", "has no native form"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			e := load(t, nil, map[string]string{"a.rego": "package authz\n\n" + tt.rego + "\n"})
			p, err := e.Program(t.Context(), get("/").Destination)
			var why *residual.NotNative
			if p != nil || !errors.As(err, &why) || !strings.Contains(err.Error(), tt.why) {
				t.Errorf("Program = %v, %v; want %q", p, err, tt.why)
			}
			if _, err := e.Encoded(t.Context(), get("/").Destination); err == nil {
				t.Error("there is an encoded program")
			}
		})
	}
}

// Each of these decides by a program, as OPA does, in calls that tell.
func TestWhatHasACompiledForm(t *testing.T) {
	header := func(value string) func(*policy.Input) {
		return func(in *policy.Input) { in.Headers = policy.HeaderMap{"user": {value}} }
	}
	none := func(*policy.Input) {}
	tests := map[string]struct {
		rego string
		// calls that are allowed, and that are not
		allowed, denied []func(*policy.Input)
	}{
		"a condition that only a negation uses": {
			"allow if {\n\tuser := input.attributes.request.http.headers.user\n\tnot banned(user)\n}\n\nbanned(u) if u == \"eve\"",
			[]func(*policy.Input){header("ann")},
			[]func(*policy.Input){none, header("eve")},
		},
		"a condition that nothing uses": {
			"allow if {\n\t_ := input.attributes.request.http.headers.user\n}", []func(*policy.Input){header("")}, []func(*policy.Input){none},
		},
		"values that exclude each other": {
			"allow if verb == \"read\"\n\nverb := \"read\" if input.attributes.request.http.method == \"GET\"\n\nverb := \"write\" if input.attributes.request.http.method == \"POST\"",
			[]func(*policy.Input){none},
			[]func(*policy.Input){func(in *policy.Input) { in.Method = "POST" }, func(in *policy.Input) { in.Method = "PUT" }},
		},
		"data by destination and source": {
			"acl := {\"spiffe://shop.test/orders\": {\"spiffe://shop.test/web\", \"spiffe://shop.test/cart\"}, \"spiffe://shop.test/other\": {\"spiffe://shop.test/eve\"}}\n\n" +
				"allow if input.attributes.source.principal in acl[input.attributes.destination.principal]",
			[]func(*policy.Input){none},
			[]func(*policy.Input){func(in *policy.Input) { in.Source = "spiffe://shop.test/eve" }},
		},
		"a path taken apart, and compared by way of a rule": {
			"who := input.attributes.request.http.headers.user\n\nallow if {\n\t[\"users\", id] = input.parsed_path\n\tid == who\n}",
			[]func(*policy.Input){func(in *policy.Input) { in.Path = "/users/ann"; header("ann")(in) }},
			[]func(*policy.Input){func(in *policy.Input) { in.Path = "/users/ann"; header("eve")(in) }, func(in *policy.Input) { in.Path = "/users/ann" }},
		},
		"and by way of a function": {
			"own(id) if id == input.attributes.request.http.headers.user\n\nsame(x) := x\n\nallow if {\n\t[_, id] = split(input.attributes.request.http.path, \"/\")\n\town(same(id))\n}",
			[]func(*policy.Input){func(in *policy.Input) { in.Path = "/ann"; header("ann")(in) }},
			[]func(*policy.Input){func(in *policy.Input) { in.Path = "/ann"; header("eve")(in) }, func(in *policy.Input) { in.Path = "/ann/ann"; header("ann")(in) }},
		},
		"headers by another name": {
			"headers := input.attributes.request.http.headers\n\nallow if startswith(headers.user, \"an\")",
			[]func(*policy.Input){header("ann")},
			[]func(*policy.Input){none, header("eve"), func(in *policy.Input) { in.Protocol = policy.TCP }},
		},
		"a path taken apart": {
			"allow if {\n\tinput.parsed_path = [\"users\", id, \"posts\"]\n\tinput.attributes.request.http.headers.user == id\n}",
			[]func(*policy.Input){func(in *policy.Input) { in.Path = "/users/ann/posts"; header("ann")(in) }},
			[]func(*policy.Input){func(in *policy.Input) { in.Path = "/users/ann/posts/1"; header("ann")(in) }, func(in *policy.Input) { in.Path = "/users/ann/posts" }},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			e := load(t, nil, map[string]string{"a.rego": "package authz\n\n" + tt.rego + "\n"})
			p, err := e.Program(t.Context(), get("/").Destination)
			if err != nil {
				t.Fatal(err)
			}
			for want, changes := range map[bool][]func(*policy.Input){true: tt.allowed, false: tt.denied} {
				for i, change := range changes {
					in := get("/")
					change(in)
					v, d := p.Decide(in, e.now()), e.AuthorizeByOPA(t.Context(), in)
					if v.Allow() != want || d.Allow != want || v.Reason != d.Reason {
						t.Errorf("call %d of those with allow = %v: program %+v, OPA %+v", i, want, v, d)
					}
				}
			}
		})
	}
}

// A program is the same each time it is made: services are sent what has changed.
func TestProgramsAreTheSameEachTime(t *testing.T) {
	var rules strings.Builder
	for _, header := range []string{"a", "b", "c", "d", "e"} {
		for _, value := range []string{"1", "2", "3", "4"} {
			rules.WriteString("allow if {\n\tinput.attributes.request.http.headers." + header + " == \"" + value + "\"\n\tinput.attributes.request.http.method == \"" + value + "\"\n}\n")
		}
	}
	var first []byte
	for range 10 {
		e := load(t, nil, map[string]string{"a.rego": "package authz\n\n" + rules.String()})
		encoded, err := e.Encoded(t.Context(), get("/").Destination)
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = encoded
		}
		if !bytes.Equal(encoded, first) {
			t.Fatal("two programs of one policy differ")
		}
	}
}

// A bug that a policy finds is an error, of the policy alone.
func TestPanicsAreErrors(t *testing.T) {
	if _, err := compile(nil, func(*ast.Compiler) { panic("a bug") }); err == nil || err.Error() != "panic: a bug" {
		t.Errorf("compile = %v", err)
	}
	e := load(t, nil, map[string]string{"a.rego": "package authz\n\nallow if true\n"})
	own := *e.program
	own.forPrograms = func() (*ast.Compiler, error) { panic("a bug") }
	e.program = &own
	if p, err := e.Program(t.Context(), get("/").Destination); p != nil || err == nil || err.Error() != "panic: a bug" {
		t.Errorf("Program = %v, %v", p, err)
	}
}

// Alternatives that data multiplied are found by hash, not one by one.
func TestManyAlternativesAreLookedUp(t *testing.T) {
	var roles strings.Builder
	for i := range 500 {
		roles.WriteString("\"spiffe://shop.test/w" + strings.Repeat("x", i%7) + string(rune('a'+i%26)) + "\": [\"admin\", \"user\"],\n")
	}
	e := load(t, nil, map[string]string{"a.rego": "package authz\n\nroles := {" + roles.String() + "}\n\nallow if \"admin\" in roles[input.attributes.source.principal]\n"})
	src, err := e.programSource(t.Context(), get("/").Destination)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(src.Allow.Set); n < 100 || len(src.Allow.Of) > 0 {
		t.Errorf("allow is %d conditions, and a set of %d", len(src.Allow.Of), n)
	}
}

// A program that does not answer as OPA does is not used.
func TestWrongProgramsAreNotUsed(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), map[string]string{"a.rego": "package authz\n\ndeny if input.attributes.request.http.headers.debug == \"on\"\n"})
	src, err := e.programSource(t.Context(), get("/").Destination)
	if err != nil {
		t.Fatal(err)
	}
	for name, breakIt := range map[string]func(){
		"a deny that is lost":    func() { src.Deny = nil },
		"an allow that is added": func() { src.Grants[0].Methods = nil },
	} {
		whole := src
		whole.Grants = append(whole.Grants[:0:0], src.Grants...)
		p, err := e.Program(t.Context(), get("/").Destination)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.holdAgainstOPA(p, &src); err != nil {
			t.Fatalf("before %s: %v", name, err)
		}
		sampled := src // the calls are made of what the policy says
		breakIt()
		broken, err := program.New(src)
		if err != nil {
			t.Fatal(err)
		}
		before := e.Mismatches()
		if err := e.holdAgainstOPA(broken, &sampled); err == nil || e.Mismatches() != before+1 {
			t.Errorf("%s: holdAgainstOPA = %v, %d mismatches", name, err, e.Mismatches()-before)
		}
		src = whole
	}
}

// Each program is held against OPA before anybody gets it.
func TestNoProgramIsMadeWithoutTheComparison(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), nil)
	e.grants = slices.Clone(e.grants) // what programs are made of; OPA has the data from before
	e.grants[0].HTTP = &grant.HTTP{}
	in := get("/orders/1")
	in.Method = "DELETE"
	if p, err := e.Program(t.Context(), in.Destination); err == nil || p != nil || e.Mismatches() != 1 {
		t.Errorf("Program = %v, %v, with %d mismatches", p, err, e.Mismatches())
	}
	if encoded, err := e.Encoded(t.Context(), in.Destination); err == nil || encoded != nil {
		t.Errorf("Encoded = %d bytes, %v", len(encoded), err)
	}
	if d := e.Authorize(t.Context(), in); d.Allow || d.Reason != policy.MethodNotGranted {
		t.Errorf("Authorize = %+v; want METHOD, as OPA says", d)
	}
}

// Whoever asks first and goes away leaves a program to the others.
func TestProgramsOutliveWhoAskedFirst(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), map[string]string{"a.rego": "package authz\n\ndeny if input.attributes.request.http.headers.debug == \"on\"\n"})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if p, err := e.Program(gone, get("/").Destination); err != nil || p == nil {
		t.Errorf("Program = %v, %v", p, err)
	}
}

// One engine takes so many destinations; OPA decides for the others.
func TestDestinationsAreBounded(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), nil)
	if _, err := e.Program(t.Context(), get("/").Destination); err != nil {
		t.Fatal(err)
	}
	e.programs.n = maxDestinations
	in := get("/orders/1")
	if d := e.Authorize(t.Context(), in); !d.Allow {
		t.Errorf("a known destination: %+v", d)
	}
	in.Destination = "spiffe://shop.test/one-more"
	if d := e.Authorize(t.Context(), in); d.Reason != policy.NoGrant {
		t.Errorf("one more destination: %+v", d)
	}
	if _, err := e.Program(t.Context(), in.Destination); err == nil {
		t.Error("one more destination has a program")
	}
}

// Partial evaluation takes x = x for true where there is no x, whichever way the two
// sides come to be the same part of the call. No program may believe it.
func TestComparisonsWithWhatACallLacks(t *testing.T) {
	const (
		header = "input.attributes.request.http.headers.accept"
		rules  = "\nalias := input.attributes.request.http.headers\n\nother := input.attributes.request.http.headers\n\naccept := " + header +
			"\n\nsame(x, y) if x == y\n\nalike if alias.accept == " + header + "\n\ndiffer if not alike\n"
	)
	for body, compiles := range map[string]bool{
		"alias.accept == " + header:                                              true,
		"alias.accept = " + header:                                               true,
		header + " == alias[\"accept\"]":                                         true,
		"accept == " + header:                                                    true,
		"accept == alias.accept":                                                 true,
		"alias.accept == other.accept":                                           true,
		"[alias.accept, 1] == [" + header + ", 1]":                               true,
		"[1, [alias.accept]] == [1, [" + header + "]]":                           true,
		"x := alias.accept\n\ty := " + header + "\n\tx == y":                     true,
		"x := input.attributes.request.http.headers\n\tx.accept == alias.accept": true,
		"same(alias.accept, " + header + ")":                                     true,
		"not same(alias.accept, " + header + ")":                                 true,
		"alike":                                                                  true,
		"not alike":                                                              true,
		"differ":                                                                 true,
		"alias.accept != " + header:                                              true,
		"not alias.accept != " + header:                                          true,
		header + " in [alias.accept]":                                            false,
		"{\"a\": alias.accept} == {\"a\": " + header + "}":                       true,
		"not alias.accept == " + header:                                          false,
		"not accept == alias.accept":                                             false,
		"not [alias.accept] == [" + header + "]":                                 true,
		"x := alias\n\tnot x.accept == " + header:                                false,
		"every x in [alias.accept] {\n\t\tx == " + header + "\n\t}":              false,
	} {
		for _, rule := range []string{"allow", "deny"} {
			module := "package authz\n\n" + rule + " if {\n\t" + body + "\n}\n" + rules
			grants := ""
			if rule == "deny" {
				grants = webReadsOrders
			}
			e := load(t, parseGrants(t, cmp.Or(grants, "grants: []")), map[string]string{"a.rego": module})
			src, err := e.programSource(t.Context(), get("/").Destination)
			if (err == nil) != compiles {
				t.Errorf("%s if %s: compiled: %v", rule, body, err)
			}
			if err != nil {
				continue
			}
			p, err := program.New(src)
			if err != nil {
				t.Fatal(err)
			}
			for name, headers := range map[string]policy.HeaderMap{"none": nil, "another": {"b": {"c"}}, "empty": {"accept": {""}}, "one": {"accept": {"x"}}, "no value": {"accept": {}}} {
				in := get("/orders/1")
				in.Headers = headers
				want := e.AuthorizeByOPA(t.Context(), in)
				if got := p.Decide(in, time.Now()); got.Reason != want.Reason {
					t.Errorf("%s if %s, header %s: the program says %s, OPA %s", rule, body, name, got.Reason, want.Reason)
				}
			}
		}
	}
}
