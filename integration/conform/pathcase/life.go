// Paths that are good, lifetimes, signatures and keys.

package pathcase

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" // what has to be refused is made with it
	"crypto/x509"
	"encoding/asn1"
	"slices"
	"strings"
	"time"

	"merlon.dev/sdk/svid/forge"
)

// sound are paths without a flaw, in all the forms that the standards allow.
func sound(m *maker) {
	ca := m.root()
	m.accept("sound/below-the-root", "an X509-SVID that the root has signed (X509-SVID §5.1)", ca, ca.Leaf("/a"))
	sub := ca
	for _, name := range []string{"one", "two", "three", "four", "five", "six"} {
		sub = sub.Intermediate()
		m.accept("sound/"+name+"-intermediates", "signing certificates between root and leaf (X509-SVID §3.2)", sub, sub.Leaf("/a"))
	}
	m.accept("sound/with-a-subject", "the subject is optional and says nothing (X509-SVID §2)", ca, ca.Leaf("/a", named("web")))
	m.accept("sound/subject-and-san-not-critical", "the SAN is critical only where the subject is empty (RFC 5280 §4.2.1.6)", ca, ca.Leaf("/a", named("web"), forge.RawURIs(false, "spiffe://example.org/a")))
	m.accept("sound/without-extended-key-usage", "extended key usage is only a SHOULD (X509-SVID §4.4)", ca, ca.Leaf("/a", purposes()))
	m.accept("sound/more-purposes", "serverAuth, clientAuth and another one", ca, ca.Leaf("/a", purposes(x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageCodeSigning)))
	m.accept("sound/key-encipherment", "a leaf may set keyEncipherment and keyAgreement (X509-SVID §4.3)", ca, ca.Leaf("/a", usage(x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment|x509.KeyUsageKeyAgreement)))
	m.accept("sound/dns-names", "other names than URIs are allowed beside it (X509-SVID §2)", ca, ca.Leaf("/a", dns("web.test", "*.web.test")))
	m.accept("sound/long-path", "a SPIFFE ID of 2 048 bytes (SPIFFE-ID §2.3)", ca, ca.Leaf("/"+strings.Repeat("a", 2047-len("spiffe://example.org"))))
	m.accept("sound/every-character", "every character that a path may have (SPIFFE-ID §2.2)", ca, ca.Leaf("/AZ/az/09/.../-_./a"))
	m.accept("sound/scheme-in-upper-case", "schemes compare without case (SPIFFE-ID §2)", ca, ca.Leaf("/a", forge.RawURIs(true, "SPIFFE://example.org/a")))
	noURI := forge.URIs()
	ca = m.root(noURI)
	m.accept("sound/root-without-a-uri", "a signing certificate need not be an SVID itself (X509-SVID §3.2)", ca, ca.Leaf("/a"))
	ca = m.below(noURI)
	m.accept("sound/intermediate-without-a-uri", "nor an intermediate", ca, ca.Leaf("/a"))
	ca = m.below(usage(x509.KeyUsageCertSign))
	m.accept("sound/intermediate-signs-certificates-only", "cRLSign is optional (X509-SVID §4.3)", ca, ca.Leaf("/a"))
	ca = m.below(usage(x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature))
	m.accept("sound/intermediate-with-digital-signature", "a signing certificate may set digitalSignature", ca, ca.Leaf("/a"))
	ca = forge.New(m.tb, "10.0.0.1")
	m.accept("sound/address-as-trust-domain", "a trust domain that looks like an address (SPIFFE-ID §2.1)", ca, ca.Leaf("/a"))
	ca = forge.New(m.tb, "_under-score_")
	m.accept("sound/underscores-in-the-trust-domain", "underscores are allowed (SPIFFE-ID §2.1)", ca, ca.Leaf("/a"))
}

