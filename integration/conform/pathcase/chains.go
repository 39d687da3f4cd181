// How certificates of a path are linked, what is presented, whom the trust bundle
// trusts, and for which trust domain.

package pathcase

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"slices"

	"merlon.dev/sdk/svid/forge"
)

func links(m *maker) {
	noKeyID := func(c *x509.Certificate) {
		c.SubjectKeyId, c.ExtraExtensions = nil, append(c.ExtraExtensions, pkix.Extension{Id: subjectKeyID, Value: []byte{4, 0}})
	}
	ca := m.below()
	m.refuse("links/leaf-names-another-key", "the authority key ID is not the issuer's subject key ID (RFC 5280 §4.2.1.1)", ca, ca.Leaf("/a", extension(authorityKeyID, false, 0x30, 3, 0x80, 1, 7)), byPrudence)
	m.refuse("links/leaf-names-no-key", "an empty authority key ID: keyIdentifier MUST be there (RFC 5280 §4.2.1.1)", ca, ca.Leaf("/a", extension(authorityKeyID, false, 0x30, 0)), byPrudence)
	number := slices.Concat([]byte{0x80, byte(len(ca.Cert.SubjectKeyId))}, ca.Cert.SubjectKeyId, []byte{0x82, 1, 7})
	m.refuse("links/leaf-names-another-certificate", "the key's and another serial number", ca, ca.Leaf("/a", extension(authorityKeyID, false, slices.Concat([]byte{0x30, byte(len(number))}, number)...)), byPrudence)
	sub := m.below(extension(authorityKeyID, false, 0x30, 3, 0x80, 1, 7))
	m.refuse("links/intermediate-names-another-key", "likewise", sub, sub.Leaf("/a"), byPrudence)
	sub = m.below(noKeyID)
	m.refuse("links/intermediate-without-key-id", "an authority has a subject key ID (RFC 5280 §4.2.1.2)", sub, sub.Leaf("/a"), byPrudence)
	sub = m.root(noKeyID)
	m.refuse("links/root-without-key-id", "likewise", sub, sub.Leaf("/a"), byPrudence)
	leaf := ca.Leaf("/a")
	other := ca.Again(named("somebody else"))
	m.refuse("links/issuer-of-another-name", "the issuer's key, in a certificate of another name (RFC 5280 §6.1.3 a)", ca, leaf, presentingCerts(leaf.Chain[0], other))
	sub = m.root(unnamed).Intermediate()
	m.refuse("links/root-without-a-name", "an authority has a name (RFC 5280 §4.1.2.6)", sub, sub.Leaf("/a"), byPrudence)
	sub = m.below(unnamed)
	m.refuse("links/intermediate-without-a-name", "likewise", sub, sub.Leaf("/a"))
}

func chains(m *maker) {
	ca := m.below()
	leaf := ca.Leaf("/a")
	root := ca.Root().Cert
	m.refuse("chains/nothing", "nothing is presented", ca, &forge.SVID{})
	m.refuse("chains/intermediate-left-out", "a path to the root cannot be built", ca, leaf, presentingCerts(leaf.Chain[0]))
	m.refuse("chains/root-alone", "a signing certificate authenticates nobody (X509-SVID §3.2)", ca, leaf, presentingCerts(root), holding(ca.Root().Key), bySPIFFE)
	m.refuse("chains/intermediate-alone", "likewise", ca, leaf, presentingCerts(ca.Cert), holding(ca.Key), bySPIFFE)
	m.refuse("chains/leaf-last", "the leaf is the first certificate (X509-SVID §5.1)", ca, leaf, presentingCerts(ca.Cert, leaf.Chain[0]), holding(ca.Key), bySPIFFE)
	m.accept("chains/root-presented", "the root is shown, too", ca, leaf, presentingCerts(leaf.Chain[0], ca.Cert, root))
	m.accept("chains/unneeded-certificate", "one that nobody needs is shown, too (RFC 8446 §4.4.2)", ca, leaf, presentingCerts(leaf.Chain[0], ca.Cert, m.below().Cert))
	m.accept("chains/intermediate-twice", "the intermediate is shown twice", ca, leaf, presentingCerts(leaf.Chain[0], ca.Cert, ca.Cert))
	deep := ca.Intermediate()
	low := deep.Leaf("/a")
	m.accept("chains/out-of-order", "intermediates in another order (RFC 8446 §4.4.2)", deep, low, presentingCerts(low.Chain[0], low.Chain[2], low.Chain[1]))
	m.refuse("chains/middle-left-out", "the lower intermediate is not shown", deep, low, presentingCerts(low.Chain[0], low.Chain[2]))
	m.refuse("chains/another-leaf-in-between", "the certificate above the leaf is another leaf", ca, leaf, presentingCerts(leaf.Chain[0], ca.Leaf("/b").Chain[0]))
	m.refuse("chains/nine-certificates", "more certificates than anybody needs", ca, leaf, presentingCerts(append(leaf.Chain[:1:1], slices.Repeat([]*x509.Certificate{ca.Cert}, 8)...)...), byPrudence)
	m.refuse("chains/65-kib", "a chain that is too long to look at", ca, ca.Leaf("/a", forge.Extension(nobodys, false, make([]byte, 65<<10))), byPrudence)
	m.refuse("chains/trailing-bytes", "bytes behind the leaf", ca, leaf, presenting(append(slices.Clone(leaf.Chain[0].Raw), 0, 0), ca.Cert.Raw))
	m.refuse("chains/cut-off", "the last byte of the leaf is missing", ca, leaf, presenting(leaf.Chain[0].Raw[:len(leaf.Chain[0].Raw)-1], ca.Cert.Raw))
	m.refuse("chains/no-certificate", "what is presented is none", ca, leaf, presenting([]byte("-----BEGIN CERTIFICATE-----"), ca.Cert.Raw))
	m.refuse("chains/empty-certificate", "or nothing", ca, leaf, presenting(nil, ca.Cert.Raw))
	a, b := m.impostor(), m.impostor()
	circle := a.Leaf("/a")
	m.refuse("chains/circle", "two authorities vouch for each other, and no root for them", ca, circle, presentingCerts(circle.Chain[0], a.CrossSigned(b), b.CrossSigned(a)))
	version := bytes.Replace(leaf.Chain[0].RawTBSCertificate, []byte{0xa0, 3, 2, 1, 2}, []byte{0xa0, 3, 2, 1, 1}, 1)
	m.refuse("chains/version-2", "extensions need version 3 (RFC 5280 §4.1.2.1)", ca, leaf, presenting(ca.SignTBS(version), ca.Cert.Raw))
}

