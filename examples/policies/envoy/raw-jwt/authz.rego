# What is refused, with the reason: a token that the policy decodes by itself is one
# that nobody has verified. See claims for the same by input.jwt.
package envoy.authz

default allow := false

allow if {
	token := trim_prefix(input.attributes.request.http.headers.authorization, "Bearer ")
	[_, payload, _] := io.jwt.decode(token)
	payload.sub == "spiffe://shop.test/jobs/invoices"
}
