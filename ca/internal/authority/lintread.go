// Reads the part of a leaf that gets signed, for the lint. It is stricter than any
// verifier: every field in its place, DER only, nothing behind. So of all byte
// strings the lint accepts for a request exactly one (two with a common name, by
// the type of its text), and no leniency of a parser stands between what was looked
// at and what is signed.

package authority

import (
	"errors"
	"math/big"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cryptobyte_asn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// leafBody is a TBSCertificate as it is written. Its slices are of the bytes read.
type leafBody struct {
	version             int64
	serial              *big.Int
	algorithm           []byte // like issuer, subject and key with tag and length
	issuer              []byte
	notBefore, notAfter time.Time
	subject             []byte
	key                 []byte
	extensions          []leafExtension
}

type leafExtension struct {
	oid      string // its bytes, without tag and length
	critical bool
	value    []byte
}

var errNotALeaf = errors.New("the bytes to sign do not parse as the body of a leaf")

func readLeaf(tbs []byte) (*leafBody, error) {
	c := &leafBody{serial: new(big.Int)}
	s, version, validity, extensions := cryptobyte.String(tbs), cryptobyte.String(nil), cryptobyte.String(nil), cryptobyte.String(nil)
	var body cryptobyte.String
	ok := s.ReadASN1(&body, cryptobyte_asn1.SEQUENCE) && s.Empty() &&
		body.ReadASN1(&version, tagVersion) && version.ReadASN1Integer(&c.version) && version.Empty() &&
		body.ReadASN1Integer(c.serial) &&
		readElement(&body, &c.algorithm) && readElement(&body, &c.issuer) &&
		body.ReadASN1(&validity, cryptobyte_asn1.SEQUENCE) &&
		readTime(&validity, &c.notBefore) && readTime(&validity, &c.notAfter) && validity.Empty() &&
		readElement(&body, &c.subject) && readElement(&body, &c.key) &&
		body.ReadASN1(&extensions, tagExtensions) && body.Empty() &&
		extensions.ReadASN1(&body, cryptobyte_asn1.SEQUENCE) && extensions.Empty()
	c.extensions = make([]leafExtension, 0, len(leafExtensions))
	for ok && !body.Empty() {
		ok = c.readExtension(&body)
	}
	if !ok {
		return nil, errNotALeaf
	}
	return c, nil
}

func readElement(s *cryptobyte.String, out *[]byte) bool {
	return s.ReadASN1Element((*cryptobyte.String)(out), cryptobyte_asn1.SEQUENCE)
}

// readTime takes the form that RFC 5280 §4.1.2.5 has for the year, and no other.
func readTime(s *cryptobyte.String, out *time.Time) bool {
	if s.PeekASN1Tag(cryptobyte_asn1.UTCTime) {
		return s.ReadASN1UTCTime(out)
	}
	return s.ReadASN1GeneralizedTime(out) && out.Year() >= 2050
}

func (c *leafBody) readExtension(s *cryptobyte.String) bool {
	var ext, oid, value cryptobyte.String
	var e leafExtension
	ok := s.ReadASN1(&ext, cryptobyte_asn1.SEQUENCE) && ext.ReadASN1(&oid, cryptobyte_asn1.OBJECT_IDENTIFIER)
	if ext.PeekASN1Tag(cryptobyte_asn1.BOOLEAN) { // written only where true
		ok = ok && ext.ReadASN1Boolean(&e.critical) && e.critical
	}
	ok = ok && ext.ReadASN1(&value, cryptobyte_asn1.OCTET_STRING) && ext.Empty()
	e.oid, e.value = string(oid), value
	twice := slices.ContainsFunc(c.extensions, func(other leafExtension) bool { return other.oid == e.oid })
	c.extensions = append(c.extensions, e)
	return ok && !twice
}

// value is that of an extension; the lint has seen that all are there.
func (c *leafBody) value(oid string) []byte {
	for _, e := range c.extensions {
		if e.oid == oid {
			return e.value
		}
	}
	return nil
}

// names are those of the SAN: its DNS names, then its URIs. Names of another kind,
// or in another order, are false.
func (c *leafBody) names() (dns, uris []string, ok bool) {
	s := cryptobyte.String(c.value(extSAN))
	if whole := s; !whole.ReadASN1(&s, cryptobyte_asn1.SEQUENCE) || !whole.Empty() {
		return nil, nil, false
	}
	for !s.Empty() {
		var name cryptobyte.String
		switch {
		case len(uris) == 0 && s.PeekASN1Tag(tagDNSName) && s.ReadASN1(&name, tagDNSName):
			dns = append(dns, string(name))
		case s.ReadASN1(&name, tagURI):
			uris = append(uris, string(name))
		default:
			return nil, nil, false
		}
	}
	return dns, uris, true
}

// commonName is the only attribute of the subject, "" if the subject is empty.
func (c *leafBody) commonName() (cn string, ok bool) {
	s := cryptobyte.String(c.subject)
	if !s.ReadASN1(&s, cryptobyte_asn1.SEQUENCE) {
		return "", false
	}
	if s.Empty() {
		return "", true
	}
	var set, attribute, oid, text cryptobyte.String
	var tag cryptobyte_asn1.Tag
	ok = s.ReadASN1(&set, cryptobyte_asn1.SET) && s.Empty() &&
		set.ReadASN1(&attribute, cryptobyte_asn1.SEQUENCE) && set.Empty() &&
		attribute.ReadASN1(&oid, cryptobyte_asn1.OBJECT_IDENTIFIER) && string(oid) == "\x55\x04\x03" &&
		attribute.ReadAnyASN1(&text, &tag) && attribute.Empty() &&
		(tag == cryptobyte_asn1.PrintableString || tag == cryptobyte_asn1.UTF8String)
	return string(text), ok && len(text) > 0
}
