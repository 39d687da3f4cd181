// The checklist: every requirement of the SPIFFE standards that can be put to an
// implementation, by number, and of what it is one. X: X509-SVID, J: JWT-SVID, W:
// WIT-SVID, ID: SPIFFE-ID, B: trust bundle, F: federation, E: Workload Endpoint and API,
// K: broker.

package main

// part is what a requirement is put to. A requirement of several is kept when each of
// them keeps it.
type part string

const (
	issuer   part = "issuer"              // what is in X509-SVIDs, JWT-SVIDs and bundles: --socket
	api      part = "Workload API"        // --socket
	tokens   part = "JWT-SVID validator"  // ValidateJWTSVID: --socket and --forge
	chains   part = "X509-SVID validator" // --server or --serve, and --forge
	endpoint part = "bundle endpoint"     // --bundle-url
	consumer part = "bundle consumer"     // --consumer
)

// row is one requirement.
type row struct {
	ID    string
	Must  bool // else SHOULD, MAY, or advice
	Title string
	// Parts are what it is put to; none: cannot says why.
	Parts []part
}

var checklist = []row{
	{"ID1", true, "scheme spiffe, a trust domain, no query, no fragment (SPIFFE-ID §2)", []part{issuer, chains, tokens}},
	{"ID2", true, "no user, no port, not even empty ones (§2.1)", []part{issuer, chains, tokens}},
	{"ID3", true, "trust domains of a-z 0-9 . _ - only (§2.1)", []part{issuer, chains, tokens}},
	{"ID4", true, "trust domains that look like addresses or DNS names are treated like others (§2.1)", nil},
	{"ID5", true, "paths of non-empty segments of a-z A-Z 0-9 . _ -, none of them . or .. (§2.2)", []part{issuer, chains, tokens}},
	{"ID6", true, "SPIFFE IDs of 2048 bytes work (§2.3)", []part{issuer, chains}},
	{"ID7", false, "trust domain names have at most 255 bytes (§2.3)", []part{chains}},
	{"ID8", false, "the scheme compares without case, the path with it (§2.4)", []part{chains}},
	{"ID9", true, "signing authorities of the trust domain, with SPIFFE IDs without path (§3.1)", []part{issuer}},
	{"ID10", true, "SPIFFE ID and public key are inside of what is signed (§3.2)", []part{chains, tokens}},
	{"ID11", true, "nothing but the defined documents is an SVID (§3.3)", []part{chains, tokens}},

	{"X1", true, "an issued X509-SVID has exactly one URI SAN (X509-SVID §2)", []part{issuer}},
	{"X2", true, "a validator refuses more than one (§5.2)", []part{chains}},
	{"X3", true, "the SPIFFE ID of a leaf has a path (§3.1)", []part{issuer}},
	{"X4", true, "a validator refuses one without (§5.2)", []part{chains}},
	{"X5", true, "the SAN is critical where the subject is empty (RFC 5280 §4.2.1.6)", []part{issuer, chains}},
	{"X6", false, "signing certificates are SVIDs, without a path (§3.2)", []part{issuer, chains}},
	{"X7", true, "signing certificates authenticate nobody (§3.2)", []part{chains}},
	{"X8", true, "cA is true in signing certificates, false in leaves (§4.1)", []part{issuer, chains}},
	{"X9", true, "name constraints on URIs are honoured (§4.2)", []part{chains}},
	{"X10", true, "keyUsage is there, and critical (§4.3)", []part{issuer, chains}},
	{"X11", true, "keyCertSign in signing certificates, digitalSignature in leaves and neither keyCertSign nor cRLSign (§4.3)", []part{issuer, chains}},
	{"X12", false, "extended key usage has serverAuth and clientAuth (§4.4)", []part{issuer, chains}},
	{"X13", true, "path validation by RFC 5280 (§5.1)", []part{chains}},
	{"X14", true, "a validator refuses cA, keyCertSign, cRLSign and other schemes in a leaf (§5.2)", []part{chains}},
	{"X15", true, "X.509 authorities in bundles: use x509-svid, no kid, x5c of exactly one certificate (§6.1)", []part{endpoint}},
	{"X16", true, "entries without x5c are ignored, and what follows its first certificate (§6.2)", []part{consumer}},
	{"X17", true, "an SVID is judged by the bundle of its own trust domain only (Federation §7.3)", []part{chains}},

	{"J1", true, "compact JWS only (JWT-SVID §1, §5.1)", []part{issuer, tokens}},
	{"J2", true, "no header but alg, kid and typ (§2)", []part{issuer, tokens}},
	{"J3", true, "alg is one of RS, ES and PS with 256, 384 or 512 (§2.1)", []part{issuer, tokens}},
	{"J4", true, "typ is JWT or JOSE where it is there (§2.3)", []part{issuer, tokens}},
	{"J5", true, "sub is the SPIFFE ID of a workload (§3.1)", []part{issuer, tokens}},
	{"J6", true, "aud is there, and names the validator (§3.2)", []part{issuer, tokens}},
	{"J7", false, "one audience (§3.2)", []part{issuer}},
	{"J8", true, "exp is there, and ahead (§3.3)", []part{issuer, tokens}},
	{"J9", true, "claims are processed by RFC 7519 (§4)", []part{tokens}},
	{"J10", false, "transmission as a bearer token (§5.2)", nil},
	{"J11", true, "JWT authorities in bundles: use jwt-svid, and a kid (§6.1)", []part{endpoint}},
	{"J12", true, "only keys of use jwt-svid of the trust domain validate (§6.2)", []part{tokens}},
	{"J13", false, "aud as a string or as a list", []part{issuer, tokens}},

	{"W1", true, "kid is there, unique for its key (WIT-SVID §2.1)", nil},
	{"W2", true, "typ is wit+jwt (§2.2)", nil},
	{"W3", true, "alg as of a JWT-SVID (§2.3)", nil},
	{"W4", false, "no other headers (§2.4)", nil},
	{"W5", true, "sub and cnf (§3.1)", nil},
	{"W6", true, "jti does not collide (§3.3)", nil},
	{"W7", true, "exp is ahead (§3.4)", nil},
	{"W8", false, "iss is no OpenID provider (§3.7)", nil},
	{"W9", true, "no aud (§3.8)", nil},
	{"W10", true, "proof of possession is demanded (§4)", nil},
	{"W11", true, "it is no bearer token (§5)", nil},
	{"W12", false, "proofs are short-lived (§5)", nil},
	{"W13", true, "WIT authorities in bundles: use wit-svid, and a kid (§6.1)", []part{endpoint}},
	{"W14", true, "only over secure channels (§7.3)", nil},
	{"W15", true, "without the profile its RPCs answer Unimplemented (Workload API §7)", []part{api}},

	{"B1", true, "members of a JWKS that the standard does not define are not required (Trust domain and bundle §4.1)", []part{consumer}},
	{"B2", true, "spiffe_sequence is a number that rises with every change (§4.1.1)", []part{endpoint}},
	{"B3", true, "spiffe_refresh_hint is a number of seconds (§4.1.2)", []part{endpoint}},
	{"B4", true, "keys is there (§4.1.3)", []part{endpoint}},
	{"B5", true, "entries of unknown kty or use are ignored (§4.1.3)", []part{consumer}},
	{"B6", true, "an empty bundle makes its trust domain's SVIDs untrusted (§4.1.3)", []part{consumer}},
	{"B7", false, "no parameters that no standard defines (§4.2)", []part{endpoint}},
	{"B8", true, "a map of bundles names each trust domain once (§5.1.1)", nil},
	{"B9", false, "a key is one trust domain's, and one use's (§6.2)", []part{issuer, endpoint}},
	{"B10", false, "without a hint bundles are fetched every 5 minutes (§6.1)", []part{consumer}},

	{"F-1", true, "keys are published before they sign (Federation §4.1)", nil},
	{"F-2", false, "keys are withdrawn when nothing depends on them (§4.1)", nil},
	{"F-3", false, "polling by the refresh hint (§4.1)", []part{consumer}},
	{"F-4", false, "the latest bundle is kept, by its sequence (§4.2)", []part{consumer}},
	{"F-5", true, "bundles of different trust domains are not merged (§4.2)", []part{consumer}},
	{"F-6", true, "https_web or https_spiffe, over TLS of today (§5)", []part{endpoint, consumer}},
	{"F-7", true, "URL, profile and trust domain are configured, none is inferred (§5.1)", nil},
	{"F-8", true, "workloads learn which trust domain a bundle is of (§5.1)", []part{api}},
	{"F-9", true, "the URL is https, without a user, also where a redirect leads (§5.2.1.1)", []part{consumer}},
	{"F-10", true, "no client authentication (§5.2.1.3)", []part{endpoint}},
	{"F-11", true, "the newest bundle, in UTF-8, as application/json (§5.2.1.3)", []part{endpoint}},
	{"F-12", false, "temporary redirects only (§5.2.1.4)", []part{endpoint, consumer}},
	{"F-13", true, "https_web: the server's name is checked (§5.2.1.4)", []part{consumer}},
	{"F-14", true, "https_spiffe: the server's X509-SVID has the configured SPIFFE ID (§5.2.2.3)", []part{endpoint, consumer}},
	{"F-15", true, "https_spiffe: the latest bundle verifies the server (§5.2.2.4)", []part{consumer}},
	{"F-16", false, "a relationship that is deleted reaches validators (§6.3)", nil},
	{"F-17", false, "every fetch is logged (§7.6)", nil},

	{"E1", true, "gRPC over a Unix domain socket, or TCP (Workload Endpoint §3)", []part{api}},
	{"E2", true, "calls without the header workload.spiffe.io: true are refused with InvalidArgument (§3)", []part{api}},
	{"E3", true, "no TLS and no client authentication is required (§3.1)", []part{api}},
	{"E4", false, "hosts do not share an endpoint (§2)", nil},
	{"E5", true, "clients read SPIFFE_ENDPOINT_SOCKET (§4)", nil},
	{"E6", true, "status codes (§6)", []part{api}},
	{"E7", true, "the service has the standard's methods and no others (§7)", []part{api}},
	{"E8", false, "gRPC reflection (§7)", []part{api}},
	{"E9", true, "X.509 and JWT profiles (Workload API §1)", []part{api}},
	{"E10", true, "the first message comes at once, and each is complete (§4.3)", []part{api}},
	{"E11", true, "clients unload what a message no longer has (§4.4)", nil},
	{"E12", false, "mandatory fields that are missing: InvalidArgument (§4.5)", []part{api}},
	{"E13", true, "X509-SVIDs: leaf first, key in PKCS #8, hints unique (§5)", []part{api}},
	{"E14", true, "bundles have the workload's own trust domain (§5.2.2, §6.2.2)", []part{api}},
	{"E15", true, "JWT-SVIDs: for the audience that was asked, for entitled SPIFFE IDs; JWKS of JWT keys only (§6.2)", []part{api}},
	{"E16", true, "ValidateJWTSVID judges by the JWT-SVID standard (§6.2.3)", []part{api, tokens}},
	{"E17", false, "PermissionDenied without an identity (§5.2.1)", nil},
	{"E18", false, "the first SVID is the default; hints have at most 1024 bytes (§5.2.1)", []part{api}},
	{"E19", true, "a JWT-SVID is judged by the bundle of its subject's trust domain only (§6.3)", []part{tokens}},
	{"E20", true, "the service is named SpiffeWorkloadAPI, without a package", []part{api}},
	{"E21", true, "entitlement is checked again before every later message (App. A.6)", nil},

	{"K1", true, "broker: gRPC with the header broker.spiffe.io: true", nil},
	{"K2", true, "broker: mutual TLS, allowed SPIFFE IDs only", nil},
	{"K3", false, "broker: out of reach of workloads", nil},
	{"K4", true, "broker: the RPCs of the Workload API", nil},
	{"K5", true, "broker: exactly one reference", nil},
	{"K6", true, "broker: no references across nodes", nil},
	{"K7", true, "broker: key and uid match", nil},
	{"K8", true, "broker: status codes", nil},
	{"K9", true, "broker: streams end with the workload", nil},
	{"K10", true, "broker: answers are for one workload", nil},
	{"K11", true, "broker: rules of streams", nil},
}

