// The SPIFFE ID in the subject alternative names, and other names beside it.

package pathcase

import (
	"bytes"
	"encoding/asn1"
	"strings"

	"merlon.dev/sdk/svid/forge"
)

func uriNames(m *maker) {
	ca := m.below()
	refuse := func(id, why string, uris ...string) {
		m.refusePosing("uri-names/"+id, why, bySPIFFE, ca, 17, noURI, standIn(true, uriSANs(uris...)...))
	}
	m.refuse("uri-names/none", "an X509-SVID has exactly one URI (X509-SVID §5.2)", ca, ca.Leaf("/a", forge.URIs(), dns("web.test")), bySPIFFE)
	refuse("two", "more than one (X509-SVID §5.2)", "spiffe://example.org/a", "spiffe://example.org/b")
	refuse("the-same-twice", "also where they are the same", "spiffe://example.org/a", "spiffe://example.org/a")
	refuse("and-https", "also where the second is none of SPIFFE", "spiffe://example.org/a", "https://example.org/")
	refuse("https-first", "or the first", "https://example.org/", "spiffe://example.org/a")
	refuse("and-empty", "or empty", "spiffe://example.org/a", "")
	refuse("https", "the scheme is spiffe (X509-SVID §5.2)", "https://example.org/a")
	refuse("no-scheme", "there is none", "example.org/a")
	refuse("scheme-alone", "there is no trust domain", "spiffe:")
	refuse("opaque", "there is no authority", "spiffe:example.org/a")
	refuse("no-trust-domain", "the authority is empty", "spiffe:///a")
	refuse("no-path", "the ID of the trust domain is nobody's (X509-SVID §5.2)", "spiffe://example.org")
	refuse("root-path", "a path does not end with a slash (SPIFFE-ID §2.2)", "spiffe://example.org/")
	refuse("trailing-slash", "likewise", "spiffe://example.org/a/")
	refuse("empty-segment", "segments are not empty (SPIFFE-ID §2.2)", "spiffe://example.org/a//b")
	refuse("dot", "nor . (SPIFFE-ID §2.2)", "spiffe://example.org/./a")
	refuse("dot-dot", "nor ..", "spiffe://example.org/a/../b")
	refuse("percent-encoded", "no percent-encoding (SPIFFE-ID §2.2)", "spiffe://example.org/%61")
	refuse("percent-encoded-slash", "likewise", "spiffe://example.org/a%2fb")
	refuse("query", "no query (SPIFFE-ID §2)", "spiffe://example.org/a?b=c")
	refuse("empty-query", "also no empty one", "spiffe://example.org/a?")
	refuse("fragment", "no fragment", "spiffe://example.org/a#b")
	refuse("empty-fragment", "also no empty one", "spiffe://example.org/a#")
	refuse("user", "no user (SPIFFE-ID §2.1)", "spiffe://root@example.org/a")
	refuse("empty-user", "also no empty one", "spiffe://@example.org/a")
	refuse("port", "no port", "spiffe://example.org:443/a")
	refuse("empty-port", "also no empty one", "spiffe://example.org:/a")
	refuse("upper-case-trust-domain", "trust domains are in lower case (SPIFFE-ID §2.1)", "spiffe://Example.org/a")
	refuse("percent-encoded-trust-domain", "and not encoded", "spiffe://ex%61mple.org/a")
	refuse("space", "a character that paths do not have", "spiffe://example.org/a b")
	refuse("star", "likewise", "spiffe://example.org/*")
	refuse("backslash", "likewise", `spiffe://example.org/a\b`)
	refuse("control-character", "likewise", "spiffe://example.org/a\n")
	refuse("null", "a name ends where it ends, not before (CVE-2009-2408)", "spiffe://example.org/a\x00/b")
	refuse("too-long", "2 049 bytes (SPIFFE-ID §2.3)", "spiffe://example.org/"+strings.Repeat("a", 2049-len("spiffe://example.org/")))
	refuse("long-trust-domain", "256 bytes (SPIFFE-ID §2.3)", "spiffe://"+strings.Repeat("a", 256)+"/a")
	refuse = func(id, why string, uris ...string) {
		m.refusePosing("uri-names/"+id, why, byRFC5280, ca, 17, noURI, standIn(true, uriSANs(uris...)...))
	}
	refuse("not-ascii", "URIs in certificates are IA5String (RFC 5280 §4.2.1.6)", "spiffe://example.org/\xff")
	refuse("letters-beyond-ascii", "likewise, though it is UTF-8", "spiffe://example.org/ä")
	refuse("look-alike-trust-domain", "a Cyrillic letter", "spiffe://ex\u0430mple.org/a")
}

// uriSANs is the value of a SAN extension with these URIs, whatever they are.
func uriSANs(uris ...string) []byte {
	var names []asn1.RawValue
	for _, uri := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)})
	}
	return der(names)
}

func otherNames(m *maker) {
	ca := m.below()
	m.refuse("other-names/no-names", "there is no SAN extension", ca, ca.Leaf("/a", forge.URIs(), named("spiffe://example.org/a")), bySPIFFE)
	m.refuse("other-names/empty-list", "a SAN extension has one name at least (RFC 5280 §4.2.1.6)", ca, ca.Leaf("/a", extension(forge.SubjectAltName, true, 0x30, 0)))
	m.refuse("other-names/not-critical-without-subject", "where the subject is empty the SAN is critical (RFC 5280 §4.2.1.6)", ca, ca.Leaf("/a", forge.RawURIs(false, "spiffe://example.org/a")), byPrudence)
	m.refuse("other-names/id-as-dns-name", "the SPIFFE ID is there as a DNS name", ca, ca.Leaf("/a", forge.URIs(), dns("spiffe://example.org/a")), bySPIFFE)
	uri := append([]byte{0x86, 22}, "spiffe://example.org/a"...)
	garbled := append([]byte{0x30, 30}, uri...)
	m.refusePosing("other-names/garbled", "the extension does not parse", byRFC5280, ca, 17, noURI, standIn(true, garbled...))
	behind := append(append([]byte{0x30, 24}, uri...), 5, 0)
	m.refuse("other-names/trailing-bytes", "there are bytes behind its value", ca, ca.Leaf("/a", extension(forge.SubjectAltName, true, behind...)))
	other := append(append([]byte{0x30, 24 + 11}, uri...), 0xa0, 9, 6, 3, 0x2a, 3, 4, 0xa0, 2, 5, 0)
	m.accept("other-names/other-name-beside", "an otherName beside the URI", ca, ca.Leaf("/a", extension(forge.SubjectAltName, true, other...)))
	leaf := ca.Leaf("/a", named("web"))
	malformed := bytes.Replace(leaf.Chain[0].RawTBSCertificate, []byte("\x13\x03web"), []byte("\x13\x01web"), 1)
	m.refuse("other-names/malformed-subject", "an attribute of the subject is longer than its value", ca, leaf, presenting(ca.SignTBS(malformed), ca.Cert.Raw))
}
