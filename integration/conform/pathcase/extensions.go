// What the extensions of a certificate permit: basicConstraints, key usage, extended
// key usage, and extensions as such.

package pathcase

import (
	"bytes"
	"crypto/x509"
	"slices"

	"merlon.dev/sdk/svid/forge"
)

func basicConstraints(m *maker) {
	isNoCA := func(c *x509.Certificate) { c.IsCA, c.MaxPathLen = false, -1 }
	notCritical := extension(forge.BasicConstraints, false, 0x30, 3, 1, 1, 0xff)
	for _, part := range []struct {
		name string
		make func(...forge.Change) *forge.Authority
		by   option
	}{{"intermediate", m.below, byRFC5280}, {"root", m.root, byPrudence}} {
		ca := part.make(isNoCA)
		m.refuse("basic-constraints/"+part.name+"-is-no-ca", "cA is false (RFC 5280 §6.1.4 k)", ca, ca.Leaf("/a"), part.by)
		ca = part.make(noBasicConstraints)
		m.refuse("basic-constraints/"+part.name+"-has-none", "a version 3 certificate without them signs nothing (RFC 5280 §6.1.4 k)", ca, ca.Leaf("/a"), part.by)
		ca = part.make(notCritical)
		m.refuse("basic-constraints/"+part.name+"-not-critical", "an authority MUST mark them critical (RFC 5280 §4.2.1.9)", ca, ca.Leaf("/a"), byPrudence)
		ca = part.make(pathLength(0))
		m.accept("basic-constraints/"+part.name+"-path-length-0", "nothing but leaves may follow, and nothing else does", ca, ca.Leaf("/a"))
		ca = part.make(pathLength(0)).Intermediate()
		m.refuse("basic-constraints/"+part.name+"-path-length-0-exceeded", "an intermediate follows (RFC 5280 §6.1.4 l)", ca, ca.Leaf("/a"), part.by)
		ca = part.make(pathLength(1)).Intermediate()
		m.accept("basic-constraints/"+part.name+"-path-length-1", "one intermediate may follow", ca, ca.Leaf("/a"))
		ca = part.make(pathLength(1)).Intermediate().Intermediate()
		m.refuse("basic-constraints/"+part.name+"-path-length-1-exceeded", "two follow", ca, ca.Leaf("/a"), part.by)
		ca = part.make(pathLength(2)).Intermediate(pathLength(0)).Intermediate()
		m.refuse("basic-constraints/"+part.name+"-path-length-of-the-lower", "the lower limit counts where it is smaller", ca, ca.Leaf("/a"), part.by)
		ca = part.make(pathLength(0)).Intermediate(pathLength(5))
		m.refuse("basic-constraints/"+part.name+"-path-length-not-widened", "an intermediate cannot give itself more", ca, ca.Leaf("/a"), part.by)
	}
	ca := m.below()
	m.refuse("basic-constraints/leaf-is-a-ca", "an X509-SVID has cA false (X509-SVID §5.2)", ca, ca.Leaf("/a", func(c *x509.Certificate) { c.IsCA = true }), bySPIFFE)
	m.refuse("basic-constraints/leaf-has-none", "a validator cannot tell that cA is false (X509-SVID §4.1)", ca, ca.Leaf("/a", noBasicConstraints), byPrudence)
	m.refusePosing("basic-constraints/leaf-garbled", "the extension does not parse", byRFC5280, ca, 19, noBasicConstraints, standIn(true, 0x30, 9, 1))
	m.refusePosingAbove("basic-constraints/intermediate-negative-path-length", "pathLenConstraint is 0 or more (RFC 5280 §4.2.1.9)", 19, noBasicConstraints, standIn(true, 0x30, 6, 1, 1, 0xff, 2, 1, 0xff))
	m.refusePosingAbove("basic-constraints/intermediate-garbled", "the extension does not parse", 19, noBasicConstraints, standIn(true, 0x30, 9, 1))
	m.refuse("basic-constraints/leaf-trailing-bytes", "there are bytes behind its value", ca, ca.Leaf("/a", extension(forge.BasicConstraints, true, 0x30, 0, 5, 0)))
	leaf := ca.Leaf("/a")
	m.refuse("basic-constraints/leaf-signs-a-leaf", "a workload's key signs for another workload", ca, below(m, leaf, ca).Leaf("/b"))
}

