# On behalf of a user or job: the claims of a JWT-SVID that came with the call, which
# the agent has verified for the called service. A policy that reads raw tokens is
# changed to this.
package envoy.authz

default allow := false

allow if {
	input.jwt.sub == "spiffe://shop.test/jobs/invoices"
	input.attributes.request.http.method == "GET"
	input.parsed_path[0] == "ledger"
}

allow if {
	startswith(input.jwt.sub, "spiffe://shop.test/jobs/")
	"spiffe://shop.test/orders" in input.jwt.aud
	input.parsed_path == ["healthz"]
}
