# Paths with parts that vary: customers see their own orders, the front end says for
# whom it asks, and support sees everybody's, but none of their payments.
package envoy.authz

default allow := false

customer := input.attributes.request.http.headers["x-customer"]

allow if {
	input.attributes.source.principal == "spiffe://shop.test/web"
	input.attributes.request.http.method == "GET"
	["customers", id, "orders"] = input.parsed_path
	id == customer
}

allow if {
	input.attributes.source.principal == "spiffe://shop.test/web"
	["customers", id, "orders", _] = input.parsed_path
	id == customer
}

allow if {
	input.attributes.source.principal == "spiffe://shop.test/support"
	input.attributes.request.http.method == "GET"
	input.parsed_path[0] == "customers"
	not input.parsed_path[2] == "payments"
}
