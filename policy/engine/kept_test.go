// What is kept of OPA's decisions: for which calls, and until when.

package engine

import (
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/measure"
	"merlon.dev/policy"
)

// byPort has no compiled form, because of its number, and the same answer each
// time for the same call.
const byPort = "deny if input.attributes.source.address.socketAddress.portValue == 1\n\n"

func keptOf(t *testing.T, rego string) *Engine {
	t.Helper()
	e := load(t, parseGrants(t, webReadsOrders), map[string]string{"a.rego": "package authz\n\n" + rego})
	if _, err := e.Program(t.Context(), get("/").Destination); err == nil {
		t.Fatal("the policy has a compiled form")
	}
	return e
}

func TestDecisionsAreKeptForWhatThePolicyReads(t *testing.T) {
	tests := map[string]struct {
		rego string
		// differ must not share a decision; same must.
		differ, same []func(in *policy.Input)
	}{
		"an address and a header": {
			byPort + "deny if input.attributes.request.http.headers.debug == \"on\"\n",
			[]func(*policy.Input){
				func(in *policy.Input) { in.Source += "x" }, func(in *policy.Input) { in.Destination += "x" }, func(in *policy.Input) { in.Method = "PUT" },
				func(in *policy.Input) { in.Path = "/orders/2" }, func(in *policy.Input) { in.Protocol = policy.GRPC },
				func(in *policy.Input) { in.SourceAddress = "10.0.0.1:1" }, func(in *policy.Input) { in.Headers = policy.HeaderMap{"debug": {"on"}} },
				func(in *policy.Input) { in.Headers = policy.HeaderMap{"debug": {}} }, func(in *policy.Input) { in.Headers = policy.HeaderMap{"debug": {""}} },
				func(in *policy.Input) { in.Headers = policy.HeaderMap{"debug": {"", ""}} },
			},
			[]func(*policy.Input){
				func(in *policy.Input) { in.Headers = policy.HeaderMap{"accept": {"on"}} }, func(in *policy.Input) { in.Query = "a=b" },
				func(in *policy.Input) { in.Host = "x" }, func(in *policy.Input) { in.DestinationAddress = "10.0.0.2:1" }, func(in *policy.Input) { in.SourceSerial = "1" },
			},
		},
		"all headers": {
			byPort + "deny if {\n\tsome name, _ in input.attributes.request.http.headers\n\tstartswith(name, \"x-\")\n}\n",
			[]func(*policy.Input){func(in *policy.Input) { in.Headers = policy.HeaderMap{"a": {"b"}} }, func(in *policy.Input) { in.Headers = policy.HeaderMap{"x-a": {"b"}} }},
			[]func(*policy.Input){func(in *policy.Input) { in.Headers = policy.HeaderMap{} }, func(in *policy.Input) { in.Host = "x" }},
		},
		"the request": {
			byPort + "deny if count(input.attributes.request.http) > 9\n",
			[]func(*policy.Input){func(in *policy.Input) { in.Headers = policy.HeaderMap{"a": {"b"}} }, func(in *policy.Input) { in.Query = "a" }, func(in *policy.Input) { in.Host = "x" }},
			[]func(*policy.Input){func(in *policy.Input) { in.DestinationAddress = "10.0.0.2:1" }},
		},
		"the input": {
			"deny if count(input) > 20\n",
			[]func(*policy.Input){func(in *policy.Input) { in.DestinationAddress = "10.0.0.2:1" }, func(in *policy.Input) { in.Query = "a" }},
			[]func(*policy.Input){func(in *policy.Input) { in.SourceSerial = "1" }},
		},
		"through a function and with": {
			"deny if f(input) with input.protocol as input.attributes.request.http.host\n\nf(x) if x.attributes.request.http.headers.a == x.protocol\n",
			[]func(*policy.Input){func(in *policy.Input) { in.Host = "x" }, func(in *policy.Input) { in.Headers = policy.HeaderMap{"a": {"b"}} }},
			nil,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			e := keptOf(t, tt.rego)
			e.Authorize(t.Context(), get("/orders/1"))
			has := func(in *policy.Input) bool {
				_, ok := e.kept.Find(in, time.Now().UnixNano())
				return ok
			}
			if !has(get("/orders/1")) {
				t.Fatal("nothing is kept")
			}
			for want, changes := range map[bool][]func(*policy.Input){true: tt.same, false: tt.differ} {
				for i, change := range changes {
					in := get("/orders/1")
					change(in)
					if has(in) != want {
						t.Errorf("change %d of those that share a decision: %v", i, want)
					}
					if kept, opa := e.Authorize(t.Context(), in), e.AuthorizeByOPA(t.Context(), in); kept.Reason != opa.Reason || kept.RuleID != opa.RuleID {
						t.Errorf("change %d: %+v; OPA says %+v", i, kept, opa)
					}
				}
			}
		})
	}
}

