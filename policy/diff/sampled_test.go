package diff

// Own Rego: what is found is so, what is called unchanged is, and the sample has the
// policies' own words.

import (
	"testing"
	"time"

	"merlon.dev/policy"
	"merlon.dev/policy/engine"
)

func load(t *testing.T, rego string, generation uint64) *engine.Engine {
	t.Helper()
	e, err := engine.New(t.Context(), engine.Source{
		Modules: map[string]string{"authz.rego": "package authz\n\n" + rego}, Generation: generation,
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestPoliciesAreSampledByTheirWords(t *testing.T) {
	const users = `allow if input.attributes.destination.principal == "spiffe://x.test/users"
`
	tests := map[string]struct {
		a, b           string
		added, removed bool
		unchanged      []string
	}{
		"the same, and another generation": {users, users, false, false, []string{Elsewhere, "spiffe://x.test/users"}},
		"another service, a header": {users, users + `allow if {
	input.attributes.destination.principal == "spiffe://x.test/orders"
	input.attributes.request.http.headers["x-team"] == "shop"
	input.parsed_path == ["orders", "1"]
}
`, true, false, []string{Elsewhere, "spiffe://x.test/users"}},
		"a deny": {users, users + `deny if input.spiffe.source.path == "/evil"
`, false, true, nil},
		"what has no program": {"allow if time.now_ns() < 0\n", "allow if {\n\ttime.now_ns() > 0\n\tinput.grpc.service == \"shop.Orders\"\n}\n", true, false, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			a, b := load(t, tt.a, 1), load(t, tt.b, 2)
			s, err := Policies(t.Context(), a, b)
			if err != nil {
				t.Fatal(err)
			}
			if len(s.Added) > 0 != tt.added || len(s.Removed) > 0 != tt.removed || len(s.Unchanged) != len(tt.unchanged) {
				t.Errorf("sample %s; want added %v, removed %v, unchanged %q", text(s), tt.added, tt.removed, tt.unchanged)
			}
			for i, id := range tt.unchanged {
				if s.Unchanged[i] != id {
					t.Errorf("unchanged %q; want %q", s.Unchanged, tt.unchanged)
				}
			}
			for _, f := range append(s.Added, s.Removed...) {
				before, after := a.AuthorizeByOPA(t.Context(), f.Example), b.AuthorizeByOPA(t.Context(), f.Example)
				if before.Allow == after.Allow || before.Reason != f.Before || after.Reason != f.After || f.Calls == 0 || after.Allow != (f.After == policy.Allowed) {
					t.Errorf("%s: OPA says %s and %s", text(f), before.Reason, after.Reason)
				}
			}
		})
	}
}

// Policies that take long are asked as much as there is time for, and it is said how
// much that was.
func TestSamplesEnd(t *testing.T) {
	a, b := load(t, "allow if input.protocol == \"http\"\n", 1), load(t, "allow if time.now_ns() < 0\n", 2)
	calls := engine.SampleCalls([]string{Elsewhere}, 100, a, b)
	for limit, least := range map[time.Duration]int{time.Hour: 100, 0: 0} {
		s := &Sample{}
		if err := s.compare(t.Context(), a, b, calls, limit); err != nil {
			t.Fatal(err)
		}
		if s.Calls < least || s.Calls > max(least, 1) {
			t.Errorf("in %v: %d calls", limit, s.Calls)
		}
	}
}
