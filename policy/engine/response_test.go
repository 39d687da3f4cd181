// Objects of opa-envoy-plugin's kind: what is sent with which decision, by OPA, by
// what is kept of its answers, and by a program.

package engine

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"merlon.dev/policy"
)

// byAll decides in by everything that can, and wants one answer.
func byAll(t *testing.T, e *Engine, in *policy.Input) policy.Decision {
	t.Helper()
	want := e.AuthorizeByOPA(t.Context(), in)
	for range 2 {
		kept, _ := e.decideKept(t.Context(), in)
		sameDecision(t, "kept", kept, want)
	}
	if p, err := e.Program(t.Context(), in.Destination); err == nil {
		v := p.Decide(in, e.now())
		sameDecision(t, "program", policy.Decision{Allow: v.Allow(), Reason: v.Reason, RuleID: v.RuleID, Response: v.Response}, want)
	}
	return want
}

func sameDecision(t *testing.T, by string, got, want policy.Decision) {
	t.Helper()
	if got.Allow != want.Allow || got.Reason != want.Reason || got.RuleID != want.RuleID || !cmp.Equal(got.Response, want.Response) {
		t.Errorf("%s: %+v %+v; OPA %+v %+v", by, got, got.Response, want, want.Response)
	}
}

const objects = `
default allow := {"allowed": false, "http_status": 401, "body": "log in", "headers": {"WWW-Authenticate": "Bearer"}}

allow := response if {
	input.attributes.request.http.method == "GET"
	response := {
		"allowed": true,
		"headers": [{"X-Role": "reader"}, {"x-team": ["a", "b"]}],
		"response_headers_to_add": {"x-policy": "seen"},
		"request_headers_to_remove": ["X-Debug"],
		"dynamic_metadata": {"n": 1},
	}
}

allow := {"allowed": false, "http_status": 405} if input.attributes.request.http.method == "PUT"

deny if input.attributes.request.http.headers.debug == "on"
`

func TestObjectsGoWithDecisionsThatTheyAgreeWith(t *testing.T) {
	for _, pkg := range []string{"authz", "envoy.authz"} {
		e := load(t, parseGrants(t, "grants:\n  - {id: deletes, http: {methods: [DELETE, PUT]}}\n  - {id: gets, http: {methods: [GET], paths: [/granted]}}\n"),
			map[string]string{"a.rego": "package " + pkg + "\n" + objects})
		if _, err := e.Program(t.Context(), get("/").Destination); err != nil {
			t.Fatal(err)
		}
		call := func(method, path string) *policy.Input {
			in := get(path)
			in.Method = method
			return in
		}
		denied := call("GET", "/")
		denied.Headers = policy.HeaderMap{"debug": {"on"}}
		allowed := &policy.Response{
			Headers:         []policy.HeaderField{{Name: "x-role", Value: "reader"}, {Name: "x-team", Value: "a"}, {Name: "x-team", Value: "b"}},
			ResponseHeaders: []policy.HeaderField{{Name: "x-policy", Value: "seen"}},
			RemoveHeaders:   []string{"x-debug"},
		}
		refused := &policy.Response{Status: 401, Body: "log in", Headers: []policy.HeaderField{{Name: "www-authenticate", Value: "Bearer"}}}
		for name, tt := range map[string]struct {
			in   *policy.Input
			want policy.Decision
		}{
			"allowed by it":                {call("GET", "/"), policy.Decision{Allow: true, Reason: policy.Allowed, RuleID: "rego:allow", Response: allowed}},
			"allowed by a grant and by it": {call("GET", "/granted"), policy.Decision{Allow: true, Reason: policy.Allowed, RuleID: "gets", Response: allowed}},
			"allowed by a grant only":      {call("PUT", "/"), policy.Decision{Allow: true, Reason: policy.Allowed, RuleID: "deletes"}},
			"denied by default":            {call("POST", "/"), policy.Decision{Reason: policy.MethodNotGranted, Response: refused}},
			"denied by a rule":             {denied, policy.Decision{Reason: policy.DenyRule, RuleID: "rego:deny"}},
		} {
			t.Run(pkg+", "+name, func(t *testing.T) { sameDecision(t, "OPA", byAll(t, e, tt.in), tt.want) })
		}
	}
}

func TestObjectsWithPartsOfTheCallAreDecidedByOPAAndKept(t *testing.T) {
	e := load(t, nil, map[string]string{"a.rego": `package envoy.authz

allow := {"allowed": allowed, "headers": {"x-caller": input.attributes.source.principal}, "http_status": 404}

default allowed := false

allowed if input.parsed_path == ["mine"]
`})
	if _, err := e.Program(t.Context(), get("/").Destination); err == nil || !strings.Contains(err.Error(), "a.rego:3: allow is not always a constant") {
		t.Fatal(err)
	}
	if err := e.Kept(); err != nil {
		t.Fatal(err)
	}
	for path, reason := range map[string]policy.Reason{"/mine": policy.Allowed, "/other": policy.NoGrant} {
		d := byAll(t, e, get(path))
		if d.Reason != reason || d.Response == nil || d.Response.Headers[0].Value != get(path).Source {
			t.Errorf("%s: %+v %+v", path, d, d.Response)
		}
	}
}

// T32: what cannot be sent denies, and says why.
func TestT32ObjectsThatCannotBeSentDeny(t *testing.T) {
	for rego, want := range map[string]string{
		`{"allowed": true, "headers": {"x-spiffe-id": "spiffe://a.test/admin"}}`:   "header x-spiffe-id claims an identity",
		`{"allowed": true, "headers": {"x-a": 1}}`:                                 "headers: is neither a string nor an array of strings",
		`{"allowed": true, "headers": "x-a"}`:                                      "headers: is no object",
		`{"allowed": true, "headers": ["x-a"]}`:                                    "headers: an element is no object",
		`{"allowed": true, "headers": {1: "x"}}`:                                   "headers: a name is no string",
		`{"allowed": true, "request_headers_to_remove": "x-a"}`:                    "request_headers_to_remove: is neither",
		`{"allowed": true, "query_parameters_to_set": {"admin": "1"}}`:             "query_parameters_to_set: is not supported",
		`{"allowed": true, "response_headers_to_add": {"set-cookie": ["a", 1]}}`:   "response_headers_to_add: an element is no string",
		`{"allowed": true, "http_status": "200"}`:                                  "http_status: is no status",
		`{"allowed": true, "http_status": 0}`:                                      "http_status: is no status",
		`{"allowed": true, "http_status": 1e30}`:                                   "http_status: is no status",
		`{"allowed": true, "body": {"a": 1}}`:                                      "body: is no string",
		`{"allowed": true, "headers": {"x-a": sprintf("%s\n", [input.protocol])}}`: "header x-a has a value that cannot be sent",
	} {
		e := load(t, nil, map[string]string{"a.rego": "package authz\n\nallow := " + rego + "\n"})
		if d := byAll(t, e, get("/")); d.Allow || d.Reason != policy.Error || d.Response != nil {
			t.Errorf("%s: %+v", rego, d)
		}
		if why := e.Explain(t.Context(), get("/"), How{}).Details; len(why) != 1 || !strings.Contains(why[0], want) {
			t.Errorf("%s: %q; want %q", rego, why, want)
		}
	}
}