// below makes the holder of a leaf an authority, whatever its certificate says.
func below(m *maker, leaf *forge.SVID, ca *forge.Authority) *forge.Authority {
	cert := *leaf.Chain[0]
	if len(cert.RawSubject) <= 2 { // what it signs names it
		named := ca.Leaf("/a", named("workload"), forge.OfKey(leaf.Key))
		cert = *named.Chain[0]
	}
	holder := ca.Intermediate() // for its unexported parts
	holder.Cert, holder.Key = &cert, leaf.Key
	return holder
}

func keyUsages(m *maker) {
	none := usage(0)
	for _, part := range []struct {
		name string
		make func(...forge.Change) *forge.Authority
		by   option
	}{{"intermediate", m.below, byRFC5280}, {"root", m.root, byPrudence}} {
		ca := part.make(none)
		m.refuse("key-usage/"+part.name+"-has-none", "every certificate MUST have it (X509-SVID §4.3)", ca, ca.Leaf("/a"), bySPIFFE)
		ca = part.make(usage(x509.KeyUsageCRLSign))
		m.refuse("key-usage/"+part.name+"-signs-crls-only", "keyCertSign has to be set (RFC 5280 §6.1.4 n)", ca, ca.Leaf("/a"), part.by)
		ca = part.make(usage(x509.KeyUsageDigitalSignature))
		m.refuse("key-usage/"+part.name+"-of-a-leaf", "likewise", ca, ca.Leaf("/a"), part.by)
		ca = part.make(extension(forge.KeyUsage, false, 3, 2, 1, 6))
		m.refuse("key-usage/"+part.name+"-not-critical", "it MUST be critical (X509-SVID §4.3)", ca, ca.Leaf("/a"), bySPIFFE)
	}
	ca := m.below()
	m.refuse("key-usage/leaf-has-none", "every certificate MUST have it (X509-SVID §4.3)", ca, ca.Leaf("/a", none), bySPIFFE)
	m.refuse("key-usage/leaf-not-critical", "it MUST be critical (X509-SVID §4.3)", ca, ca.Leaf("/a", extension(forge.KeyUsage, false, 3, 2, 7, 128)), bySPIFFE)
	m.refuse("key-usage/leaf-key-agreement-only", "digitalSignature MUST be set (X509-SVID §4.3)", ca, ca.Leaf("/a", usage(x509.KeyUsageKeyAgreement)), bySPIFFE)
	m.refuse("key-usage/leaf-signs-certificates", "keyCertSign MUST NOT be set (X509-SVID §5.2)", ca, ca.Leaf("/a", usage(x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign)), bySPIFFE)
	m.refuse("key-usage/leaf-signs-crls", "nor cRLSign", ca, ca.Leaf("/a", usage(x509.KeyUsageDigitalSignature|x509.KeyUsageCRLSign)), bySPIFFE)
	m.refusePosing("key-usage/leaf-garbled", "the extension does not parse", byRFC5280, ca, 15, none, standIn(true, 3, 9, 7))
}

