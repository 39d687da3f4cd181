// Intermediates that were verified: many leaves come under one, and its own signature
// need not be verified with each. For a leaf under a known one the rest of RFC 5280 §6.1
// is done by crypto/x509 with the intermediate as its trust anchor, and the paths above
// that are those that were found before. What a certificate above it could say about the
// leaf, and crypto/x509 would not see then, keeps it from being remembered.

package svid

import (
	"crypto/x509"
	"encoding/asn1"
	"sync"
	"time"
)

// maxIssuers bounds what is remembered; a trust domain has a handful.
const maxIssuers = 64

// The extensions by which a certificate speaks about all below it (RFC 5280 §6.1).
var (
	oidNameConstraints   = asn1.ObjectIdentifier{2, 5, 29, 30}
	oidPolicyMappings    = asn1.ObjectIdentifier{2, 5, 29, 33}
	oidPolicyConstraints = asn1.ObjectIdentifier{2, 5, 29, 36}
	oidInhibitAnyPolicy  = asn1.ObjectIdentifier{2, 5, 29, 54}
)

// issuers are intermediates below one trust bundle. It is safe for concurrent use; nil
// remembers none.
type issuers struct {
	mu    sync.Mutex
	known map[string]issuer // by all of their bytes
}

// issuer is an intermediate with all paths from it to a root, and when verifying it
// again would give the same.
type issuer struct {
	paths       [][]*x509.Certificate
	from, until time.Time
}

// paths are those of a leaf that was presented with nothing but an intermediate that is
// known; nil where it was not, or the leaf is not good, which somebody else has to say
// why.
func (s *issuers) paths(certs []*x509.Certificate, now time.Time) [][]*x509.Certificate {
	if s == nil || len(certs) != 2 {
		return nil
	}
	s.mu.Lock()
	above, ok := s.known[string(certs[1].Raw)]
	s.mu.Unlock()
	if !ok || now.Before(above.from) || !now.Before(above.until) || says(certs[0], oidPolicyConstraints) {
		return nil
	}
	anchor := x509.NewCertPool()
	anchor.AddCert(certs[1])
	if _, err := certs[0].Verify(x509.VerifyOptions{
		Roots: anchor, Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}); err != nil {
		return nil
	}
	chains := make([][]*x509.Certificate, len(above.paths))
	for i, path := range above.paths {
		chains[i] = append([]*x509.Certificate{certs[0]}, path...)
	}
	return chains
}

// learn remembers the intermediate of a chain that was verified to be good, with all of
// its paths, where any leaf under it would have the same.
func (s *issuers) learn(a *anchors, certs []*x509.Certificate, chains [][]*x509.Certificate, now time.Time) {
	if s == nil || len(certs) != 2 || len(a.named[string(certs[0].RawIssuer)]) > 0 || says(certs[1], oidPolicyMappings, oidPolicyConstraints, oidInhibitAnyPolicy) {
		return
	}
	known := issuer{from: now, until: certs[1].NotAfter}
	for _, root := range a.named[string(certs[1].RawIssuer)] { // also one to which this leaf has no path
		if says(root, oidNameConstraints, oidPolicyMappings, oidPolicyConstraints, oidInhibitAnyPolicy) {
			return
		}
	}
	for _, chain := range chains {
		if len(chain) != 3 || !chain[1].Equal(certs[1]) {
			return
		}
		known.until = earlier(known.until, chain[2].NotAfter)
		known.paths = append(known.paths, chain[1:])
	}
	for _, root := range a.roots { // another path
		if now.Before(root.NotBefore) {
			known.until = earlier(known.until, root.NotBefore)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil || len(s.known) >= maxIssuers {
		s.known = make(map[string]issuer)
	}
	s.known[string(certs[1].Raw)] = known
}

// forget makes every intermediate be verified again.
func (s *issuers) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known = nil
}

// says is whether the certificate has one of the extensions.
func says(cert *x509.Certificate, oids ...asn1.ObjectIdentifier) bool {
	for _, oid := range oids {
		if _, _, ok := extension(cert, oid); ok {
			return true
		}
	}
	return false
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
