package envoy.authz_test

import data.envoy.authz

call(source, path, headers) := {
	"attributes": {"source": {"principal": source}, "request": {"http": {"method": "GET", "headers": headers}}},
	"parsed_path": path,
}

web := "spiffe://shop.test/web"

support := "spiffe://shop.test/support"

test_own_orders if authz.allow with input as call(web, ["customers", "7", "orders"], {"x-customer": "7"})

test_one_of_them if authz.allow with input as call(web, ["customers", "7", "orders", "1"], {"x-customer": "7"})

test_those_of_others if not authz.allow with input as call(web, ["customers", "8", "orders"], {"x-customer": "7"})

test_for_nobody if not authz.allow with input as call(web, ["customers", "7", "orders"], {})

test_support if authz.allow with input as call(support, ["customers", "8", "orders"], {})

test_no_payments if not authz.allow with input as call(support, ["customers", "8", "payments"], {})
