// Hostile policies: what a built-in function may take, what the compiler may, what an
// evaluation that does not stop may; and that others' decisions go on.

package engine

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/topdown"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

// doubling are rules of which each is twice the one before.
func doubling(n int, first, next string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "x0 := %s\n", first)
	for i := 1; i <= n; i++ {
		fmt.Fprintf(&b, "x%d := %s\n", i, strings.ReplaceAll(next, "X", fmt.Sprintf("x%d", i-1)))
	}
	return b.String()
}

// hostile are policies that would take long, or much memory, for one call.
var hostile = map[string]string{
	"nested loops":          `allow if { some a in numbers.range(1, 3000); some b in numbers.range(1, 3000); some c in numbers.range(1, 3000); a + b + c < 0 }`,
	"huge range":            `allow if count(numbers.range(0, 1000000000)) == 0`,
	"exponential":           `allow if count({[a, b, c, d] | some a in numbers.range(1, 99); some b in numbers.range(1, 99); some c in numbers.range(1, 99); some d in numbers.range(1, 99)}) == 0`,
	"in deny":               `deny if { some a in numbers.range(1, 100000); some b in numbers.range(1, 100000); a + b < 0 }`,
	"many expressions":      `allow if { some a in numbers.range(1, 10000000); regex.match(sprintf("^(a+)+%d$", [a]), "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!") }`,
	"a large expression":    "s := concat(\"\", [\"a\" | some _ in numbers.range(1, 20000)])\n\nallow if regex.match(\"(a?){1000}b\", s)",
	"walk":                  `allow if { walk(numbers.range(1, 3000000), [_, x]); x == "no" }`,
	"walk of doubled parts": "f(x) := [x, x]\n\ny := " + strings.Repeat("f(", 30) + "input.protocol" + strings.Repeat(")", 30) + "\n\nallow if { walk(y, [_, x]); x == \"no\" }",
	"doubled text":          doubling(40, `concat("", ["aaaaaaaaaaaaaaaa", input.protocol])`, `concat("", [X, X])`) + "\nallow if count(x40) == 0",
	"text by sprintf":       doubling(40, `sprintf("%s%s", [input.protocol, input.protocol])`, `sprintf("%s%s", [X, X])`) + "\nallow if count(x40) == 0",
	"wide text":             "allow if count(sprintf(\"" + strings.Repeat("%900000d", 100) + "\", numbers.range(1, 100))) == 0",
	"text by replace":       doubling(40, `replace("aaaa", "a", input.protocol)`, `replace(X, "h", X)`) + "\nallow if count(x40) == 0",
	"text by expression":    doubling(40, `input.protocol`, `regex.replace(X, ".", "$0$0$0$0")`) + "\nallow if count(x40) == 0",
	"a number of digits":    `allow if floor(to_number("1e999999999")) == 0`,
	"a sum of them":         `allow if sum(json.unmarshal("[1e999999999, 1]")) == 0`,
	"products":              doubling(40, `count(input.protocol) * 99999999`, `X * X`) + "\nallow if x40 == 0",
	"a product of many":     `allow if product([x | some _ in numbers.range(1, 100000); x := 1000000007]) == 0`,
	"marshalled parts":      "f(x) := [x, x]\n\ny := " + strings.Repeat("f(", 30) + "input.protocol" + strings.Repeat(")", 30) + "\n\nallow if json.marshal(y) == \"\"",
	"printed parts":         "f(x) := [x, x]\n\ny := " + strings.Repeat("f(", 30) + "input.protocol" + strings.Repeat(")", 30) + "\n\nallow if sprintf(\"%v\", [y]) == \"\"",
	"a wild card":           "s := concat(\"\", [\"a\" | some _ in numbers.range(1, 20000)])\n\nallow if glob.match(\"*a*a*a*a*a*a*a*a*b\", [], s)",
}

// T31: each of them is stopped, in time and in little memory, and the call denied.
func TestT31HostilePoliciesAreStopped(t *testing.T) {
	for name, rego := range hostile {
		t.Run(name, func(t *testing.T) {
			e := load(t, nil, map[string]string{"a.rego": "package authz\n\n" + rego + "\n"})
			e.limit = EvaluationLimit
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := time.Now()
			d := e.AuthorizeByOPA(t.Context(), get("/"))
			took := time.Since(start)
			runtime.ReadMemStats(&after)
			if d.Allow || d.Reason != policy.Error {
				t.Errorf("decision = %+v; want ERROR", d)
			}
			// The limit is 50 ms; the rest is for a loaded machine with the race detector.
			if took > 10*time.Second {
				t.Errorf("took %v", took)
			}
			if allocated := (after.TotalAlloc - before.TotalAlloc) >> 20; allocated > 512 {
				t.Errorf("allocated %d MiB", allocated)
			}
			if n := e.stuck.Load(); n > 0 {
				t.Errorf("%d evaluations go on", n)
			}
		})
	}
}

