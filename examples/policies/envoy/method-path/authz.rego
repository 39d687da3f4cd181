# Who may do what, by method and path: anybody looks at the catalogue and asks
# for health, the web front end places orders.
package envoy.authz

default allow := false

allow if {
	input.attributes.request.http.method == "GET"
	input.parsed_path[0] in {"catalogue", "healthz"}
}

allow if {
	input.attributes.source.principal == "spiffe://shop.test/web"
	input.attributes.request.http.method == "POST"
	input.parsed_path == ["orders"]
}
