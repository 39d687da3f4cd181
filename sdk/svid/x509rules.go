// The rules of the X509-SVID standard, one check each, by the numbers of
// SECURITY.md §1.2. What the standard demands of issuers is demanded of the
// document here too: an authority that breaks it is not one to trust.

package svid

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	oidStandard         = asn1.ObjectIdentifier{2, 5, 29} // what is below it
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidAuthorityKeyID   = asn1.ObjectIdentifier{2, 5, 29, 35}
)

// leafID reads the SPIFFE ID of a leaf: X2, X4, X14 and the ID rules.
func leafID(leaf *x509.Certificate) (spiffeid.ID, error) {
	id, err := certID(leaf)
	switch {
	case err != nil:
		return spiffeid.ID{}, err
	case id.IsZero():
		return spiffeid.ID{}, refuse("X14", "the certificate has no URI SAN, so it carries no SPIFFE ID")
	case id.Path() == "":
		return spiffeid.ID{}, refuse("X4", "SPIFFE ID %q has no path: that names a trust domain, not a workload", id)
	}
	return id, nil
}

// certID reads the SPIFFE ID of any certificate from the bytes of its SAN. Zero:
// it has no URI SAN. crypto/x509 parses URIs leniently (an empty fragment is
// lost, for instance), so what it parsed has to be what is written.
func certID(cert *x509.Certificate) (spiffeid.ID, error) {
	uris, err := uriSANs(cert)
	switch {
	case err != nil:
		return spiffeid.ID{}, &Error{Rule: "X2", Reason: "the SAN extension does not parse", Err: err}
	case len(uris) != len(cert.URIs):
		return spiffeid.ID{}, refuse("X2", "the SAN extension reads differently to crypto/x509")
	case len(uris) == 0:
		return spiffeid.ID{}, nil
	case len(uris) > 1:
		return spiffeid.ID{}, refuse("X2", "the certificate has %d URI SANs; an X509-SVID has exactly one", len(uris))
	case len(uris[0]) > MaxIDBytes:
		return spiffeid.ID{}, refuse("ID6", "the SPIFFE ID has %d bytes; the longest has %d", len(uris[0]), MaxIDBytes)
	}
	text := uris[0]
	if scheme, rest, ok := strings.Cut(text, ":"); ok && strings.EqualFold(scheme, "spiffe") {
		text = "spiffe:" + rest // ID8: the scheme compares case-insensitively
	} else {
		return spiffeid.ID{}, refuse("X14", "URI SAN %q does not have the scheme spiffe", uris[0])
	}
	id, err := spiffeid.FromString(text)
	if err != nil {
		return spiffeid.ID{}, &Error{Rule: "ID5", Reason: fmt.Sprintf("URI SAN %q is not a SPIFFE ID", uris[0]), Err: err}
	}
	if len(id.TrustDomain().Name()) > 255 {
		return spiffeid.ID{}, refuse("ID7", "the trust domain name has more than 255 bytes")
	}
	return id, nil
}

// uriSANs gives the URI names of the SAN extension as they are written.
func uriSANs(cert *x509.Certificate) ([]string, error) {
	der, _, ok := extension(cert, oidSubjectAltName)
	if !ok {
		return nil, nil
	}
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &names); err != nil {
		return nil, err
	} else if len(rest) > 0 {
		return nil, errors.New("trailing bytes")
	}
	var uris []string
	for _, name := range names {
		if name.Class == asn1.ClassContextSpecific && name.Tag == 6 {
			uris = append(uris, string(name.Bytes))
		}
	}
	return uris, nil
}

func extension(cert *x509.Certificate, oid asn1.ObjectIdentifier) (der []byte, critical, ok bool) {
	for _, ext := range cert.Extensions {
		if ext.Id.Equal(oid) {
			return ext.Value, ext.Critical, true
		}
	}
	return nil, false, false
}

