// Decisions of grants and of own Rego, their reasons and their limits.

package engine

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/measure"
	"merlon.dev/policy"
	"merlon.dev/policy/grant"
	"merlon.dev/policy/program"
)

func parseGrants(t testing.TB, yaml string) []grant.Grant {
	t.Helper()
	if yaml == "" {
		return nil
	}
	g, err := grant.Parse([]grant.File{{Name: "grants.yaml", Data: []byte(yaml)}})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func load(t testing.TB, grants []grant.Grant, modules map[string]string) *Engine {
	t.Helper()
	e, err := New(context.Background(), Source{Modules: modules, Grants: grants, Generation: 7})
	if err != nil {
		t.Fatal(err)
	}
	e.limit = time.Minute // a loaded machine must not fail what is not about time
	return e
}

func get(path string) *policy.Input {
	return &policy.Input{Source: "spiffe://shop.test/web", Destination: "spiffe://shop.test/orders", Protocol: policy.HTTP, Method: "GET", Path: path}
}

const webReadsOrders = `grants:
  - {id: web-reads-orders, from: [spiffe://shop.test/web], to: [spiffe://shop.test/orders], http: {methods: [GET], paths: [/orders, /orders/*]}}
`

func TestAuthorizeFillsTheDecision(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), nil)
	d := e.Authorize(t.Context(), get("/orders/1"))
	if !d.Allow || d.Reason != policy.Allowed || d.RuleID != "web-reads-orders" || d.Revision != 7 || d.DecisionID.IsZero() {
		t.Errorf("decision = %+v", d)
	}
	if again := e.Authorize(t.Context(), get("/orders/1")); again.DecisionID == d.DecisionID {
		t.Error("two decisions share an ID")
	}
}

func TestAuthorizeDeniesWhatCannotBeDecided(t *testing.T) {
	e := load(t, parseGrants(t, "grants:\n  - {id: all-http, http: {}}\n  - {id: all-grpc, grpc: {}}\n"), nil)
	noSource, udp := get("/"), get("/")
	noSource.Source, udp.Protocol = "", "udp"
	rpc := get("/a//b")
	rpc.Protocol = policy.GRPC
	tests := map[string]struct {
		in   *policy.Input
		want policy.Reason
	}{
		"no input":         {nil, policy.NoIdentity},
		"no source":        {noSource, policy.NoIdentity},
		"ambiguous path":   {get("/a/../b"), policy.BadRequest},
		"encoded path":     {get("/%61"), policy.BadRequest},
		"no path":          {get(""), policy.BadRequest},
		"ambiguous RPC":    {rpc, policy.BadRequest},
		"unknown protocol": {udp, policy.NoGrant},
		"zero":             {&policy.Input{Source: "spiffe://a.test/b"}, policy.NoGrant},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if d := e.Authorize(t.Context(), tt.in); d.Allow || d.Reason != tt.want || d.DecisionID.IsZero() {
				t.Errorf("decision = %+v; want %s", d, tt.want)
			}
		})
	}
}

func TestExpiryIsCheckedAtEachCall(t *testing.T) {
	now := time.Date(2026, 12, 31, 23, 59, 59, 0, time.UTC)
	e := load(t, parseGrants(t, "grants:\n  - {id: a, http: {}, expires: 2027-01-01T00:00:00Z}\n"), nil)
	e.notAfter = now.Add(time.Hour)
	e.now = func() time.Time { return now }
	if _, err := e.Program(t.Context(), get("/").Destination); err != nil { // before the time moves
		t.Fatal(err)
	}
	for _, step := range []struct {
		add  time.Duration
		want policy.Reason
	}{{0, policy.Allowed}, {time.Second, policy.NoGrant}, {time.Hour, policy.StalePolicy}} {
		now = now.Add(step.add)
		if d := e.Authorize(t.Context(), get("/")); d.Reason != step.want {
			t.Errorf("at %v: %+v; want %s", now, d, step.want)
		}
	}
}

// A deny that never ends must not end because its year does not fit into
// nanoseconds, nor an allow that has ended come back.
func TestExpiryOfFarYears(t *testing.T) {
	now := time.Date(2026, 12, 31, 0, 0, 0, 0, time.UTC)
	for year, ended := range map[string]bool{"9999-12-31": false, "2262-04-12": false, "1970-01-01": true, "1500-01-01": true, "0001-01-01": true} {
		e := load(t, parseGrants(t, "grants:\n  - {id: a, http: {}}\n  - {id: d, http: {}, effect: deny, expires: "+year+"T00:00:00Z}\n"), nil)
		e.now = func() time.Time { return now }
		if d := e.Authorize(t.Context(), get("/")); d.Allow != ended {
			t.Errorf("deny until %s: %+v", year, d)
		}
	}
}

