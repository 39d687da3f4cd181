package envoy.authz_test

import data.envoy.authz

call(source, destination) := {"attributes": {
	"source": {"principal": source},
	"destination": {"principal": destination},
}}

test_web_calls_orders if authz.allow with input as call("spiffe://shop.test/web", "spiffe://shop.test/orders")

test_web_does_not_call_stock if {
	not authz.allow with input as call("spiffe://shop.test/web", "spiffe://shop.test/stock")
}

test_payments_call_the_ledger if {
	authz.allow with input as call("spiffe://shop.test/ns/payments/card", "spiffe://shop.test/ledger")
}

test_a_name_that_begins_alike if {
	not authz.allow with input as call("spiffe://shop.test/ns/payments-evil/card", "spiffe://shop.test/ledger")
}