func extendedUsages(m *maker) {
	server, client, code := purposes(x509.ExtKeyUsageServerAuth), purposes(x509.ExtKeyUsageClientAuth), purposes(x509.ExtKeyUsageCodeSigning)
	anything := purposes(x509.ExtKeyUsageAny)
	ca := m.below()
	m.refuse("extended-key-usage/leaf-server-only", "where it is there, it has both (X509-SVID §4.4)", ca, ca.Leaf("/a", server), bySPIFFE)
	m.refuse("extended-key-usage/leaf-client-only", "likewise", ca, ca.Leaf("/a", client), bySPIFFE)
	m.refuse("extended-key-usage/leaf-code-signing", "neither", ca, ca.Leaf("/a", code), bySPIFFE)
	m.refuse("extended-key-usage/leaf-any", "an application may demand the purpose by name (RFC 5280 §4.2.1.12)", ca, ca.Leaf("/a", anything), byPrudence)
	m.refuse("extended-key-usage/leaf-empty", "a list has one purpose at least (RFC 5280 §4.2.1.12)", ca, ca.Leaf("/a", extension(extKeyUsage, false, 0x30, 0)))
	m.refuse("extended-key-usage/leaf-trailing-bytes", "there are bytes behind its value", ca, ca.Leaf("/a", extension(extKeyUsage, false, slices.Concat([]byte{0x30, 20, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2}, []byte{5, 0})...)))
	m.accept("extended-key-usage/leaf-critical", "it may be critical", ca, ca.Leaf("/a", extension(extKeyUsage, true, 0x30, 20, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2)))
	ca = m.below(both)
	m.accept("extended-key-usage/intermediate-both", "an intermediate that is limited to what leaves need", ca, ca.Leaf("/a"))
	ca = m.root(both).Intermediate(both)
	m.accept("extended-key-usage/all-both", "the root, too", ca, ca.Leaf("/a"))
	for _, limited := range []struct {
		name string
		to   forge.Change
	}{{"server-only", server}, {"client-only", client}, {"code-signing", code}} {
		ca = m.below(limited.to)
		m.refuse("extended-key-usage/intermediate-"+limited.name, "purposes nest: the leaf cannot have more than its issuer", ca, ca.Leaf("/a"), byPrudence)
		ca = m.below(limited.to).Intermediate(both)
		m.refuse("extended-key-usage/upper-intermediate-"+limited.name, "nor more than the issuer's issuer", ca, ca.Leaf("/a"), byPrudence)
		ca = m.below(limited.to)
		m.refuse("extended-key-usage/intermediate-"+limited.name+"-leaf-open", "a leaf without the extension is limited by its issuer", ca, ca.Leaf("/a", purposes()), byPrudence)
	}
	ca = m.root(code)
	m.refuse("extended-key-usage/root-code-signing", "a root that is limited to another purpose", ca, ca.Leaf("/a"), byPrudence)
	ca = m.below(anything)
	m.refuse("extended-key-usage/intermediate-any", "likewise by its name only", ca, ca.Leaf("/a"), byPrudence)
}

func extensions(m *maker) {
	unknown := extension(nobodys, true, 5, 0)
	ca := m.below()
	m.refuse("extensions/leaf-unknown-critical", "a critical extension that nobody knows (RFC 5280 §4.2)", ca, ca.Leaf("/a", unknown))
	ca = m.below(unknown)
	m.refuse("extensions/intermediate-unknown-critical", "likewise", ca, ca.Leaf("/a"))
	ca = m.below(unknown).Intermediate()
	m.refuse("extensions/upper-intermediate-unknown-critical", "likewise", ca, ca.Leaf("/a"))
	ca = m.root(unknown)
	m.refuse("extensions/root-unknown-critical", "an authority of the trust bundle is a certificate", ca, ca.Leaf("/a"), byPrudence)
	ca = m.below(extension(nobodys, false, 5, 0))
	m.accept("extensions/unknown-not-critical", "it may be passed over", ca, ca.Leaf("/a", extension(nobodys, false, 5, 0)))
	ca = m.below()
	leaf := ca.Leaf("/a", extension(nobodys, false, 5, 0), extension([]int{1, 2, 3, 5}, false, 5, 0))
	m.refuse("extensions/twice", "a certificate has at most one of each (RFC 5280 §4.2)", ca, leaf,
		presenting(ca.SignTBS(bytes.Replace(leaf.Chain[0].RawTBSCertificate, []byte{6, 3, 0x2a, 3, 5}, []byte{6, 3, 0x2a, 3, 4}, 1)), ca.Cert.Raw))
	m.accept("extensions/any-policy", "certificate policies that permit anything", ca, ca.Leaf("/a", extension(policies, false, 0x30, 8, 0x30, 6, 6, 4, 0x55, 0x1d, 0x20, 0)))
	ca = m.below(extension(policyConstraints, true, 0x30, 3, 0x80, 1, 0))
	m.refuse("extensions/policy-required-by-the-intermediate", "the intermediate does", ca, ca.Leaf("/a"))
	ca = m.below()
	m.refuse("extensions/not-in-order", "the list of extensions has bytes behind it", ca, leaf, presenting(trailing(m, ca, leaf), ca.Cert.Raw))
}

// trailing is the leaf with two bytes behind its last extension, inside the list.
func trailing(m *maker, ca *forge.Authority, leaf *forge.SVID) []byte {
	der := ca.SignTBS(bytes.Replace(leaf.Chain[0].RawTBSCertificate, []byte{6, 3, 0x2a, 3, 5, 4, 2, 5, 0}, []byte{6, 3, 0x2a, 3, 5, 4, 0, 5, 0}, 1))
	if der == nil {
		m.tb.Fatal("pathcase: the leaf has no such extension")
	}
	return der
}