// checkLeaf holds every rule on the leaf that needs no signature.
func checkLeaf(leaf *x509.Certificate, id spiffeid.ID, anchors *anchors) error {
	if anchors.has(leaf) {
		return refuse("X7", "the certificate is a signing certificate of %s, which authenticates nobody", id.TrustDomain().IDString())
	}
	if err := checkForm(leaf); err != nil {
		return err
	}
	if err := checkKeyUsage(leaf); err != nil {
		return err
	}
	_, sanCritical, _ := extension(leaf, oidSubjectAltName)
	switch usage := leaf.KeyUsage; {
	case !leaf.BasicConstraintsValid:
		return refuse("X14", "the leaf has no basicConstraints; it has to say CA:FALSE")
	case leaf.IsCA:
		return refuse("X14", "the leaf says CA:TRUE; a signing certificate authenticates nobody")
	case usage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return refuse("X14", "the leaf's keyUsage has keyCertSign or cRLSign")
	case usage&x509.KeyUsageDigitalSignature == 0:
		return refuse("X11", "the leaf's keyUsage lacks digitalSignature")
	case !sanCritical && emptySubject(leaf):
		return refuse("X5", "the subject is empty and the SAN extension is not critical")
	}
	if hasEKU(leaf) && (!permits(leaf, x509.ExtKeyUsageServerAuth) || !permits(leaf, x509.ExtKeyUsageClientAuth)) {
		return refuse("X12", "the leaf's extended key usage lacks serverAuth or clientAuth")
	}
	return nil
}

// checkChain holds the rules on a path that crypto/x509 found: leaf, issuers,
// root. Signatures, times, path lengths and name constraints (X9) were checked, the
// last not closely enough.
func checkChain(chain []*x509.Certificate) error {
	for _, authority := range chain[1:] {
		if err := checkAuthority(authority); err != nil {
			err.Reason = fmt.Sprintf("signing certificate of %q: %s", authority.Subject, err.Reason)
			return err
		}
	}
	return checkURIConstraints(chain)
}

// checkURIConstraints: a permitted host without a leading dot is that host and no
// other (RFC 5280 §4.2.1.10); crypto/x509 takes what lies below it, too. What is
// excluded crypto/x509 reads that widely as well, which errs on the safe side.
func checkURIConstraints(chain []*x509.Certificate) error {
	for i, authority := range chain {
		permitted := authority.PermittedURIDomains
		if len(permitted) == 0 {
			continue
		}
		for _, below := range chain[:i] {
			for _, uri := range below.URIs {
				host := strings.ToLower(uri.Hostname())
				if !slices.ContainsFunc(permitted, func(p string) bool { return permitsHost(strings.ToLower(p), host) }) {
					return refuse("X9", "the signing certificate of %q may not vouch for %s: it is limited to %v", authority.Subject, uri, permitted)
				}
			}
		}
	}
	return nil
}

func permitsHost(permitted, host string) bool {
	if strings.HasPrefix(permitted, ".") {
		return strings.HasSuffix(host, permitted) && len(host) > len(permitted)
	}
	return host == permitted
}

// checkLinks: each certificate names the key that signed it (RFC 5280 §4.2.1.1).
// crypto/x509 is content with the issuer's name, others are not.
func checkLinks(chain []*x509.Certificate) error {
	for i, cert := range chain[:len(chain)-1] {
		if err := checkLink(cert, chain[i+1]); err != nil {
			return &Error{Rule: "X13", Reason: fmt.Sprintf("authority key ID of the certificate of %q", cert.Subject), Err: err}
		}
	}
	return nil
}

func checkLink(cert, issuer *x509.Certificate) error {
	der, _, _ := extension(cert, oidAuthorityKeyID)
	var names struct {
		KeyID  []byte        `asn1:"optional,tag:0"`
		Issuer asn1.RawValue `asn1:"optional,tag:1"`
		Serial *big.Int      `asn1:"optional,tag:2"`
	}
	rest, err := asn1.Unmarshal(der, &names)
	switch {
	case err != nil:
		return err
	case len(rest) > 0:
		return errors.New("trailing bytes")
	case !bytes.Equal(names.KeyID, issuer.SubjectKeyId):
		return fmt.Errorf("it names key %x; %x has signed", names.KeyID, issuer.SubjectKeyId)
	case names.Serial != nil && names.Serial.Cmp(issuer.SerialNumber) != 0:
		return fmt.Errorf("it names certificate %x; that of its issuer is %x", names.Serial, issuer.SerialNumber)
	}
	return nil
}

