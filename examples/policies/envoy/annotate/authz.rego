# An object with parts of the call in it: the service behind learns which team
# called, and never by what the caller says of itself; who may not call is told the
# path that it may not have.
package envoy.authz

default allowed := false

teams := {
	"spiffe://shop.test/web": "storefront",
	"spiffe://shop.test/report": "finance",
}

team := teams[input.attributes.source.principal]

allowed if {
	team == "storefront"
	input.parsed_path[0] in {"catalogue", "orders"}
}

allowed if {
	team == "finance"
	input.attributes.request.http.method == "GET"
}

headers["x-team"] := team if allowed

headers["x-refused"] := concat("/", array.concat([""], input.parsed_path)) if not allowed

status := 200 if allowed

status := 404 if not allowed

allow := {
	"allowed": allowed,
	"http_status": status,
	"headers": headers,
	"request_headers_to_remove": ["x-team"],
}
