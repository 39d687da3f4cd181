package envoy.authz_test

import data.envoy.authz

call(source, method, path) := {
	"attributes": {"source": {"principal": source}, "request": {"http": {"method": method}}},
	"parsed_path": path,
}

test_the_team_is_said if {
	answer := authz.allow with input as call("spiffe://shop.test/web", "POST", ["orders"])
	answer.allowed
	answer.headers == {"x-team": "storefront"}
}

test_the_path_is_said if {
	answer := authz.allow with input as call("spiffe://shop.test/report", "PUT", ["orders", "1"])
	not answer.allowed
	answer.http_status == 404
	answer.headers == {"x-refused": "/orders/1"}
}
