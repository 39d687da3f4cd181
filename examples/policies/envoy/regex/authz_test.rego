package envoy.authz_test

import data.envoy.authz

call(host, path) := {"attributes": {"request": {"http": {"method": "GET", "host": host, "path": path}}}}

test_an_order if authz.allow with input as call("orders.shop.test:8443", "/orders/2026?lines=1")

test_no_number if not authz.allow with input as call("shop.test", "/orders/all")

test_a_host_that_looks_alike if not authz.allow with input as call("shopXtest", "/orders/2026")

test_a_host_below_another if not authz.allow with input as call("shop.test.evil.test", "/orders/2026")
