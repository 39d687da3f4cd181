# What grants cannot say: conditions on headers and on more than one field.
package authz

# Health checks may come from any service of our own trust domain.
allow if {
	input.spiffe.source.trust_domain == "shop.test"
	input.attributes.request.http.method == "GET"
	input.parsed_path == ["healthz"]
}

# Requests that a browser made on behalf of another site are not served.
deny if {
	input.attributes.request.http.headers["sec-fetch-site"] == "cross-site"
}
