package envoy.authz_test

import data.envoy.authz

call(method, path) := {"attributes": {"request": {"http": {"method": method}}}, "parsed_path": [path]}

test_reads if {
	answer := authz.allow with input as call("GET", "catalogue")
	answer.allowed
	answer.headers["x-policy"] == "catalogue"
}

test_writes_are_refused if {
	answer := authz.allow with input as call("POST", "catalogue")
	not answer.allowed
	answer.http_status == 405
}

test_the_rest_logs_in if {
	answer := authz.allow with input as call("GET", "orders")
	not answer.allowed
	answer.headers.location == "https://login.shop.test/"
}