func TestGrantsAreEvaluatedByOwnModuleOnly(t *testing.T) {
	always := "package merlon\n\ngranted := [\"ALLOWED\", \"x\"]\n\nverdict := granted\n\ndecision := {\"allow\": true}\n\ndry_run := []\n"
	for name, modules := range map[string]map[string]string{"alone": {}, "with own Rego": {"a.rego": "package authz\n\ndeny := false\n"}} {
		modules[ModuleName] = always
		e := load(t, nil, modules)
		if d := e.Authorize(t.Context(), get("/")); d.Allow || d.Reason != policy.NoGrant {
			t.Errorf("%s: %+v", name, d)
		}
	}
}

// T14: a handler sees "/v1/x:delete" whichever way it was written.
func TestT14DenyIsNotWalkedAroundByEncoding(t *testing.T) {
	e := load(t, parseGrants(t, `grants:
  - {id: all, http: {}}
  - {id: no, http: {paths: ["/v1/x:delete", /caf%C3%A9/*, "/u/{id}/@me"]}, effect: deny}
`), nil)
	for _, path := range []string{
		"/v1/x:delete", "/v1/x%3Adelete", "/v1/x%3adelete", "/café/x", "/caf%c3%a9/x", "/caf%C3%A9/x", "/u/1/@me", "/u/1/%40me",
	} {
		if d := e.Authorize(t.Context(), get(path)); d.Reason != policy.DenyRule {
			t.Errorf("%s: %+v", path, d)
		}
	}
}

func TestExplainSaysWhatWasNearest(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders+`
  - {id: tried, from: [spiffe://shop.test/web], http: {}, mode: dry-run}
  - {id: old, from: [spiffe://shop.test/cart], http: {}, expires: 2020-01-01T00:00:00Z}
`), nil)
	post, cart := get("/orders"), get("/orders")
	post.Method, cart.Source = "POST", "spiffe://shop.test/cart"
	const dry = "dry-run grant tried would allow the call; it decides nothing"
	tests := map[string]struct {
		in   *policy.Input
		want []string
	}{
		"allowed":   {get("/orders"), []string{"grant web-reads-orders allows the call", dry}},
		"method":    {post, []string{"grant web-reads-orders: method POST not in [GET]", dry}},
		"path":      {get("/admin"), []string{"grant web-reads-orders: path /admin not in [/orders, /orders/*]", dry}},
		"expired":   {cart, []string{"no grant lets spiffe://shop.test/cart call spiffe://shop.test/orders over http", "grant old: expired at 2020-01-01T00:00:00Z", "grant web-reads-orders: source spiffe://shop.test/cart not in [spiffe://shop.test/web]"}},
		"ambiguous": {get("/a//b"), []string{`path "/a//b" is ambiguous: empty segment ("//") at byte 3`}},
		"nobody":    {&policy.Input{Protocol: policy.TCP}, []string{"the caller proved no SPIFFE ID"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			x := e.Explain(t.Context(), tt.in, How{})
			if strings.Join(x.Details, "\n") != strings.Join(tt.want, "\n") {
				t.Errorf("%s: %q; want %q", x.Reason, x.Details, tt.want)
			}
			if d := e.Authorize(t.Context(), tt.in); d.Allow != x.Allow || d.Reason != x.Reason || d.RuleID != x.RuleID {
				t.Errorf("explained as %+v; the decision is %+v", x.Decision, d)
			}
		})
	}
	if n := e.DryRun()["tried"]; n != 3 {
		t.Errorf("dry-run grant counted %d calls; want 3, for an explanation is none", n)
	}
}

func TestOwnRegoDecidesBesideGrants(t *testing.T) {
	modules := map[string]string{"authz.rego": `package authz

allow if input.parsed_path == ["health"]

allow if {
	input.attributes.request.http.headers["x-team"] == "shop"
	input.spiffe.source.trust_domain == "shop.test"
	input.parsed_query.page[0] == "1"
}

deny if input.attributes.request.http.headers_all["x-debug"][_] == "on"

deny if input.grpc.service == "shop.Admin"
`, "envoy.rego": `package envoy.authz

allow := {"allowed": true, "http_status": 200} if input.attributes.request.http.path == "/envoy?x=1"
`}
	e := load(t, parseGrants(t, webReadsOrders), modules)
	team, debug, envoy, rpc := get("/x"), get("/orders"), get("/envoy"), get("/shop.Admin/Get")
	team.Headers, team.Query = policy.HeaderMap{"x-team": {"shop"}}, "page=1"
	debug.Headers = policy.HeaderMap{"x-debug": {"off", "on"}}
	envoy.Query = "x=1"
	rpc.Protocol = policy.GRPC
	for name, tt := range map[string]struct {
		in   *policy.Input
		want policy.Reason
		rule string
	}{
		"grant":            {get("/orders"), policy.Allowed, "web-reads-orders"},
		"allow":            {get("/health"), policy.Allowed, "rego:allow"},
		"allow by headers": {team, policy.Allowed, "rego:allow"},
		"deny over grant":  {debug, policy.DenyRule, "rego:deny"},
		"deny by service":  {rpc, policy.DenyRule, "rego:deny"},
		"object of envoy":  {envoy, policy.Allowed, "rego:allow"},
		"neither":          {get("/x"), policy.PathNotGranted, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if d := e.Authorize(t.Context(), tt.in); d.Reason != tt.want || d.RuleID != tt.rule || d.Allow != (tt.want == policy.Allowed) {
				t.Errorf("decision = %+v; want %s %q", d, tt.want, tt.rule)
			}
		})
	}
}

