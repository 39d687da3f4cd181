package envoy.authz_test

import data.envoy.authz

page(query) := {
	"attributes": {"source": {"principal": "spiffe://shop.test/web"}, "request": {"http": {"method": "GET"}}},
	"parsed_path": ["orders"],
	"parsed_query": query,
}

test_a_page if authz.allow with input as page({"size": ["50"]})

test_no_size if not authz.allow with input as page({})

test_a_size_of_its_own if not authz.allow with input as page({"size": ["100000"]})

test_deleted_ones if not authz.allow with input as page({"size": ["50"], "deleted": ["false", "true"]})
