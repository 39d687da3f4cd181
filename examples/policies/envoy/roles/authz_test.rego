package envoy.authz_test

import data.envoy.authz

call(source, method, path) := {
	"attributes": {"source": {"principal": source}, "request": {"http": {"method": method}}},
	"parsed_path": [path],
}

test_readers_read if authz.allow with input as call("spiffe://shop.test/report", "GET", "orders")

test_readers_buy_nothing if not authz.allow with input as call("spiffe://shop.test/report", "POST", "orders")

test_two_roles if authz.allow with input as call("spiffe://shop.test/web", "POST", "orders")

test_no_role if not authz.allow with input as call("spiffe://shop.test/cart", "GET", "orders")