// T32: whatever Rego answers that is no clear yes or no is a denial that says
// so, even where a grant allows the call.
func TestT32UnclearAnswersDeny(t *testing.T) {
	tests := map[string]struct {
		rego string
		want policy.Reason
	}{
		"string allow":     {`allow := "true"`, policy.Error},
		"number allow":     {`allow := 1`, policy.Error},
		"null allow":       {`allow := null`, policy.Error},
		"array allow":      {`allow := [true]`, policy.Error},
		"object allow":     {`allow := {"allow": true}`, policy.Error},
		"object string":    {`allow := {"allowed": "true"}`, policy.Error},
		"computed set":     {`allow := {x | x := input.protocol}`, policy.Error},
		"string deny":      {`deny := "no"`, policy.Error},
		"set deny":         {`deny := {"message"}`, policy.Error},
		"empty set deny":   {`deny := set()`, policy.Error},
		"object deny":      {`deny := {"allowed": false}`, policy.Error},
		"conflict":         {"allow := true if input.protocol\nallow := false if input.attributes", policy.Error},
		"conflict in deny": {"deny := true if input.protocol\ndeny := false if input.attributes", policy.Error},
		"builtin error":    {`deny if to_number(input.protocol) > 1`, policy.Error},
		"division by zero": {`deny if 1 / (count(input.protocol) - 4) == 1`, policy.Error},
		"undefined":        {`deny if input.nothing.here`, policy.Allowed},
		"false":            {`allow := false`, policy.Allowed},
		"denies":           {`deny := true`, policy.DenyRule},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			e := load(t, parseGrants(t, "grants:\n  - {id: all, http: {}}\n"), map[string]string{"a.rego": "package authz\n\n" + tt.rego + "\n"})
			d := e.Explain(t.Context(), get("/"), How{})
			if d.Reason != tt.want || d.Allow != (tt.want == policy.Allowed) {
				t.Errorf("decision = %+v; want %s", d.Decision, tt.want)
			}
			if len(d.Details) == 0 || d.Details[0] == "" {
				t.Error("no explanation")
			}
		})
	}
}

