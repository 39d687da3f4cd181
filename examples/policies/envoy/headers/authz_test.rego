package envoy.authz_test

import data.envoy.authz

call(method, headers) := {"attributes": {"request": {"http": {"method": method, "headers": headers}}}}

test_reads if authz.allow with input as call("GET", {"x-api-version": "3"})

test_writes_json if {
	authz.allow with input as call("PUT", {"x-api-version": "2", "content-type": "Application/JSON; charset=utf-8"})
}

test_old_version if not authz.allow with input as call("GET", {"x-api-version": "1"})

test_no_version if not authz.allow with input as call("GET", {})

test_form if not authz.allow with input as call("POST", {"x-api-version": "3", "content-type": "text/plain"})