// cannot are the requirements that are not checked, and why: somebody has to act in the
// middle of a run, or it is about something that no flag names.
var cannot = map[string]string{
	"ID4":  "an implementation is of one trust domain: run against one whose name is 10.0.0.1, a..b or -",
	"J10":  "it is about clients of services, and no flag names one",
	"B8":   "no target serves a map of bundles (§5.1.1): the Workload API has a map of protobuf, in which no name is twice",
	"F-1":  "it takes a rotation while this runs",
	"F-2":  "it takes a rotation while this runs",
	"F-7":  "it is about how a relationship is configured: leave out the URL, the profile and the trust domain, one at a time",
	"F-16": "it takes an operator who removes a relationship while this runs",
	"F-17": "it is about logs",
	"E4":   "it is about how the implementation is deployed",
	"E5":   "it is about clients of the Workload API, and no flag names one",
	"E11":  "it is about clients of the Workload API, and no flag names one",
	"E17":  "it takes a process without an entry, and an operator who deletes one under an open stream",
	"E21":  "it takes an operator who changes an entry under an open stream",
}

// incubating says why nothing of a profile is checked that is not stable yet.
func incubating(id string) string {
	switch id[0] {
	case 'W':
		return "the WIT-SVID profile is Incubating: only W15 is checked, that its RPCs answer Unimplemented where it is not there"
	case 'K':
		return "the Broker API is Incubating"
	}
	return ""
}