func anchors(m *maker) {
	old, next := m.root(), m.impostor()
	leaf := old.Leaf("/a")
	m.accept("anchors/several", "one of several roots has signed", old, leaf, trusting(next.Cert, m.impostor().Cert, old.Cert))
	m.refuse("anchors/none", "a trust bundle without X.509 authorities trusts nobody (Trust domain and bundle §4.1.3)", old, leaf, trusting())
	m.refuse("anchors/another", "another root", old, leaf, trusting(next.Cert))
	twin := m.root(func(c *x509.Certificate) { c.Subject = old.Cert.Subject })
	m.refuse("anchors/of-the-same-name", "another root of the same name", old, leaf, trusting(twin.Cert))
	m.accept("anchors/both-of-the-same-name", "both are trusted", old, leaf, trusting(twin.Cert, old.Cert))
	cross := next.CrossSigned(old)
	crossed := next.Leaf("/a")
	m.accept("anchors/cross-signed", "the next root is vouched for by the present one", old, crossed, presentingCerts(crossed.Chain[0], cross))
	m.accept("anchors/cross-signed-and-trusted", "and is trusted itself, too", old, crossed, presentingCerts(crossed.Chain[0], cross), trusting(old.Cert, next.Cert))
	m.refuse("anchors/cross-signed-by-nobody", "the root that vouches for it is not trusted", old, crossed, presentingCerts(crossed.Chain[0], next.CrossSigned(m.impostor())))
	m.refuse("anchors/the-leaf", "a certificate of the trust bundle authenticates nobody (X509-SVID §3.2)", old, leaf, trusting(leaf.Chain[0], old.Cert), bySPIFFE)
	m.refuse("anchors/a-leaf-as-issuer", "a leaf among the roots signs nothing", old, below(m, leaf, old).Leaf("/b"), trusting(leaf.Chain[0]))
	sub := old.Intermediate()
	m.accept("anchors/intermediate", "an intermediate in the trust bundle is an anchor like a root (X509-SVID §6)", sub, sub.Leaf("/a"), trusting(sub.Cert))
}

func trustDomains(m *maker) {
	own, other := m.root(), forge.New(m.tb, "other.test")
	m.refuse("trust-domains/another", "an X509-SVID of another trust domain, by its own root: there is no bundle for it", own, other.Leaf("/a"))
	m.refuse("trust-domains/ours-by-another-root", "our name, signed by another trust domain's root", own, other.Leaf("/", forge.URIs("spiffe://example.org/a")))
	m.refuse("trust-domains/anothers-by-our-root", "their name, signed by our root: our bundle is not for it (X509-SVID §6, Federation §7.3)", own, own.Leaf("/", forge.URIs("spiffe://other.test/a")), bySPIFFE)
	m.refuse("trust-domains/below-ours", "a trust domain is no DNS domain: sub.example.org is another one", own, own.Leaf("/", forge.URIs("spiffe://sub.example.org/a")), bySPIFFE)
	m.refuse("trust-domains/above-ours", "nor is org ours", own, own.Leaf("/", forge.URIs("spiffe://org/a")), bySPIFFE)
	m.refuse("trust-domains/ours-as-a-path", "our name in the path", own, own.Leaf("/", forge.URIs("spiffe://other.test/example.org")), bySPIFFE)
	sub := own.Intermediate(forge.URIs("spiffe://example.org/ca"))
	m.refuse("trust-domains/intermediate-with-a-path", "the SPIFFE ID of a signing certificate has no path (X509-SVID §3.2)", sub, sub.Leaf("/a"), bySPIFFE)
	withPath := m.root(forge.URIs("spiffe://example.org/ca"))
	m.refuse("trust-domains/root-with-a-path", "likewise", withPath, withPath.Leaf("/a"), bySPIFFE)
	sub = own.Intermediate(forge.URIs("spiffe://example.org", "spiffe://other.test"))
	m.refuse("trust-domains/intermediate-of-two", "a signing certificate that is an SVID has one SPIFFE ID (X509-SVID §2)", sub, sub.Leaf("/a"), bySPIFFE)
	sub = own.Intermediate(forge.URIs("spiffe://other.test"))
	m.accept("trust-domains/intermediate-of-another", "it SHOULD be that of its trust domain (X509-SVID §3.2)", sub, sub.Leaf("/a"))
}
