// Name constraints (RFC 5280 §4.2.1.10): an authority that may speak for some names
// only. Those on URIs are about the host, which for SPIFFE IDs is the trust domain.

package pathcase

import (
	"crypto/x509"
	"net"

	"merlon.dev/sdk/svid/forge"
)

func uriConstraints(m *maker) {
	permitted := func(id, why string, ok bool, hosts ...string) {
		for _, part := range []struct {
			name string
			ca   *forge.Authority
			by   option
		}{
			{"intermediate", m.below(permittedURIs(hosts...)), byRFC5280},
			{"upper-intermediate", m.below(permittedURIs(hosts...)).Intermediate(forge.URIs()), byRFC5280},
			{"root", m.root(permittedURIs(hosts...)), byPrudence},
		} {
			m.add(ok, "uri-constraints/"+part.name+"-permits-"+id, why, part.ca, part.ca.Leaf("/a"), []option{part.by})
		}
	}
	permitted("own-domain", "a host without a leading dot is that host", true, TrustDomain)
	permitted("own-and-another", "one of several is enough", true, "other.test", TrustDomain)
	permitted("another", "another host", false, "other.test")
	permitted("parent", "a host without a leading dot is no domain", false, "org")
	permitted("child", "nor the other way round", false, "a.example.org")
	permitted("below-own", "with a leading dot it is what lies below, without the host itself", false, ".example.org")
	permitted("below-parent", "what lies below org", true, ".org")
	permitted("in-upper-case", "hosts compare without case", true, "EXAMPLE.org")
	permitted("same-ending", "a dot separates labels", false, "ample.org")

	excluded := func(id, why string, ok bool, hosts ...string) {
		for _, part := range []struct {
			name string
			ca   *forge.Authority
			by   option
		}{
			{"intermediate", m.below(excludedURIs(hosts...)), byRFC5280},
			{"root", m.root(excludedURIs(hosts...)), byPrudence},
		} {
			m.add(ok, "uri-constraints/"+part.name+"-excludes-"+id, why, part.ca, part.ca.Leaf("/a"), []option{part.by})
		}
	}
	excluded("own-domain", "an excluded host", false, TrustDomain)
	excluded("another", "another one is", true, "other.test")
	excluded("below-parent", "what lies below org is", false, ".org")
	excluded("below-own", "what lies below the trust domain is, and it is not itself", true, ".example.org")

	both := constrained(func(c *x509.Certificate) {
		c.PermittedURIDomains, c.ExcludedURIDomains = []string{TrustDomain}, []string{TrustDomain}
	})
	ca := m.below(both)
	m.refuse("uri-constraints/permitted-and-excluded", "what is excluded is not permitted", ca, ca.Leaf("/a"))
	ca = m.below(permittedURIs(TrustDomain)).Intermediate(forge.URIs(), permittedURIs("other.test"))
	m.refuse("uri-constraints/nothing-in-common", "both authorities have to permit it (RFC 5280 §6.1.4 g)", ca, ca.Leaf("/a"))
	ca = m.below(permittedURIs("other.test")).Intermediate(forge.URIs(), permittedURIs(TrustDomain))
	m.refuse("uri-constraints/not-widened", "an intermediate cannot give itself more", ca, ca.Leaf("/a"))
	ca = m.below(permittedURIs("a.test", TrustDomain)).Intermediate(forge.URIs(), permittedURIs(TrustDomain, "b.test"))
	m.accept("uri-constraints/something-in-common", "both permit it", ca, ca.Leaf("/a"))
	ca = m.below(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"other.test"} })
	m.refuse("uri-constraints/not-critical", "they count also where they are not critical", ca, ca.Leaf("/a"))
	ca = m.root().Intermediate(permittedURIs("other.test")).Intermediate(forge.URIs("spiffe://example.org"))
	m.refuse("uri-constraints/intermediate-of-another-name", "the intermediate below has a SPIFFE ID itself, of a host that is not permitted", ca, ca.Leaf("/", forge.URIs("spiffe://example.org/a")))
	ip := forge.New(m.tb, "10.0.0.1")
	for name, constraint := range map[string]forge.Change{"permits": permittedURIs("other.test"), "excludes": excludedURIs("other.test")} {
		sub := ip.Intermediate(forge.URIs(), constraint)
		m.refuse("uri-constraints/intermediate-"+name+"-another-than-an-address", "a URI whose host is an address cannot be judged by constraints on hosts (RFC 5280 §4.2.1.10)", sub, sub.Leaf("/a"))
	}
	m.refusePosingAbove("uri-constraints/empty", "the extension is no empty sequence (RFC 5280 §4.2.1.10)", 30, standIn(true, 0x30, 0))
	m.refusePosingAbove("uri-constraints/garbled", "the extension does not parse", 30, standIn(true, 0x30, 5, 0x80, 1, 7))
}

