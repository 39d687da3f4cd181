package authz_test

import data.authz

health := {
	"attributes": {"request": {"http": {"method": "GET", "headers": {}}}},
	"parsed_path": ["healthz"],
	"spiffe": {"source": {"trust_domain": "shop.test"}},
}

test_own_services_check_health if authz.allow with input as health

test_others_do_not if {
	not authz.allow with input as object.union(health, {"spiffe": {"source": {"trust_domain": "partner.test"}}})
}

test_cross_site_is_denied if {
	authz.deny with input as {"attributes": {"request": {"http": {"headers": {"sec-fetch-site": "cross-site"}}}}}
}

test_same_site_is_not_denied if {
	not authz.deny with input as health
}
