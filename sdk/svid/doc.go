// Package svid decides whether a document proves a SPIFFE ID. The CA, the
// agent and the SDK judge every peer with it.
//
// Start with [TLS], which builds mutual-TLS configurations around the verifier.
// [VerifyChain] and [VerifyJWT] judge a single X509-SVID or JWT-SVID; [Trust] does the
// same for many, and knows chains again.
// [Revocations] says which SVIDs were withdrawn before they expired, by means of
// the [Serial] number that Merlon gives to each.
//
// go-spiffe v2.9.0 accepts documents that the standard tells a validator to
// refuse: a leaf without a path, without keyUsage, without basicConstraints, a
// JWT-SVID with a jku header or a sub without a path. Its verdict is necessary
// here and never sufficient. The rules carry the numbers of SECURITY.md: X1-X17
// for X509-SVIDs, J1-J13 for JWT-SVIDs, ID1-ID8 for SPIFFE IDs.
package svid