func checkAuthority(cert *x509.Certificate) *Error {
	if err := cmp.Or(checkForm(cert), checkKeyUsage(cert)); err != nil {
		return err
	}
	_, bcCritical, _ := extension(cert, oidBasicConstraints)
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return refuse("X8", "basicConstraints does not say CA:TRUE")
	case !bcCritical:
		return refuse("X8", "basicConstraints is not critical")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return refuse("X11", "keyUsage lacks keyCertSign")
	case emptySubject(cert):
		return refuse("X13", "it has no subject, which its issued certificates have to name") // RFC 5280 §4.1.2.6
	case len(cert.SubjectKeyId) == 0:
		// RFC 5280 §4.2.1.2: it MUST be there. Revocation by authority needs it.
		return refuse("X13", "it has no subject key ID")
	case hasEKU(cert) && (!permits(cert, x509.ExtKeyUsageServerAuth) || !permits(cert, x509.ExtKeyUsageClientAuth)):
		return refuse("X12", "it is limited to other extended key usages than serverAuth and clientAuth")
	}
	if err := checkKey(cert.PublicKey); err != nil {
		return refuse("X13", "%v", err)
	}
	id, err := certID(cert)
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	if id.Path() != "" {
		return refuse("X6", "its SPIFFE ID %q has a path, which only a workload's has", id)
	}
	return nil
}

func checkKeyUsage(cert *x509.Certificate) *Error {
	switch _, critical, ok := extension(cert, oidKeyUsage); {
	case !ok:
		return refuse("X10", "keyUsage is missing")
	case !critical:
		return refuse("X10", "keyUsage is not critical")
	}
	return nil
}

// emptySubject: an empty RDNSequence is SEQUENCE of length 0.
func emptySubject(cert *x509.Certificate) bool {
	return len(cert.RawSubject) <= 2
}

// checkForm: crypto/x509 reads over bytes behind the value of a standard extension, or
// of an attribute of the subject, and others refuse such a certificate.
func checkForm(cert *x509.Certificate) *Error {
	for _, ext := range cert.Extensions {
		var value asn1.RawValue
		rest, err := asn1.Unmarshal(ext.Value, &value)
		if standard := len(ext.Id) > 3 && ext.Id[:3].Equal(oidStandard); standard && err == nil && len(rest) > 0 {
			return &Error{Rule: "X13", Reason: fmt.Sprintf("extension %s has trailing bytes", ext.Id)}
		}
	}
	var subject []relativeNameSET
	_, err := asn1.Unmarshal(cert.RawSubject, &subject)
	if err == nil {
		var again []byte
		if again, err = asn1.Marshal(subject); err == nil && len(again) == len(cert.RawSubject) {
			return nil
		}
	}
	return &Error{Rule: "X13", Reason: "the subject is malformed", Err: err}
}

// relativeNameSET is a set to encoding/asn1 because its name ends like that.
type relativeNameSET []struct {
	Type  asn1.ObjectIdentifier
	Value asn1.RawValue
}

// hasEKU: also one that lists nothing limits.
func hasEKU(cert *x509.Certificate) bool {
	_, _, ok := extension(cert, oidExtKeyUsage)
	return ok
}

// permits: the usage has to be named. RFC 5280 §4.2.1.12 would let "any" stand for
// it; openssl does not let it, and a peer that only some accept is no use.
func permits(cert *x509.Certificate, usage x509.ExtKeyUsage) bool {
	return slices.Contains(cert.ExtKeyUsage, usage)
}

// checkKey stops keys too weak to prove anything, and RSA keys so large that
// verifying with them is an attack.
func checkKey(pub any) error {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
			return nil
		}
		return fmt.Errorf("elliptic curve %s is not accepted", key.Curve.Params().Name)
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < 2048 || bits > 8192 {
			return fmt.Errorf("an RSA key of %d bits is not accepted; it has 2048 to 8192", bits)
		}
		return nil
	case ed25519.PublicKey:
		return nil
	}
	return fmt.Errorf("key type %T is not accepted", pub)
}
