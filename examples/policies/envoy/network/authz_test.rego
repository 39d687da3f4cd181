package envoy.authz_test

import data.envoy.authz

call(address, path) := {
	"attributes": {"source": {
		"principal": "spiffe://shop.test/web",
		"address": {"socketAddress": {"address": address, "portValue": 40112}},
	}},
	"parsed_path": [path],
}

test_monitoring if authz.allow with input as call("10.20.1.1", "metrics")

test_monitoring_by_ipv6 if authz.allow with input as call("fd00:20::1", "metrics")

test_inside_but_not_monitoring if not authz.allow with input as call("10.21.1.1", "metrics")

test_inside if authz.allow with input as call("10.21.1.1", "orders")

test_outside if not authz.allow with input as call("192.0.2.1", "orders")