func TestWhatTheClockDecidesIsNotKept(t *testing.T) {
	e := keptOf(t, "deny if f(time.now_ns())\n\nf(x) if x > 1\n")
	if err := e.Kept(); err == nil || !strings.Contains(err.Error(), "time.now_ns gives another value each time") || e.kept != nil {
		t.Errorf("Kept() = %v", err)
	}
}

// A token ends, so nothing that may come of its claims is kept, here or in services.
func TestWhatATokenDecidesIsNotKept(t *testing.T) {
	for _, rego := range []string{
		"allow if input.jwt.sub == \"spiffe://shop.test/buyer\"\n", "allow if f(input)\n\nf(x) if x.jwt.sub == \"spiffe://shop.test/buyer\"\n",
		"allow if input[k].sub == \"spiffe://shop.test/buyer\"\n\nk := \"jwt\"\n", "allow if not input.jwt\n",
	} {
		e := keptOf(t, rego)
		if err := e.Kept(); err == nil || !strings.Contains(err.Error(), "what input.jwt says ends with its token") || e.kept != nil || !e.ReadsJWT() {
			t.Errorf("%s: Kept() = %v", rego, err)
		}
		in := get("/none")
		if !strings.Contains(rego, "not") {
			in.JWT = map[string]any{"sub": "spiffe://shop.test/buyer"}
		}
		if d := e.Authorize(t.Context(), in); !d.Allow {
			t.Errorf("%s: %+v", rego, d)
		}
	}
	// Where it is not named it is not there; a caller that gives it all the same gets
	// no decision of one without.
	e := keptOf(t, byPort)
	with := get("/orders/1")
	with.JWT = map[string]any{"sub": "x"}
	e.Authorize(t.Context(), with)
	if _, ok := e.kept.Find(with, 0); ok || e.ReadsJWT() {
		t.Error("a decision with claims is kept")
	}
}

func TestErrorsAreNotKept(t *testing.T) {
	e := keptOf(t, "deny if to_number(input.attributes.request.http.host) == 1\n")
	in := get("/orders/1")
	in.Host = "none"
	if d := e.Authorize(t.Context(), in); d.Reason != policy.Error {
		t.Fatalf("%+v", d)
	}
	if _, ok := e.kept.Find(in, 0); ok {
		t.Error("an error is kept")
	}
}

// Nothing is kept beyond the end of a grant, nor of the policy.
func TestKeptDecisionsEndWithGrants(t *testing.T) {
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	text := "grants:\n  - {id: a, http: {}, expires: 2026-06-01T00:01:00Z}\n  - {id: b, to: [spiffe://shop.test/other], http: {}, expires: 2026-06-01T00:00:30Z}\n"
	e := load(t, parseGrants(t, text), map[string]string{"a.rego": "package authz\n\n" + byPort})
	e.now = func() time.Time { return now }
	e.notAfter = now.Add(time.Hour)
	if _, err := e.Program(t.Context(), get("/").Destination); err == nil { // tried before the time moves
		t.Fatal("the policy has a compiled form")
	}
	for _, step := range []struct {
		at   time.Duration
		want policy.Reason
	}{{0, policy.Allowed}, {59 * time.Second, policy.Allowed}, {time.Minute, policy.NoGrant}, {61 * time.Minute, policy.StalePolicy}} {
		e.now = func() time.Time { return now.Add(step.at) }
		for range 2 {
			if d := e.Authorize(t.Context(), get("/")); d.Reason != step.want {
				t.Errorf("after %v: %+v; want %s", step.at, d, step.want)
			}
		}
	}
}

func TestDryRunsOfKeptDecisionsCount(t *testing.T) {
	e := load(t, parseGrants(t, "grants:\n  - {id: dry, http: {}, mode: dry-run}\n"), map[string]string{"a.rego": "package authz\n\n" + byPort})
	for range 5 {
		e.Authorize(t.Context(), get("/"))
	}
	if n := e.DryRun()["dry"]; n != 5 {
		t.Errorf("counted %d times; want 5", n)
	}
}

func BenchmarkKept(b *testing.B) {
	e := load(b, benchmarkGrants(10_000), map[string]string{"a.rego": "package authz\n\n" + byPort})
	inputs := benchmarkCalls(10_000, "GET")
	for _, in := range inputs {
		e.decideKept(b.Context(), in)
	}
	b.ReportAllocs()
	defer measure.PerOp(b)()
	i := 0
	for b.Loop() {
		if d, _ := e.decideKept(b.Context(), inputs[i%len(inputs)]); !d.Allow {
			b.Fatal(d)
		}
		i++
	}
}