func times(m *maker) {
	second := time.Second
	now := m.now.Truncate(second)
	exact := func(from, to time.Time) forge.Change {
		return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, to }
	}
	ca := m.root()
	m.accept("times/first-second", "validity includes its first second (RFC 5280 §4.1.2.5)", ca, ca.Leaf("/a", exact(now, now.Add(time.Hour))), at(now))
	m.accept("times/last-second", "and its last one", ca, ca.Leaf("/a", exact(now.Add(-time.Hour), now)), at(now))
	m.refuse("times/leaf-a-second-early", "not valid yet", ca, ca.Leaf("/a", exact(now.Add(second), now.Add(time.Hour))), at(now))
	m.refuse("times/leaf-a-second-late", "expired", ca, ca.Leaf("/a", exact(now.Add(-time.Hour), now.Add(-second))), at(now))
	m.refuse("times/never-valid", "notAfter is before notBefore", ca, ca.Leaf("/a", valid(time.Hour, -time.Hour)))
	m.refuse("times/leaf-in-ten-years", "not valid yet", ca, ca.Leaf("/a", valid(87600*time.Hour, 90000*time.Hour)))
	m.accept("times/leaf-outlives-its-issuer", "each certificate is judged by itself (RFC 5280 §6.1.3)", ca, ca.Leaf("/a", valid(-time.Minute, 9000*time.Hour)))
	m.accept("times/beyond-2050", "GeneralizedTime from 2050 on (RFC 5280 §4.1.2.5)", ca, ca.Leaf("/a", exact(now.Add(-time.Minute), time.Date(2051, 1, 1, 0, 0, 0, 0, time.UTC))))
	m.accept("times/no-end", "99991231235959Z: it has no end (RFC 5280 §4.1.2.5)", ca, ca.Leaf("/a", exact(now.Add(-time.Minute), time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC))))
	gone, early := valid(-2*time.Hour, -time.Hour), valid(time.Hour, 2*time.Hour)
	for name, life := range map[string]forge.Change{"expired": gone, "not-yet-valid": early} {
		ca = m.below(life)
		m.refuse("times/intermediate-"+name, "every certificate of the path has to be valid (RFC 5280 §6.1.3)", ca, ca.Leaf("/a"))
		ca = m.below(life).Intermediate()
		m.refuse("times/upper-intermediate-"+name, "also the one further up", ca, ca.Leaf("/a"))
		ca = m.root(life)
		m.refuse("times/root-"+name, "X.509 authorities of a trust bundle are certificates, with their lifetimes", ca, ca.Leaf("/a"), byPrudence)
	}
	ca = m.root()
	m.accept("times/another-root-expired", "a root that has expired takes nothing from one that has not", ca, ca.Leaf("/a"), trusting(m.root(gone).Cert, ca.Cert))
	m.accept("times/same-root-expired-and-renewed", "the root was renewed with the same key and name", ca, ca.Leaf("/a"), trusting(ca.Again(gone), ca.Cert))
	sub := ca.Intermediate()
	leaf := sub.Leaf("/a")
	m.accept("times/intermediate-expired-and-renewed", "two certificates of one intermediate are shown, one of them expired", ca, leaf, presentingCerts(leaf.Chain[0], sub.Again(gone), sub.Cert))
	m.refuse("times/intermediate-expired-twice", "both are expired", ca, leaf, presentingCerts(leaf.Chain[0], sub.Again(gone), sub.Again(gone)))
}

func signatures(m *maker) {
	ca := m.below()
	leaf := ca.Leaf("/a")
	flipped := func(der []byte, fromEnd int) []byte {
		out := slices.Clone(der)
		out[len(out)-fromEnd] ^= 1
		return out
	}
	tampered := func(der []byte, was, is string) []byte { return bytes.Replace(der, []byte(was), []byte(is), 1) }
	above := leaf.Chain[1].Raw
	m.refuse("signatures/leaf-flipped-bit", "one bit of the leaf's signature", ca, leaf, presenting(flipped(leaf.Chain[0].Raw, 1), above))
	m.refuse("signatures/intermediate-flipped-bit", "one bit of the intermediate's signature", ca, leaf, presenting(leaf.Chain[0].Raw, flipped(above, 1)))
	m.refuse("signatures/other-name-in-the-leaf", "the SPIFFE ID was changed after it was signed", ca, leaf, presenting(tampered(leaf.Chain[0].Raw, "example.org/a", "example.org/b"), above))
	m.refuse("signatures/other-name-in-the-intermediate", "the intermediate's was", ca, leaf, presenting(leaf.Chain[0].Raw, tampered(above, "spiffe://example.org", "spiffe://examples.or")))
	tbs := leaf.Chain[0].RawTBSCertificate
	algorithm := []byte{0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}
	m.refuse("signatures/empty", "no signature at all", ca, leaf, presenting(forge.Assemble(tbs, algorithm, nil), above))
	m.refuse("signatures/zeros", "r and s are zero", ca, leaf, presenting(forge.Assemble(tbs, algorithm, der(struct{ R, S int }{})), above))
	sha384 := []byte{0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3}
	m.refuse("signatures/two-algorithms", "the algorithm outside is not the one inside (RFC 5280 §4.1.1.2)", ca, leaf, presenting(forge.Assemble(tbs, sha384, leaf.Chain[0].Signature), above))
	unknown := bytes.ReplaceAll(tbs, algorithm[2:], []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 99})
	m.refuse("signatures/unknown-algorithm", "an algorithm that nobody knows, outside and inside", ca, leaf, presenting(forge.Assemble(unknown, []byte{0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 99}, leaf.Chain[0].Signature), above))
	m.refuse("signatures/sha-1", "a good ECDSA signature over SHA-1", ca, leaf, presenting(sha1Signed(m, ca, tbs), above), byPrudence)
	impostor := m.impostor().Intermediate().Leaf("/a")
	m.refuse("signatures/issuer-of-that-name-elsewhere", "signed by an intermediate that somebody else's root has signed", ca, impostor)
	twin := ca.Parent.Intermediate(func(c *x509.Certificate) {
		c.Subject, c.SubjectKeyId = ca.Cert.Subject, ca.Cert.SubjectKeyId
	})
	m.refuse("signatures/by-another-key-of-that-name", "the issuer that is shown has the name and key ID, and another key", ca, leaf, presentingCerts(leaf.Chain[0], twin.Cert))
	m.accept("signatures/both-of-that-name", "two issuers of one name and key ID are shown, and one of them has signed", ca, leaf, presentingCerts(leaf.Chain[0], twin.Cert, ca.Cert))
	self := m.impostor().Leaf("/a")
	m.refuse("signatures/unknown-root", "signed by a root that is not in the trust bundle", ca, self)
	m.refuse("signatures/self-signed-leaf", "signed by its own key, under the issuer's name", ca, selfSigned(m, ca))
}

