// Header fields as no HTTP library would send them: twice, joined, in any case,
// folded, with tabs. Over a raw socket and a framer of HTTP/2, to a policy of grants
// and Rego.

package httpauth_test

import (
	"context"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2/hpack"

	"merlon.dev/policy"
	"merlon.dev/policy/engine"
	"merlon.dev/policy/grant"
	"merlon.dev/sdk/sdktest"
)

// noAdmin denies who says "admin" in any value of X-Role.
const noAdmin = `package authz

deny if {
	some value in input.attributes.request.http.headers_all["x-role"]
	contains(value, "admin")
}
`

// decideBy has td decide by the grant of all HTTP calls and rego, and gives every call
// that it was asked about.
func decideBy(t *testing.T, td *sdktest.TD, rego string) <-chan *policy.Input {
	t.Helper()
	list, err := grant.Parse([]grant.File{{Name: "grants.yaml", Data: []byte("grants:\n  - {id: all, http: {}}\n")}})
	if err != nil {
		t.Fatal(err)
	}
	e, err := engine.New(t.Context(), engine.Source{Grants: list, Modules: map[string]string{"own.rego": rego}, Generation: 1})
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan *policy.Input, 100)
	td.Decide(func(in *policy.Input) policy.Decision {
		asked <- in
		return e.Authorize(context.Background(), in)
	})
	return asked
}

// T16: the policy sees every value of a field, as the handler does, whichever way they
// were sent.
func TestT16PolicySeesEveryValueOfAField(t *testing.T) {
	td := sdktest.New(t)
	asked := decideBy(t, td, noAdmin)
	served := make(chan http.Header, 1)
	url := start(t, td.Workload("orders"), http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { served <- r.Header }))
	for name, tt := range map[string]struct {
		fields string
		seen   policy.HeaderMap
		denied bool
	}{
		"one":                      {"X-Role: user\r\n", policy.HeaderMap{"x-role": {"user"}}, false},
		"the second counts":        {"X-Role: user\r\nX-Role: admin\r\n", policy.HeaderMap{"x-role": {"user", "admin"}}, true},
		"the first counts":         {"X-Role: admin\r\nX-Role: user\r\n", policy.HeaderMap{"x-role": {"admin", "user"}}, true},
		"others between":           {"X-Role: user\r\nX-A: 1\r\nX-Role: admin\r\n", policy.HeaderMap{"x-role": {"user", "admin"}, "x-a": {"1"}}, true},
		"in any case":              {"x-role: user\r\nX-ROLE: guest\r\nX-rOlE: admin\r\n", policy.HeaderMap{"x-role": {"user", "guest", "admin"}}, true},
		"joined by a comma":        {"X-Role: user, admin\r\n", policy.HeaderMap{"x-role": {"user, admin"}}, true},
		"joined, and once more":    {"X-Role: user,guest\r\nX-Role: guest\r\n", policy.HeaderMap{"x-role": {"user,guest", "guest"}}, false},
		"empty and not":            {"X-Role:\r\nX-Role: admin\r\n", policy.HeaderMap{"x-role": {"", "admin"}}, true},
		"tabs around":              {"X-Role:\t user \t\r\n", policy.HeaderMap{"x-role": {"user"}}, false},
		"a tab within":             {"X-Role: user\tadmin\r\n", policy.HeaderMap{"x-role": {"user\tadmin"}}, true},
		"folded":                   {"X-Role: user\r\n\tadmin\r\n", policy.HeaderMap{"x-role": {"user admin"}}, true},
		"an underscore is another": {"X-Role: user\r\nX_Role: admin\r\n", policy.HeaderMap{"x-role": {"user"}, "x_role": {"admin"}}, false},
	} {
		res := roundTrip(t, dial(t, url, td, "http/1.1"), "GET /orders HTTP/1.1\r\nHost: orders\r\n"+tt.fields+"\r\n")
		if in := <-asked; !cmp.Equal(in.Headers, tt.seen) {
			t.Errorf("%s: the policy saw (-got +want):\n%s", name, cmp.Diff(in.Headers, tt.seen))
		}
		if tt.denied {
			if res.StatusCode != http.StatusForbidden {
				t.Errorf("%s = %d; want 403", name, res.StatusCode)
			}
			continue
		}
		if res.StatusCode != http.StatusOK {
			t.Fatalf("%s = %d; want 200", name, res.StatusCode)
		}
		header := <-served
		for field, values := range tt.seen {
			if got := header[http.CanonicalHeaderKey(field)]; !cmp.Equal(got, values) {
				t.Errorf("%s: the handler saw %q in %s; the policy %q", name, got, field, values)
			}
		}
	}
	select {
	case <-served:
		t.Error("the handler saw more than the calls that were allowed")
	default:
	}
}

