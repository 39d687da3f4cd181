# Conditions on the query: lists are read in pages of a known size, and only the
# administration sees what was deleted.
package envoy.authz

default allow := false

sizes := {"10", "50", "100"}

allow if {
	input.attributes.request.http.method == "GET"
	input.parsed_path == ["orders"]
	input.parsed_query.size[0] in sizes
	not asks_for_deleted
}

allow if {
	input.attributes.source.principal == "spiffe://shop.test/admin"
	input.parsed_path == ["orders"]
}

asks_for_deleted if "true" in input.parsed_query.deleted
