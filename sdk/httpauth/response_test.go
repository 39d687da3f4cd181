// What a policy has sent beside its decision arrives, at the handler and at the
// caller, and forges no identity.

package httpauth_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

// send makes a request with header fields, without following redirects.
func send(t *testing.T, td *sdktest.TD, url string, fields ...string) (*http.Response, string, error) {
	t.Helper()
	c := client(t, td.Workload("web"), sdk.Service("orders"))
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(fields); i += 2 {
		req.Header[fields[i]] = append(req.Header[fields[i]], fields[i+1])
	}
	res, err := c.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body), nil
}

func TestAllowedRequestsCarryWhatThePolicyAdds(t *testing.T) {
	td := sdktest.New(t)
	td.Decide(func(*policy.Input) policy.Decision {
		return policy.Decision{Allow: true, Reason: policy.Allowed, Response: &policy.Response{
			Headers:         []policy.HeaderField{{Name: "x-role", Value: "reader"}, {Name: "x-team", Value: "a"}, {Name: "x-team", Value: "b"}},
			ResponseHeaders: []policy.HeaderField{{Name: "x-policy", Value: "seen"}, {Name: "x-own", Value: "policy"}},
			RemoveHeaders:   []string{"x-debug"},
		}}
	})
	url := start(t, td.Workload("orders"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Own", "handler")
		for _, name := range []string{"X-Role", "X_role", "X-Team", "X-Debug", "X_debug", "X-Other"} {
			fmt.Fprintf(w, "%s=%s ", name, strings.Join(r.Header[name], ","))
		}
	}))
	res, body, err := send(t, td, url, "X-Role", "admin", "X_role", "admin", "X-Debug", "1", "X_debug", "1", "X-Other", "o")
	if err != nil {
		t.Fatal(err)
	}
	if want := "X-Role=reader X_role= X-Team=a,b X-Debug= X_debug= X-Other=o "; body != want {
		t.Errorf("the handler saw %s; want %s", body, want)
	}
	if res.Header.Get("X-Policy") != "seen" || res.Header.Get("X-Own") != "handler" {
		t.Errorf("the caller saw %v", res.Header)
	}
}

func TestDenialsLookAsThePolicyWants(t *testing.T) {
	td := sdktest.New(t)
	var response *policy.Response
	td.Decide(func(*policy.Input) policy.Decision {
		return policy.Decision{Reason: policy.NoGrant, Response: response}
	})
	url := start(t, td.Workload("orders"), http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a denied request was served") }))
	tests := map[string]struct {
		send   policy.Response
		status int
		body   string
		fields map[string]string
	}{
		"all of it": {
			policy.Response{Status: 401, Body: "log in first", Headers: []policy.HeaderField{{Name: "www-authenticate", Value: "Bearer"}}},
			401, "log in first",
			map[string]string{"Www-Authenticate": "Bearer", "Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"},
		},
		"a redirect": {
			policy.Response{Status: 302, Body: "moved", Headers: []policy.HeaderField{{Name: "location", Value: "https://login.test/"}}},
			302, "moved",
			map[string]string{"Location": "https://login.test/"},
		},
		"its own type": {
			policy.Response{Body: "<p>no</p>", Headers: []policy.HeaderField{{Name: "content-type", Value: "text/html"}, {Name: "cache-control", Value: "private"}}},
			403, "<p>no</p>",
			map[string]string{"Content-Type": "text/html", "Cache-Control": "private"},
		},
		"no body allowed": {policy.Response{Status: 204, Body: "x"}, 204, "", nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			response = &tt.send
			res, body, err := send(t, td, url)
			if err != nil {
				t.Fatal(err)
			}
			if res.StatusCode != tt.status || body != tt.body || res.Header.Get(httpauth.DecisionIDHeader) == "" {
				t.Errorf("%d %q %v", res.StatusCode, body, res.Header)
			}
			for name, want := range tt.fields {
				if got := res.Header.Values(name); len(got) != 1 || got[0] != want {
					t.Errorf("%s: %q; want %q", name, got, want)
				}
			}
		})
	}
	// Without a body of its own the denial explains itself, with the policy's status.
	response = &policy.Response{Status: 404, Headers: []policy.HeaderField{{Name: "content-type", Value: "text/html"}}}
	_, _, err := send(t, td, url)
	if denied := asDenied(err); denied == nil || denied.Reason != policy.NoGrant {
		t.Errorf("%v", err)
	}
}

// T13: neither header fields of a policy nor an agent that sends them make somebody
// else of the caller.
func TestPoliciesForgeNoIdentity(t *testing.T) {
	td := sdktest.New(t)
	for _, name := range []string{"x-spiffe-id", "x_spiffe_id", "x-forwarded-client-cert", "host", "content-length", "X-Upper"} {
		td.Decide(func(*policy.Input) policy.Decision {
			return policy.Decision{Allow: true, Reason: policy.Allowed, Response: &policy.Response{Headers: []policy.HeaderField{{Name: name, Value: "1"}}}}
		})
		url := start(t, td.Workload("orders"), http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Errorf("%s was taken", name) }))
		_, _, err := send(t, td, url)
		if denied := asDenied(err); denied == nil || denied.Reason != policy.Error {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func asDenied(err error) *sdk.DeniedError {
	denied, _ := errors.AsType[*sdk.DeniedError](err)
	return denied
}