// T16: what is no field reaches neither policy nor handler.
func TestT16MalformedFieldsAreRefused(t *testing.T) {
	td := sdktest.New(t)
	asked := decideBy(t, td, noAdmin)
	var served atomic.Int32
	url := start(t, td.Workload("orders"), http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served.Add(1) }))
	for name, field := range map[string]string{
		"space before the colon": "X-Role : user", "tab before the colon": "X-Role\t: user", "space in the name": "X Role: user",
		"no name": ": user", "no colon": "X-Role", "folded at the start": " X-Role: user", "NUL": "X-Role: user\x00admin",
		"CR alone": "X-Role: user\rX-Role: admin", "vertical tab": "X-Role: user\vadmin", "name not ASCII": "X-R\u00f6le: user",
	} {
		if res := roundTrip(t, dial(t, url, td, "http/1.1"), "GET /orders HTTP/1.1\r\n"+field+"\r\nHost: orders\r\n\r\n"); res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s = %d; want 400", name, res.StatusCode)
		}
	}
	call := []hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: "orders"}, {Name: ":path", Value: "/orders"}}
	for name, field := range map[string]hpack.HeaderField{
		"upper case": {Name: "X-Role", Value: "user"}, "space in the name": {Name: "x role", Value: "user"}, "no name": {Value: "user"},
		"line feed": {Name: "x-role", Value: "user\nx-role: admin"}, "NUL": {Name: "x-role", Value: "user\x00"}, "second path": {Name: ":path", Value: "/admin"},
	} {
		if got := frames(t, dial(t, url, td, "h2"), append(slices.Clip(call), field)); got == "200" {
			t.Errorf("%s over HTTP/2 = %s", name, got)
		}
	}
	select {
	case in := <-asked:
		t.Errorf("the policy was asked about %+v", in)
	default:
	}
	if n := served.Load(); n != 0 {
		t.Errorf("%d requests were served", n)
	}
}

// T16: over HTTP/2, where a field that comes twice is two fields.
func TestT16PolicySeesEveryValueOverHTTP2(t *testing.T) {
	td := sdktest.New(t)
	asked := decideBy(t, td, noAdmin)
	url := start(t, td.Workload("orders"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, strings.Join(r.Header["X-Role"], "|"))
	}))
	call := []hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: "orders"}, {Name: ":path", Value: "/orders"}}
	for want, values := range map[string][]string{"200": {"user", "guest"}, "403": {"user", "admin"}} {
		fields := slices.Clip(call)
		for _, v := range values {
			fields = append(fields, hpack.HeaderField{Name: "x-role", Value: v}, hpack.HeaderField{Name: "x_role", Value: "admin"})
		}
		if got := frames(t, dial(t, url, td, "h2"), fields); got != want {
			t.Errorf("%v = %s; want %s", values, got, want)
		}
		seen := policy.HeaderMap{"x-role": values, "x_role": {"admin", "admin"}}
		if in := <-asked; !cmp.Equal(in.Headers, seen) {
			t.Errorf("%v: the policy saw (-got +want):\n%s", values, cmp.Diff(in.Headers, seen))
		}
	}
}