// selfSigned is a leaf that its own key has signed.
func selfSigned(m *maker, ca *forge.Authority) *forge.SVID {
	leaf := ca.Leaf("/a")
	alone := &forge.Authority{Key: leaf.Key}
	cert, err := x509.ParseCertificate(alone.SignTBS(leaf.Chain[0].RawTBSCertificate))
	if err != nil {
		m.tb.Fatal(err)
	}
	return &forge.SVID{Chain: []*x509.Certificate{cert, leaf.Chain[1]}, Key: leaf.Key}
}

// sha1Signed signs tbs anew with ecdsa-with-SHA1 (RFC 3279 §2.2.3).
func sha1Signed(m *maker, ca *forge.Authority, tbs []byte) []byte {
	with256 := []byte{0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}
	with1 := []byte{0x30, 9, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1}
	var body asn1.RawValue
	if _, err := asn1.Unmarshal(tbs, &body); err != nil {
		m.tb.Fatal(err)
	}
	tbs = der(asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: bytes.Replace(body.Bytes, with256, with1, 1)})
	digest := sha1.Sum(tbs)
	sig, err := ca.Key.Sign(rand.Reader, digest[:], crypto.SHA1)
	if err != nil {
		m.tb.Fatal(err)
	}
	return forge.Assemble(tbs, with1, sig)
}

func keys(m *maker) {
	for name, curve := range map[string]elliptic.Curve{"p-384": elliptic.P384(), "p-521": elliptic.P521()} {
		ca := m.root(forge.OfKey(m.ecdsa(curve))).Intermediate(forge.OfKey(m.ecdsa(curve)))
		m.accept("keys/"+name, "all keys of the path", ca, ca.Leaf("/a", forge.OfKey(m.ecdsa(curve))))
	}
	ca := m.root(forge.OfKey(m.rsa(2048)))
	m.accept("keys/rsa-2048-root", "signs with SHA-256", ca, ca.Leaf("/a"))
	ca = m.root()
	m.accept("keys/rsa-2048-leaf", "an RSA key in the leaf", ca, ca.Leaf("/a", forge.OfKey(m.rsa(2048))))
	m.accept("keys/rsa-3072-leaf", "likewise", ca, ca.Leaf("/a", forge.OfKey(m.rsa(3072))))
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		m.tb.Fatal(err)
	}
	m.accept("keys/ed25519-leaf", "Ed25519 (RFC 8410)", ca, ca.Leaf("/a", forge.OfKey(edwards)))
	sub := m.root(forge.OfKey(edwards))
	m.accept("keys/ed25519-root", "likewise", sub, sub.Leaf("/a"))
	m.refuse("keys/p-224-leaf", "fewer than 128 bits of strength (NIST SP 800-57)", ca, ca.Leaf("/a", forge.OfKey(m.ecdsa(elliptic.P224()))), byPrudence)
	sub = ca.Intermediate(forge.OfKey(m.ecdsa(elliptic.P224())))
	m.refuse("keys/p-224-intermediate", "likewise", sub, sub.Leaf("/a"), byPrudence)
	weak := forge.NewRSAKey(m.tb, 1024, 65537)
	m.refuse("keys/rsa-1024-leaf", "fewer than 112 bits of strength", ca, ca.Leaf("/a", forge.OfKey(weak)), byPrudence)
	sub = ca.Intermediate(forge.OfKey(weak))
	m.refuse("keys/rsa-1024-intermediate", "likewise", sub, sub.Leaf("/a"), byPrudence)
	sub = m.root(forge.OfKey(weak))
	m.refuse("keys/rsa-1024-root", "likewise", sub, sub.Leaf("/a"), byPrudence)
	huge := forge.NewRSAKey(m.tb, 16384, 65537)
	m.refuse("keys/rsa-16384-leaf", "to verify with such a key is an attack on the verifier", ca, ca.Leaf("/a", forge.OfKey(huge)), byPrudence)
	sub = ca.Intermediate(forge.OfKey(huge))
	m.refuse("keys/rsa-16384-intermediate", "likewise", sub, sub.Leaf("/a"), byPrudence)
}

func (m *maker) ecdsa(curve elliptic.Curve) crypto.Signer {
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		m.tb.Fatal(err)
	}
	return key
}

func (m *maker) rsa(bits int) crypto.Signer {
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		m.tb.Fatal(err)
	}
	return key
}
