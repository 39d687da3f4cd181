package engine

// What an explanation says: the grants that came nearest, and of own Rego the lines
// that did not hold.

import (
	"strings"
	"testing"

	"merlon.dev/policy"
	"merlon.dev/policy/program"
)

const ownRules = `package authz

import rego.v1

default allow := false

allow if {
	input.attributes.request.http.method == "GET"
	startswith(input.attributes.request.http.path, "/public/")
}

allow if {
	reader(input.spiffe.source.path)
	not blocked
}

reader(path) if path == "/web"

blocked if input.attributes.request.http.headers["x-blocked"] == "1"

allow if {
	some segment in input.parsed_path
	segment == "open"
	count([s | some s in input.parsed_path; s == "no"]) > 0
}

deny if {
	input.attributes.request.http.method == "DELETE"
	input.spiffe.source.trust_domain == "shop.test"
}
`

func TestExplainNamesTheLinesThatDoNotHold(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), map[string]string{"shop/authz.rego": ownRules})
	post, blocked, open, del, held := get("/admin"), get("/admin"), get("/open"), get("/orders"), get("/public/a")
	post.Method, post.Source = "POST", "spiffe://shop.test/cart"
	blocked.Headers = policy.HeaderMap{"x-blocked": {"1"}}
	open.Source = "spiffe://shop.test/cart"
	del.Method = "DELETE"
	tests := map[string]struct {
		in     *policy.Input
		reason policy.Reason
		want   []string // lines of the explanation
		not    []string // parts of lines that it must not have
	}{
		"no rule held": {
			post, policy.NoGrant,
			[]string{
				"no grant lets spiffe://shop.test/cart call spiffe://shop.test/orders over http",
				"grant web-reads-orders: source spiffe://shop.test/cart not in [spiffe://shop.test/web]; path /admin not in [/orders, /orders/*]; method POST not in [GET]",
				`shop/authz.rego:8: does not hold: input.attributes.request.http.method == "GET" (input.attributes.request.http.method is "POST")`,
				`shop/authz.rego:13: does not hold: reader(input.spiffe.source.path) (input.spiffe.source.path is "/cart")`,
				`shop/authz.rego:17: does not hold: path == "/web"`,
			},
			[]string{"authz.rego:19", "authz.rego:28", "authz.rego:29", "merlon.rego"},
		},
		"a negation": {
			blocked, policy.PathNotGranted,
			[]string{
				"grant web-reads-orders: path /admin not in [/orders, /orders/*]",
				"shop/authz.rego:14: does not hold: not blocked",
				`shop/authz.rego:9: does not hold: startswith(input.attributes.request.http.path, "/public/") (input.attributes.request.http.path is "/admin")`,
			},
			[]string{"authz.rego:19:"},
		},
		"a loop": {
			open, policy.NoGrant,
			[]string{`shop/authz.rego:24: does not hold: count([s | some s in input.parsed_path; s == "no"]) > 0 (input.parsed_path is ["open"])`},
			nil,
		},
		"deny": {
			del, policy.DenyRule,
			[]string{"the policy's Rego rule deny decides", "shop/authz.rego:27: deny holds: deny if { …"},
			[]string{"does not hold"},
		},
		"allow": {
			held, policy.Allowed,
			[]string{"the policy's Rego rule allow decides", "shop/authz.rego:7: allow holds: allow if { …"},
			[]string{"does not hold"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			x := e.Explain(t.Context(), tt.in, How{})
			text := "\n" + strings.Join(x.Details, "\n") + "\n"
			if x.Reason != tt.reason || x.Trace != "" {
				t.Errorf("reason %s, trace %q; want %s and none", x.Reason, x.Trace, tt.reason)
			}
			for _, want := range tt.want {
				if !strings.Contains(text, "\n"+want+"\n") {
					t.Errorf("lacks %q in:%s", want, text)
				}
			}
			for _, not := range tt.not {
				if strings.Contains(text, not) {
					t.Errorf("has %q in:%s", not, text)
				}
			}
		})
	}
}

// An object of opa-envoy-plugin that refuses is named, too.
func TestExplainNamesTheObjectThatRefuses(t *testing.T) {
	e := load(t, nil, map[string]string{"envoy.rego": "package envoy.authz\n\nallow := {\"allowed\": false, \"http_status\": 401} if input.attributes.request.http.path == \"/x\"\n"})
	x := e.Explain(t.Context(), get("/x"), How{})
	const want = "envoy.rego:3: allow holds: allow := {\"allowed\": false, \"http_status\": 401} if input.attributes.request.http.path == \"/x\", which does not allow"
	if x.Allow || !strings.Contains(strings.Join(x.Details, "\n"), want) {
		t.Errorf("%s: %q; want %q", x.Reason, x.Details, want)
	}
}

// Who asks for OPA gets OPA: a program that says something else is not asked.
func TestAuthorizeByOPANeverAsksAProgram(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), nil)
	in := get("/admin")
	wrong, err := program.Decode(program.Encode(&program.Source{Destination: in.Destination, Grants: []program.Grant{{ID: "all", Kind: program.Allow, Protocol: policy.HTTP}}}))
	if err != nil {
		t.Fatal(err)
	}
	c := e.compilation(in.Destination)
	c.once.Do(func() { c.program = wrong; close(c.done) })
	if d := e.Authorize(t.Context(), in); !d.Allow || d.RuleID != "all" {
		t.Fatalf("the program is not asked at all: %+v", d)
	}
	if d := e.AuthorizeByOPA(t.Context(), in); d.Allow || d.Reason != policy.PathNotGranted {
		t.Errorf("AuthorizeByOPA = %+v; want what OPA says", d)
	}
	if x := e.Explain(t.Context(), in, How{}); x.Allow || x.Engine != "native" {
		t.Errorf("explained as %+v by %s; want OPA's answer", x.Decision, x.Engine)
	}
}

// A hostile policy neither holds an explanation up nor makes it large.
func TestExplanationsOfHostilePoliciesAreBounded(t *testing.T) {
	long := "input.spiffe.source.path == \"" + strings.Repeat("x", 100_000) + "\""
	for name, rego := range map[string]string{
		"a loop":       "allow if {\n\tsome x in numbers.range(1, 1000)\n\tsome y in numbers.range(1, 1000)\n\tsome z in numbers.range(1, 1000)\n\tx + y + z == 0\n}\n",
		"long lines":   "allow if {\n\tsome x in numbers.range(1, 1000)\n\tx > 0\n\t" + long + "\n}\n",
		"many reasons": strings.Repeat("allow if input.protocol == \"tcp\"\n\n", 2000),
	} {
		t.Run(name, func(t *testing.T) {
			e := load(t, nil, map[string]string{"a.rego": "package authz\n\n" + rego})
			e.limit = EvaluationLimit
			x := e.Explain(t.Context(), get("/"), How{Trace: true})
			size := 0
			for _, s := range x.Details {
				size += len(s)
			}
			if x.Allow || size == 0 || size > 64<<10 || len(x.Trace) > maxTraceBytes+200 {
				t.Errorf("%s: %d bytes in %d sentences, %d bytes of a trace", x.Reason, size, len(x.Details), len(x.Trace))
			}
		})
	}
}