func TestAuthorizeEndsWithItsContext(t *testing.T) {
	e := load(t, nil, map[string]string{"a.rego": "package authz\n\nallow if { some a in numbers.range(1, 100000); some b in numbers.range(1, 100000); a + b < 0 }\n"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if d := e.Authorize(ctx, get("/")); d.Allow || d.Reason != policy.Error {
		t.Errorf("decision = %+v", d)
	}
}

func TestEngineIsSafeForConcurrentUse(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), map[string]string{"a.rego": "package authz\n\ndeny if input.attributes.request.http.path == \"/orders/7\"\n"})
	done := make(chan error, 8)
	for range cap(done) {
		go func() {
			for i := range 50 {
				want := policy.Allowed
				if i == 7 {
					want = policy.DenyRule
				}
				if d := e.Explain(context.Background(), get(fmt.Sprintf("/orders/%d", i)), How{}); d.Reason != want {
					done <- fmt.Errorf("/orders/%d: %+v", i, d)
					return
				}
			}
			done <- nil
		}()
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestNewChecksGrants(t *testing.T) {
	for name, grants := range map[string][]grant.Grant{"no protocol": {{ID: "a"}}, "one ID twice": {{ID: "a", TCP: &grant.TCP{}}, {ID: "a", TCP: &grant.TCP{}}}} {
		if _, err := New(t.Context(), Source{Grants: grants}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func benchmarkGrants(n int) []grant.Grant {
	grants := make([]grant.Grant, n)
	for i := range grants {
		grants[i] = grant.Grant{
			ID: fmt.Sprintf("grant-%d", i), From: []string{fmt.Sprintf("spiffe://shop.test/web-%d", i)},
			To:   []string{fmt.Sprintf("spiffe://shop.test/orders-%d", i%100)},
			HTTP: &grant.HTTP{Methods: []string{"GET"}, Paths: []string{"/orders", "/orders/*"}},
		}
	}
	return grants
}

// benchmarkCalls are 4096 calls of n callers to 100 services.
func benchmarkCalls(n int, method string) []*policy.Input {
	inputs := make([]*policy.Input, 4096)
	for i := range inputs {
		inputs[i] = get(fmt.Sprintf("/orders/%d", i))
		inputs[i].Source, inputs[i].Destination = fmt.Sprintf("spiffe://shop.test/web-%d", i%n), fmt.Sprintf("spiffe://shop.test/orders-%d", i%n%100)
		inputs[i].Method = method
	}
	return inputs
}

// By a program alone, by the engine that finds it, and by OPA.
func BenchmarkAuthorize(b *testing.B) {
	for _, n := range []int{10, 10_000} {
		e := load(b, benchmarkGrants(n), nil)
		programs := map[string]*program.Program{}
		for _, in := range benchmarkCalls(n, "GET") {
			var err error
			if programs[in.Destination], err = e.Program(b.Context(), in.Destination); err != nil {
				b.Fatal(err)
			}
		}
		for name, method := range map[string]string{"allow": "GET", "deny": "POST"} {
			inputs := benchmarkCalls(n, method)
			own := make([]*program.Program, len(inputs))
			for i, in := range inputs {
				own[i] = programs[in.Destination]
			}
			run := func(by string, decide func(i int) bool) {
				b.Run(fmt.Sprintf("grants=%d/%s/%s", n, name, by), func(b *testing.B) {
					b.ReportAllocs()
					for i := range inputs { // what is made once for each grant is there
						decide(i)
					}
					defer measure.PerOp(b)()
					i := 0
					for b.Loop() {
						if decide(i%len(inputs)) != (method == "GET") {
							b.Fatal(inputs[i])
						}
						i++
					}
				})
			}
			now := time.Now()
			run("program", func(i int) bool { v := own[i].Decide(inputs[i], now); return v.Allow() })
			run("engine", func(i int) bool { return e.Authorize(b.Context(), inputs[i]).Allow })
			run("opa", func(i int) bool { return e.AuthorizeByOPA(b.Context(), inputs[i]).Allow })
		}
	}
}

func BenchmarkAuthorizeOwnRego(b *testing.B) {
	e := load(b, parseGrants(b, webReadsOrders), map[string]string{"a.rego": "package authz\n\ndeny if input.attributes.request.http.headers[\"x-debug\"] == \"on\"\n"})
	in := get("/orders/1")
	in.Headers = policy.HeaderMap{"user-agent": {"go"}, "accept": {"*/*"}, "x-request-id": {"1"}}
	p, err := e.Program(b.Context(), in.Destination)
	if err != nil {
		b.Fatal(err)
	}
	now := time.Now()
	for name, allows := range map[string]func() bool{
		"program": func() bool { v := p.Decide(in, now); return v.Allow() },
		"engine":  func() bool { return e.Authorize(b.Context(), in).Allow },
		"opa":     func() bool { return e.AuthorizeByOPA(b.Context(), in).Allow },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			defer measure.PerOp(b)()
			for b.Loop() {
				if !allows() {
					b.Fatal("denied")
				}
			}
		})
	}
}

// What a program costs to make: with grants alone, and with own Rego.
func BenchmarkProgram(b *testing.B) {
	for name, modules := range map[string]map[string]string{
		"grants": nil, "rego": {"a.rego": "package authz\n\ndeny if input.attributes.request.http.headers[\"x-debug\"] == \"on\"\n"},
	} {
		for _, n := range []int{10, 10_000} {
			e := load(b, benchmarkGrants(n), modules)
			b.Run(fmt.Sprintf("%s/grants=%d", name, n), func(b *testing.B) {
				b.ReportAllocs()
				defer measure.PerOp(b)()
				for b.Loop() {
					src, err := e.programSource(b.Context(), "spiffe://shop.test/orders-1")
					if err != nil {
						b.Fatal(err)
					}
					p, err := program.New(src)
					if err != nil {
						b.Fatal(err)
					}
					if err := e.holdAgainstOPA(p, &src); err != nil {
						b.Fatal(err)
					}
					b.ReportMetric(float64(len(program.Encode(&src))), "bytes")
				}
			})
		}
	}
}

func BenchmarkNew(b *testing.B) {
	grants := benchmarkGrants(10_000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := New(b.Context(), Source{Grants: grants}); err != nil {
			b.Fatal(err)
		}
	}
}
