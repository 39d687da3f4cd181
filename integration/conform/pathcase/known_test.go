// Where other validators give another verdict, and why. The keys are cases.

package pathcase_test

// goSPIFFEDiffers: go-spiffe v2.9.0 accepts each of these.
var goSPIFFEDiffers = reasons(map[string][]string{
	"the leaf's keyUsage is looked at only for keyCertSign and cRLSign": {
		"key-usage/leaf-has-none", "key-usage/leaf-key-agreement-only", "key-usage/leaf-not-critical",
	},
	"keyUsage of authorities may be missing, or not critical": {
		"key-usage/intermediate-has-none", "key-usage/intermediate-not-critical", "key-usage/root-has-none", "key-usage/root-not-critical",
	},
	"basicConstraints of a leaf may be missing; those of authorities need not be critical": {
		"basic-constraints/leaf-has-none", "basic-constraints/intermediate-not-critical", "basic-constraints/root-not-critical",
	},
	"extended key usage is not looked at": {
		"extended-key-usage/leaf-any", "extended-key-usage/leaf-client-only", "extended-key-usage/leaf-code-signing", "extended-key-usage/leaf-empty", "extended-key-usage/leaf-server-only",
		"extended-key-usage/intermediate-any", "extended-key-usage/intermediate-client-only", "extended-key-usage/intermediate-client-only-leaf-open",
		"extended-key-usage/intermediate-code-signing", "extended-key-usage/intermediate-code-signing-leaf-open",
		"extended-key-usage/intermediate-server-only", "extended-key-usage/intermediate-server-only-leaf-open",
		"extended-key-usage/upper-intermediate-client-only", "extended-key-usage/upper-intermediate-code-signing", "extended-key-usage/upper-intermediate-server-only",
		"extended-key-usage/root-code-signing",
	},
	"the SPIFFE ID of a leaf may lack a path, and that of an authority may have one": {
		"uri-names/no-path", "trust-domains/intermediate-with-a-path", "trust-domains/root-with-a-path", "trust-domains/intermediate-of-two",
	},
	"URIs are taken from net/url, which forgets an empty fragment, and may have any length": {
		"uri-names/empty-fragment", "uri-names/too-long",
	},
	"certificates of the trust bundle authenticate as leaves": {"anchors/the-leaf"},
	"crypto/x509 reads over bytes behind a value": {
		"basic-constraints/leaf-trailing-bytes", "extended-key-usage/leaf-trailing-bytes", "other-names/trailing-bytes", "other-names/malformed-subject",
	},
	"crypto/x509 takes hosts below a permitted one": {
		"uri-constraints/intermediate-permits-parent", "uri-constraints/upper-intermediate-permits-parent", "uri-constraints/root-permits-parent",
	},
	"crypto/x509 links certificates by names, not by key IDs": {
		"links/leaf-names-another-key", "links/leaf-names-no-key", "links/leaf-names-another-certificate", "links/intermediate-names-another-key",
		"links/intermediate-without-key-id", "links/root-without-key-id",
	},
	"crypto/x509 does not mind authorities without a name": {"links/intermediate-without-a-name", "links/root-without-a-name"},
	"the SAN's criticality is not looked at":               {"other-names/not-critical-without-subject"},
	"keys may have any strength, and any length":           {"keys/p-224-leaf", "keys/p-224-intermediate", "keys/rsa-1024-leaf", "keys/rsa-1024-intermediate", "keys/rsa-1024-root", "keys/rsa-16384-leaf", "keys/rsa-16384-intermediate"},
	"chains may have any length":                           {"chains/nine-certificates", "chains/65-kib"},
})

// opensslDiffers: openssl 3.0, `verify -x509_strict -policy_check`.
var opensslDiffers = reasons(map[string][]string{
	"it reads over bytes behind a value, and behind a certificate": {
		"basic-constraints/leaf-trailing-bytes", "extended-key-usage/leaf-trailing-bytes", "other-names/trailing-bytes", "chains/trailing-bytes",
	},
	"an extension that it does not know may be there twice":                  {"extensions/twice"},
	"it tries one issuer of a name and key ID":                               {"signatures/both-of-that-name"},
	"the last second is over when it begins":                                 {"times/last-second"},
	"empty name constraints constrain nothing":                               {"uri-constraints/empty"},
	"an address is never excluded by a host":                                 {"uri-constraints/intermediate-excludes-another-than-an-address"},
	"the bytes of a URI are not looked at where nothing constrains its host": {"uri-names/not-ascii", "uri-names/letters-beyond-ascii", "uri-names/look-alike-trust-domain"},
})

func reasons(cases map[string][]string) map[string]string {
	byCase := make(map[string]string)
	for reason, ids := range cases {
		for _, id := range ids {
			byCase[id] = reason
		}
	}
	return byCase
}
