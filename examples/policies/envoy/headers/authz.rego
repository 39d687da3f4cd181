# Conditions on header fields: clients say which version of the API they speak,
# and what they send is JSON.
package envoy.authz

default allow := false

headers := input.attributes.request.http.headers

allow if {
	supported
	acceptable
}

supported if headers["x-api-version"] in {"2", "3"}

acceptable if input.attributes.request.http.method in {"GET", "HEAD"}

acceptable if {
	input.attributes.request.http.method in {"POST", "PUT"}
	startswith(lower(headers["content-type"]), "application/json")
}
