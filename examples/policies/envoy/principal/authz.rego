# A mesh: which service calls which, by the SPIFFE IDs of both ends. Names are
# compared whole or by whole segments, so that ns/payments-evil is not in
# ns/payments.
package envoy.authz

default allow := false

source := input.attributes.source.principal

destination := input.attributes.destination.principal

callers := {
	"spiffe://shop.test/orders": {"spiffe://shop.test/web", "spiffe://shop.test/cart"},
	"spiffe://shop.test/stock": {"spiffe://shop.test/orders"},
}

allow if source in callers[destination]

allow if {
	destination == "spiffe://shop.test/ledger"
	startswith(source, "spiffe://shop.test/ns/payments/")
}
