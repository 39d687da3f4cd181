# Addresses: the metrics are for the monitoring network, and for services of our own
# trust domain that call from inside.
package envoy.authz

default allow := false

address := input.attributes.source.address.socketAddress.address

monitoring := ["10.20.0.0/16", "fd00:20::/32"]

allow if {
	input.parsed_path == ["metrics"]
	some network in monitoring
	net.cidr_contains(network, address)
}

allow if {
	startswith(input.attributes.source.principal, "spiffe://shop.test/")
	input.parsed_path[0] != "metrics"
	net.cidr_contains("10.0.0.0/8", address)
}
