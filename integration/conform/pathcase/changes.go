// The changes to certificates that several themes use.

package pathcase

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net"
	"time"

	"merlon.dev/sdk/svid/forge"
)

// Extensions by their numbers (RFC 5280 §4.2.1).
var (
	subjectKeyID      = asn1.ObjectIdentifier{2, 5, 29, 14}
	nameConstraints   = asn1.ObjectIdentifier{2, 5, 29, 30}
	policies          = asn1.ObjectIdentifier{2, 5, 29, 32}
	authorityKeyID    = asn1.ObjectIdentifier{2, 5, 29, 35}
	policyConstraints = asn1.ObjectIdentifier{2, 5, 29, 36}
	extKeyUsage       = asn1.ObjectIdentifier{2, 5, 29, 37}
	nobodys           = asn1.ObjectIdentifier{1, 2, 3, 4} // an extension that nobody knows
)

func extension(oid asn1.ObjectIdentifier, critical bool, value ...byte) forge.Change {
	return forge.Extension(oid, critical, value)
}

func named(name string) forge.Change {
	return func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: name} }
}

func unnamed(c *x509.Certificate) { c.Subject = pkix.Name{} }

func usage(bits x509.KeyUsage) forge.Change {
	return func(c *x509.Certificate) { c.KeyUsage = bits }
}

func purposes(usages ...x509.ExtKeyUsage) forge.Change {
	return func(c *x509.Certificate) { c.ExtKeyUsage = usages }
}

var both = purposes(x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth)

// pathLength limits how many intermediates may follow.
func pathLength(n int) forge.Change {
	return func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = n, n == 0 }
}

// valid sets the validity relative to when the case is made.
func valid(from, to time.Duration) forge.Change {
	return func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(from), time.Now().Add(to)
	}
}

func dns(names ...string) forge.Change {
	return func(c *x509.Certificate) { c.DNSNames = names }
}

// constrained changes the name constraints, which are critical as RFC 5280
// §4.2.1.10 demands.
func constrained(change func(*x509.Certificate)) forge.Change {
	return func(c *x509.Certificate) {
		change(c)
		c.PermittedDNSDomainsCritical = true
	}
}

func permittedURIs(hosts ...string) forge.Change {
	return constrained(func(c *x509.Certificate) { c.PermittedURIDomains = hosts })
}

func excludedURIs(hosts ...string) forge.Change {
	return constrained(func(c *x509.Certificate) { c.ExcludedURIDomains = hosts })
}

func network(text string) *net.IPNet {
	_, ipNet, err := net.ParseCIDR(text)
	if err != nil {
		panic("pathcase: " + err.Error())
	}
	return ipNet
}

// der is the DER of v, which can be encoded.
func der(v any) []byte {
	out, err := asn1.Marshal(v)
	if err != nil {
		panic("pathcase: " + err.Error())
	}
	return out
}

// standIn has the place of an extension whose value crypto/x509 would not parse, so
// that the certificate can be made; posing puts the extension in its place.
func standIn(critical bool, value ...byte) forge.Change {
	return forge.Extension(asn1.ObjectIdentifier{1, 2, 3, 5}, critical, value)
}

// posing is cert, which by has signed, with its stand-in as extension 2.5.29.last,
// and signed again.
func (m *maker) posing(by *forge.Authority, cert *x509.Certificate, last byte) []byte {
	stood, poses := []byte{6, 3, 0x2a, 3, 5}, []byte{6, 3, 0x55, 0x1d, last}
	if !bytes.Contains(cert.RawTBSCertificate, stood) {
		m.tb.Fatal("pathcase: the certificate has no stand-in")
	}
	return by.SignTBS(bytes.Replace(cert.RawTBSCertificate, stood, poses, 1))
}

// refusePosing adds a leaf below ca with an extension that may not parse.
func (m *maker) refusePosing(id, why string, by option, ca *forge.Authority, last byte, changes ...forge.Change) {
	leaf := ca.Leaf("/a", changes...)
	m.refuse(id, why, ca, leaf, presenting(m.posing(ca, leaf.Chain[0], last), ca.Cert.Raw), by)
}

// refusePosingAbove is refusePosing for an intermediate.
func (m *maker) refusePosingAbove(id, why string, last byte, changes ...forge.Change) {
	root := m.root()
	sub := root.Intermediate(changes...)
	leaf := sub.Leaf("/a")
	m.refuse(id, why, sub, leaf, presenting(leaf.Chain[0].Raw, m.posing(root, sub.Cert, last)))
}

func noURI(c *x509.Certificate) { c.URIs = nil }

func noBasicConstraints(c *x509.Certificate) {
	c.BasicConstraintsValid, c.IsCA, c.MaxPathLen = false, false, 0
}