// T31: while they are asked, calls that other engines decide come out right.
func TestT31OthersAreDecidedMeanwhile(t *testing.T) {
	stop := make(chan struct{})
	var attackers sync.WaitGroup
	var stopped atomic.Int64
	for _, name := range []string{"nested loops", "exponential"} {
		e := load(t, nil, map[string]string{"a.rego": "package authz\n\n" + hostile[name] + "\n"})
		e.limit = EvaluationLimit
		attackers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if d := e.AuthorizeByOPA(context.Background(), get("/")); d.Reason == policy.Error {
					stopped.Add(1)
				}
			}
		})
	}
	others := map[string]*Engine{
		"compiled": load(t, parseGrants(t, webReadsOrders), nil),
		"by OPA":   load(t, parseGrants(t, webReadsOrders), map[string]string{"a.rego": "package authz\n\n" + byPort}),
	}
	for i := 0; i < 200 || stopped.Load() < 4; i++ {
		for name, e := range others {
			path, want := fmt.Sprintf("/orders/%d", i), policy.Allowed
			if i%2 == 0 {
				path, want = fmt.Sprintf("/none/%d", i), policy.PathNotGranted
			}
			if d := e.Authorize(t.Context(), get(path)); d.Reason != want {
				t.Fatalf("%s: %s is %+v; want %s", name, path, d, want)
			}
		}
	}
	close(stop)
	attackers.Wait()
}

// T31: such a policy takes neither the compiler nor programs long; whoever asks for a
// program is told why there is none, and OPA decides.
func TestT31HostilePoliciesAreActivatedInTime(t *testing.T) {
	start := time.Now()
	for name, rego := range map[string]string{
		"composed":           doubling(40, "[input.protocol]", "[X, X]") + "\ny := x40\n\nallow if y == x40",
		"nested":             doubling(40, "[input.protocol]", "[X]") + "\nallow if x40 == [[1]]",
		"nested as written":  "allow if " + strings.Repeat("[", 60) + strings.Repeat("]", 60) + " == " + strings.Repeat("[", 60) + strings.Repeat("]", 60),
		"objects":            doubling(40, `{"a": input.protocol}`, `{"a": X, "b": X}`) + "\nallow if x40 == {\"a\": 1}",
		"through a variable": "allow if {\n\tx0 := [input.protocol]\n" + strings.ReplaceAll(doubling(40, "[x0]", "[X, X]"), "x0 := [x0]\n", "") + "\tx40 == 1\n}",
	} {
		if err := CheckModules(map[string]string{"a.rego": "package authz\n\n" + rego + "\n"}); err == nil || !strings.Contains(err.Error(), "is composed of too much") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"nested loops", "huge range", "exponential", "doubled text", "many expressions", "wide text"} {
		e := load(t, nil, map[string]string{"a.rego": "package authz\n\n" + hostile[name] + "\n"})
		if p, err := e.Program(t.Context(), get("/").Destination); err == nil {
			t.Errorf("%s: %v", name, p)
		}
	}
	if took := time.Since(start); took > time.Minute {
		t.Errorf("took %v", took)
	}
}

// A deep nesting is refused before it takes the stack.
func TestT31DeepNestingIsRefused(t *testing.T) {
	for _, open := range []string{"[", "{", "(", "not "} {
		if err := CheckModules(map[string]string{"a.rego": "package authz\n\nallow if x == " + strings.Repeat(open, 200_000)}); err == nil {
			t.Errorf("%q: no error", open)
		}
	}
}

// While an evaluation does not stop, other calls are denied at once; whoever waits for
// a program does not wait for it.
func TestT31WhatDoesNotStopIsLeftAlone(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), map[string]string{"a.rego": "package authz\n\n" + byPort})
	release := make(chan struct{})
	if err := e.inTime(t.Context(), time.Millisecond, func(topdown.Cancel) { <-release }); err == nil || !strings.Contains(err.Error(), "stopped after 1ms, and goes on") {
		t.Errorf("inTime = %v", err)
	}
	eventually := func(what string, is func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	eventually("it does not count as stuck", func() bool { return e.stuck.Load() == 1 })
	if d, why := e.decideByOPA(t.Context(), get("/orders/1")); d.Reason != policy.Error || why.err == nil || !strings.Contains(why.err.Error(), "does not stop") {
		t.Errorf("%+v, %v", d, why.err)
	}
	close(release)
	eventually("it is not over", func() bool { return e.stuck.Load() == 0 })
	if d := e.AuthorizeByOPA(t.Context(), get("/orders/1")); !d.Allow {
		t.Errorf("afterwards: %+v", d)
	}
	if err := e.inTime(t.Context(), time.Minute, func(topdown.Cancel) { panic("a bug") }); err == nil || err.Error() != "panic: a bug" || e.stuck.Load() != 0 {
		t.Errorf("inTime = %v", err)
	}
}

