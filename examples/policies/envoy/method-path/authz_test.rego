package envoy.authz_test

import data.envoy.authz

call(source, method, path) := {
	"attributes": {"source": {"principal": source}, "request": {"http": {"method": method}}},
	"parsed_path": path,
}

test_anybody_looks if authz.allow with input as call("spiffe://shop.test/cart", "GET", ["catalogue", "1"])

test_web_orders if authz.allow with input as call("spiffe://shop.test/web", "POST", ["orders"])

test_others_do_not if not authz.allow with input as call("spiffe://shop.test/cart", "POST", ["orders"])

test_nothing_else if not authz.allow with input as call("spiffe://shop.test/web", "GET", ["orders"])
