package envoy.authz_test

import data.envoy.authz

call(claims, path) := {
	"attributes": {"request": {"http": {"method": "GET"}}},
	"parsed_path": [path],
	"jwt": claims,
}

invoices := {"sub": "spiffe://shop.test/jobs/invoices", "aud": ["spiffe://shop.test/orders"]}

test_the_job_reads if authz.allow with input as call(invoices, "ledger")

test_another_job_does_not if {
	not authz.allow with input as call(object.union(invoices, {"sub": "spiffe://shop.test/jobs/mail"}), "ledger")
}

test_without_a_token if not authz.allow with input as object.remove(call(invoices, "ledger"), ["jwt"])
