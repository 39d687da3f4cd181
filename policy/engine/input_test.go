// The input has what the policy can read, and no more is built.

package engine

import (
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy"
)

func TestOnlyWhatThePolicyReadsIsBuilt(t *testing.T) {
	in := get("/orders/1")
	in.Query, in.Host, in.SourceAddress, in.DestinationAddress = "a=b", "orders", "10.0.0.1:1", "10.0.0.2:2"
	in.Headers = policy.HeaderMap{"accept": {"x", "y"}}
	tests := map[string][]part{
		"input.protocol == \"http\"":                                                                           nil,
		"input.parsed_path[0] == \"orders\"":                                                                   {parsedPath},
		"f(input.parsed_query)\n\nf(q) if q.a[0] == \"b\"":                                                     {parsedQuery},
		"input.attributes.request.http.headers.accept == \"x,y\"":                                              {requestHeaders},
		"input.attributes.request.http.headers_all.accept[_] == \"y\"":                                         {requestHeadersAll},
		"input.attributes.request.http.host == \"orders\"":                                                     {requestHost},
		"endswith(input.attributes.request.http.path, \"a=b\")":                                                {requestPath},
		"input.spiffe.source.path == \"/web\"":                                                                 {spiffeParts},
		"input.attributes.source.address.socketAddress.portValue == 1":                                         {sourceAddress},
		"input.attributes.destination.address.socketAddress.portValue == 2":                                    {destinationAddress},
		"count(input.attributes.request.http) == 5":                                                            {requestPath, requestHost, requestHeaders, requestHeadersAll},
		"input.attributes.request.http[k] == \"orders\"":                                                       {requestPath, requestHost, requestHeaders, requestHeadersAll},
		"count(input.attributes.source) == 2":                                                                  {sourceAddress},
		"f(input)\n\nf(x) if x.attributes.request.http.host == \"orders\"":                                     {0, 1, 2, 3, 4, 5, 6, 7, 8},
		"x\n\nx if input.attributes[\"request\"].http[y] == \"orders\"\n\ny := concat(\"\", [\"ho\", \"st\"])": {requestPath, requestHost, requestHeaders, requestHeadersAll},
	}
	for rego, want := range tests {
		e := load(t, nil, map[string]string{"a.rego": "package authz\n\nallow if " + rego + "\n"})
		var parts parts
		for _, p := range want {
			parts[p] = true
		}
		if e.parts != parts {
			t.Errorf("%s: parts %v; want %v", rego, e.parts, parts)
		}
		call := e.lookUp(in, e.now())
		document := e.input(in, &call).Value.(ast.Object)
		for p, place := range partPlaces {
			if _, err := document.Find(place[1:]); (err == nil) != parts[p] {
				t.Errorf("%s: %s is there: %v", rego, place, err == nil)
			}
		}
		if d := e.AuthorizeByOPA(t.Context(), in); d.Reason != policy.Allowed {
			t.Errorf("%s: %+v", rego, d)
		}
	}
}
