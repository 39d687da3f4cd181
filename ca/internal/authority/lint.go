// Looks at the very bytes that are about to be signed and compares them with the
// profile and the request. The request says what was meant; only the encoded
// certificate says what will be trusted, and it cannot be taken back. What reads
// them (lintread.go) shares nothing with what wrote them.

package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"slices"

	"golang.org/x/crypto/cryptobyte"
	cryptobyte_asn1 "golang.org/x/crypto/cryptobyte/asn1"

	"merlon.dev/sdk/svid"
)

// LintError says which rule of the profile a certificate would have broken.
type LintError struct {
	Rule   string // number of SECURITY.md, e.g. "X1"
	Reason string
}

// Error implements error.
func (e *LintError) Error() string {
	return fmt.Sprintf("refused to sign: certificate breaks %s: %s", e.Rule, e.Reason)
}

// The extensions of a leaf, by the bytes of their object identifiers, and whether
// each is critical. A SAN is critical where the subject is empty (X5).
const (
	extKeyUsage         = "\x55\x1d\x0f" // 2.5.29.15
	extExtKeyUsage      = "\x55\x1d\x25" // 2.5.29.37
	extBasicConstraints = "\x55\x1d\x13" // 2.5.29.19
	extSubjectKeyID     = "\x55\x1d\x0e" // 2.5.29.14
	extAuthorityKeyID   = "\x55\x1d\x23" // 2.5.29.35
	extSAN              = "\x55\x1d\x11" // 2.5.29.17
)

var leafExtensions = map[string]bool{
	extKeyUsage: true, extBasicConstraints: true, // X10
	extExtKeyUsage: false, extSubjectKeyID: false, extAuthorityKeyID: false, extSAN: false,
}

type lintRule struct {
	rule, reason string
	broken       func(l linted) bool
}

// linted is what the rules look at.
type linted struct {
	*leafBody
	req    LeafRequest
	want   leafValues
	issuer *x509.Certificate
}

var leafRules = []lintRule{
	{"X1", "it does not have exactly one URI SAN, the SPIFFE ID of the request", func(l linted) bool {
		_, uris, ok := l.names()
		return ok && (len(uris) != 1 || uris[0] != l.req.SPIFFEID.String())
	}},
	{"X1", "it has other names than the request", func(l linted) bool {
		dns, _, ok := l.names()
		return !ok || !slices.Equal(dns, l.req.DNSNames)
	}},
	{"X3", "its SPIFFE ID has no path", func(l linted) bool {
		return l.req.SPIFFEID.Path() == ""
	}},
	{"X5", "its subject is not the common name of the request alone", func(l linted) bool {
		cn, ok := l.commonName()
		return !ok || cn != l.req.CommonName
	}},
	{"X8", "it is a signing certificate", func(l linted) bool {
		return string(l.value(extBasicConstraints)) != "\x30\x00" // cA is false by default
	}},
	{"X11", "its keyUsage is not digitalSignature alone", func(l linted) bool {
		return string(l.value(extKeyUsage)) != "\x03\x02\x07\x80"
	}},
	{"X12", "its extended key usage is not serverAuth and clientAuth", func(l linted) bool {
		return string(l.value(extExtKeyUsage)) != "\x30\x14\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x01\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x02"
	}},
	{"X13", "its subject key ID is not that of its key, or its authority key ID not the issuer's", func(l linted) bool {
		ski, aki := cryptobyte.String(l.value(extSubjectKeyID)), cryptobyte.String(l.value(extAuthorityKeyID))
		var subject, ids, issuer cryptobyte.String
		ok := ski.ReadASN1(&subject, cryptobyte_asn1.OCTET_STRING) && ski.Empty() &&
			aki.ReadASN1(&ids, cryptobyte_asn1.SEQUENCE) && aki.Empty() && ids.ReadASN1(&issuer, tagKeyID) && ids.Empty()
		return !ok || len(subject) == 0 || !bytes.Equal(subject, l.want.key.id) ||
			len(issuer) == 0 || !bytes.Equal(issuer, l.issuer.SubjectKeyId)
	}},
	{"X13", "its issuer is not the subject of the issuing certificate", func(l linted) bool {
		return !bytes.Equal(l.leafBody.issuer, l.issuer.RawSubject)
	}},
	{"X13", "it is valid outside the time of its issuer, or not as it was meant", func(l linted) bool {
		return l.notBefore.Before(l.issuer.NotBefore) || l.notAfter.After(l.issuer.NotAfter) ||
			!l.notBefore.Equal(l.want.notBefore) || !l.notAfter.Equal(l.want.notAfter) || !l.notBefore.Before(l.notAfter)
	}},
	{"X13", "its public key is not the one of the request", func(l linted) bool {
		return !sameKey(l.key, l.req.PublicKey)
	}},
	{"X13", "its public key is its issuer's", func(l linted) bool {
		return bytes.Equal(l.key, l.issuer.RawSubjectPublicKeyInfo)
	}},
	{"X13", "its signature algorithm does not fit its issuer's key", func(l linted) bool {
		return !bytes.Equal(l.algorithm, algorithmOf(l.issuer.PublicKey))
	}},
	{"T44", "its serial number is not the one of the request, at most 159 bits", func(l linted) bool {
		serial, ok := svid.SerialFromBig(l.serial)
		return !ok || serial != l.req.Serial
	}},
}

// lintLeaf judges the bytes tbs of a certificate for req, made of the values
// want, below issuer.
func lintLeaf(tbs []byte, req LeafRequest, want leafValues, issuer *x509.Certificate) error {
	c, err := readLeaf(tbs)
	if err != nil {
		return &LintError{Rule: "X13", Reason: err.Error()}
	}
	if err := lintExtensions(c); err != nil {
		return err
	}
	l := linted{c, req, want, issuer}
	for _, rule := range leafRules {
		if rule.broken(l) {
			return &LintError{Rule: rule.rule, Reason: rule.reason}
		}
	}
	return nil
}

// algorithmOf is the AlgorithmIdentifier that a key of an authority signs with;
// nil where it must not sign.
func algorithmOf(pub crypto.PublicKey) []byte {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		return map[elliptic.Curve][]byte{elliptic.P256(): ecdsaWithSHA256, elliptic.P384(): ecdsaWithSHA384}[key.Curve]
	case *rsa.PublicKey:
		return rsaWithSHA256
	}
	return nil
}

// sameKey asks the standard library what pub looks like: the writer knows by
// itself for P-256 and P-384.
func sameKey(info []byte, pub crypto.PublicKey) bool {
	want, err := x509.MarshalPKIXPublicKey(pub)
	return err == nil && bytes.Equal(info, want)
}

func lintExtensions(c *leafBody) error {
	if c.version != 2 { // counted from 0
		return &LintError{Rule: "X13", Reason: "it is not version 3"}
	}
	for _, ext := range c.extensions {
		critical, known := leafExtensions[ext.oid]
		if ext.oid == extSAN {
			critical = len(c.subject) == len(emptySubject)
		}
		switch {
		case !known:
			return &LintError{Rule: "X13", Reason: fmt.Sprintf("it has an extension %x, which the profile does not", ext.oid)}
		case ext.critical != critical:
			return &LintError{Rule: "X10", Reason: fmt.Sprintf("its extension %x has critical=%t", ext.oid, ext.critical)}
		}
	}
	if n := len(c.extensions); n != len(leafExtensions) { // none is there twice
		return &LintError{Rule: "X10", Reason: fmt.Sprintf("it has %d extensions; the profile has %d", n, len(leafExtensions))}
	}
	return nil
}
