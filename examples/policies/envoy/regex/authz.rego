# Regular expressions: what an order's number looks like, and which hosts are ours.
# Anchored on both ends, with the dot of the domain escaped.
package envoy.authz

default allow := false

allow if {
	regex.match(`^([a-z0-9-]+\.)?shop\.test(:[0-9]+)?$`, input.attributes.request.http.host)
	regex.match(`^/orders/[0-9]{4,12}(\?.*)?$`, input.attributes.request.http.path)
	input.attributes.request.http.method in ["GET", "PATCH"]
}