func otherConstraints(m *maker) {
	on := func(change func(*x509.Certificate)) *forge.Authority { return m.below(constrained(change)) }
	email := func(names ...string) forge.Change {
		return func(c *x509.Certificate) { c.EmailAddresses = names }
	}
	address := func(text string) forge.Change {
		return func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.ParseIP(text)} }
	}
	ca := on(func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"web.test"} })
	m.accept("other-constraints/dns-without-dns-names", "constraints are about the kind of names they have (RFC 5280 §4.2.1.10)", ca, ca.Leaf("/a"))
	m.accept("other-constraints/dns-permitted", "the host and what lies below", ca, ca.Leaf("/a", dns("web.test", "a.web.test")))
	m.refuse("other-constraints/dns-not-permitted", "another DNS name", ca, ca.Leaf("/a", dns("mail.test")))
	m.refuse("other-constraints/dns-one-not-permitted", "each name counts", ca, ca.Leaf("/a", dns("web.test", "mail.test")))
	m.refuse("other-constraints/dns-same-ending", "a dot separates labels", ca, ca.Leaf("/a", dns("badweb.test")))
	ca = on(func(c *x509.Certificate) { c.ExcludedDNSDomains = []string{"web.test"} })
	m.refuse("other-constraints/dns-excluded", "an excluded DNS name", ca, ca.Leaf("/a", dns("a.web.test")))
	m.accept("other-constraints/dns-another-excluded", "another one is", ca, ca.Leaf("/a", dns("mail.test")))
	ca = on(func(c *x509.Certificate) { c.PermittedEmailAddresses = []string{"shop.test"} })
	m.accept("other-constraints/email-permitted", "an address at that host", ca, ca.Leaf("/a", email("a@shop.test")))
	m.refuse("other-constraints/email-not-permitted", "an address at another", ca, ca.Leaf("/a", email("a@other.test")))
	ca = on(func(c *x509.Certificate) { c.PermittedIPRanges = []*net.IPNet{network("10.0.0.0/8")} })
	m.accept("other-constraints/address-permitted", "inside of the range", ca, ca.Leaf("/a", address("10.1.2.3")))
	m.refuse("other-constraints/address-not-permitted", "outside", ca, ca.Leaf("/a", address("192.0.2.1")))
	ca = on(func(c *x509.Certificate) { c.ExcludedIPRanges = []*net.IPNet{network("10.0.0.0/8")} })
	m.refuse("other-constraints/address-excluded", "inside of an excluded range", ca, ca.Leaf("/a", address("10.1.2.3")))
	// permittedSubtrees of one directoryName, CN=x.
	directory := []byte{0x30, 0x14, 0xa0, 0x12, 0x30, 0x10, 0xa4, 0x0e, 0x30, 0x0c, 0x31, 0x0a, 0x30, 0x08, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x01, 'x'}
	ca = m.below(extension(nameConstraints, true, directory...))
	m.refuse("other-constraints/directory-not-permitted", "subjects have to lie below CN=x, and this one does not", ca, ca.Leaf("/a", named("web")))
}