// What honest policies do is far from the bounds.
func TestBoundsLeaveRoom(t *testing.T) {
	e := load(t, nil, map[string]string{"a.rego": `package authz

allow if {
	regex.match("^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$", input.attributes.request.http.headers.id)
	count(concat(",", split(input.attributes.request.http.headers.long, ""))) > 100000
	sprintf("%s/%05d %-10s %[1]v %%", ["a", 7, "b"]) == "a/00007 b          a %"
	to_number("-1.5e10") + 12345678901234567890 > 0
	sum(numbers.range(1, 1000)) == 500500
	sort(split(input.attributes.request.http.headers.long, "a"))[0] == ""
	replace(input.attributes.request.http.headers.long, "a", "bb") != ""
	glob.match("*.shop.test", ["."], "orders.shop.test")
	units.parse_bytes("10MiB") == 10485760
	json.unmarshal(json.marshal(input)).protocol == "http"
}
`})
	in := get("/")
	in.Headers = policy.HeaderMap{"id": {"123e4567-e89b-12d3-a456-426614174000"}, "long": {strings.Repeat("a", 60_000)}}
	if d, a := e.decideByOPA(t.Context(), in); !d.Allow {
		t.Errorf("%+v, %v", d, a.err)
	}
}

// T31: nor does a caller make an expression take long; a program fails as OPA does.
func TestT31LongTextsFailWhoeverMatchesThem(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), map[string]string{"a.rego": "package authz\n\nallow if regex.match(`^([a-z]+[0-9]?){60}x$`, input.attributes.request.http.headers.long)\n"})
	if _, err := e.Program(t.Context(), get("/").Destination); err != nil {
		t.Fatal(err)
	}
	for n, want := range map[int]policy.Reason{100: policy.Allowed, 100_000: policy.Error} {
		in := get("/orders/1") // which a grant allows
		in.Headers = policy.HeaderMap{"long": {strings.Repeat("a", n)}}
		if d := byAll(t, e, in); d.Reason != want {
			t.Errorf("%d bytes: %+v", n, d)
		}
	}
}

// T30: what reaches outside is refused wherever a policy is built, loaded, or tested.
func TestT30RefusedWhereverAPolicyGoes(t *testing.T) {
	for _, rego := range []string{
		`allow if http.send({"method": "GET", "url": "http://evil.test"}).status_code == 200`,
		`allow if count(input.parsed_path) == 1 with count as net.lookup_ip_addr`,
	} {
		modules := map[string]string{"a.rego": "package authz\n\n" + rego + "\n"}
		data := Source{Modules: modules, Grants: nil}
		if err := CheckModules(modules); err == nil || !strings.Contains(err.Error(), "is not available") {
			t.Errorf("check: %v", err)
		}
		if _, err := New(t.Context(), data); err == nil || !strings.Contains(err.Error(), "is not available") {
			t.Errorf("load: %v", err)
		}
		tests := map[string]string{"a_test.rego": "package authz_test\n\ntest_a if { " + strings.TrimPrefix(rego, "allow if ") + " }\n"}
		if _, err := RunRegoTests(t.Context(), Source{Modules: map[string]string{"b.rego": "package authz\n\nallow if false\n"}}, tests, nil); err == nil || !strings.Contains(err.Error(), "is not available") {
			t.Errorf("test: %v", err)
		}
	}
}

// T28: who is given the same bundle for ever decides nothing by it once it has ended.
func TestT28AFrozenPolicyEnds(t *testing.T) {
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	for name, modules := range map[string]map[string]string{"compiled": nil, "by OPA": {"a.rego": "package authz\n\n" + byPort}} {
		e := load(t, parseGrants(t, webReadsOrders), modules)
		e.notAfter = now
		for after, want := range map[time.Duration]policy.Reason{0: policy.Allowed, time.Nanosecond: policy.StalePolicy} {
			e.now = func() time.Time { return now.Add(after) }
			if d := byAll(t, e, get("/orders/1")); d.Reason != want {
				t.Errorf("%s, %v after the end: %+v", name, after, d)
			}
		}
	}
}

// T34: a decision is of one generation, also while policies change as fast as they
// can: what decides, what is kept and what is sent with it.
func TestT34NoDecisionIsOfTwoGenerations(t *testing.T) {
	var active atomic.Pointer[Engine]
	put := func(generation uint64) {
		module := fmt.Sprintf("package authz\n\nallow := {\"allowed\": true, \"headers\": {\"x-generation\": \"%d\"}} if input.attributes.request.http.method == \"GET\"\n", generation)
		if generation%2 == 0 {
			module += "\n" + byPort // which OPA decides
		}
		e, err := New(context.Background(), Source{Modules: map[string]string{"a.rego": module}, Grants: []grant.Grant{}, Generation: generation})
		if err != nil {
			t.Error(err)
			return
		}
		e.limit = time.Minute
		active.Store(e)
	}
	put(1)
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				d := active.Load().Authorize(context.Background(), get("/"))
				if !d.Allow || d.Response == nil || d.Response.Headers[0].Value != fmt.Sprint(d.Revision) {
					t.Errorf("%+v %+v", d, d.Response)
					return
				}
			}
		})
	}
	for generation := uint64(2); generation < 20; generation++ {
		put(generation)
	}
	close(stop)
	callers.Wait()
}
