// Package pathcase is a corpus of certification paths for X509-SVIDs: what a
// validator has to accept, and what to refuse, by RFC 5280 and the X509-SVID
// standard. Each case is made when it is asked for, by an authority that signs
// whatever it is told to, so every signature in it is good unless the case is about
// signatures.
//
// All makes the cases. WriteLimbo writes them in the format of x509-limbo, for
// validators that are not written in Go.
package pathcase

import (
	"crypto"
	"crypto/x509"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid/forge"
)

// TrustDomain is the trust domain of most cases.
const TrustDomain = "example.org"

// Case is one path and the verdict that the standards give. It is read-only.
type Case struct {
	// ID is theme/name, unique, in lower case with dashes.
	ID string
	// Why says what is special about the path and which section decides.
	Why string
	// Accept is the verdict.
	Accept bool
	// TrustDomain is the one whose trust bundle has the X.509 authorities Trusted.
	TrustDomain spiffeid.TrustDomain
	Trusted     []*x509.Certificate
	// Presented is the DER of what the peer shows, leaf first.
	Presented [][]byte
	// Key is the private key of the first certificate that is presented: with another
	// one no TLS server, whatever it verifies, would finish the handshake. It is nil
	// where nothing is presented.
	Key crypto.Signer
	// Time is when the path is judged.
	Time time.Time
	// By says who gives the verdict.
	By Source
}

// Source is who gives a verdict.
type Source string

// The sources. What RFC 5280 refuses, every validator of certificates has to refuse.
const (
	RFC5280 Source = "RFC 5280"
	// SPIFFE: RFC 5280, which knows nothing of SPIFFE IDs, accepts the path.
	SPIFFE Source = "SPIFFE"
	// Prudence: the standards leave it open, and refusing is what a careful validator
	// does.
	Prudence Source = "prudence"
)

// Requirement is the number of the checklist (X2, ID5, …) that the case is about.
func (c Case) Requirement() string {
	if r, ok := requirements[c.ID]; ok {
		return r
	}
	return requirements[c.Theme()]
}

// requirements are those of themes, and of cases that differ from their theme.
var requirements = map[string]string{
	"sound": "X13", "times": "X13", "signatures": "X13", "keys": "X13", "extensions": "X13", "links": "X13", "chains": "X13", "anchors": "X13",
	"basic-constraints": "X8", "key-usage": "X11", "extended-key-usage": "X12", "uri-constraints": "X9", "other-constraints": "X13",
	"uri-names": "ID5", "other-names": "X13", "trust-domains": "X17",

	"sound/long-path": "ID6", "sound/every-character": "ID5", "sound/scheme-in-upper-case": "ID8",
	"signatures/other-name-in-the-leaf": "ID10", "signatures/self-signed-leaf": "ID11", "signatures/unknown-root": "ID11",
	"chains/root-alone": "X7", "chains/intermediate-alone": "X7", "chains/leaf-last": "X7", "anchors/the-leaf": "X7",
	"basic-constraints/leaf-is-a-ca": "X14", "basic-constraints/leaf-has-none": "X14",
	"key-usage/leaf-signs-certificates": "X14", "key-usage/leaf-signs-crls": "X14",
	"key-usage/leaf-has-none": "X10", "key-usage/leaf-not-critical": "X10", "key-usage/intermediate-has-none": "X10", "key-usage/intermediate-not-critical": "X10",
	"key-usage/root-has-none": "X10", "key-usage/root-not-critical": "X10",
	"uri-names/none": "X14", "uri-names/https": "X14", "uri-names/no-scheme": "X14", "uri-names/scheme-alone": "ID1", "uri-names/opaque": "ID1", "uri-names/no-trust-domain": "ID1",
	"uri-names/two": "X2", "uri-names/the-same-twice": "X2", "uri-names/and-https": "X2", "uri-names/and-empty": "X2", "uri-names/https-first": "X2",
	"uri-names/no-path": "X4", "uri-names/query": "ID1", "uri-names/empty-query": "ID1", "uri-names/fragment": "ID1", "uri-names/empty-fragment": "ID1",
	"uri-names/user": "ID2", "uri-names/empty-user": "ID2", "uri-names/port": "ID2", "uri-names/empty-port": "ID2",
	"uri-names/upper-case-trust-domain": "ID3", "uri-names/percent-encoded-trust-domain": "ID3", "uri-names/look-alike-trust-domain": "ID3",
	"uri-names/too-long": "ID6", "uri-names/long-trust-domain": "ID7",
	"other-names/no-names": "X14", "other-names/id-as-dns-name": "X14", "other-names/not-critical-without-subject": "X5",
	"trust-domains/intermediate-with-a-path": "X6", "trust-domains/root-with-a-path": "X6", "trust-domains/intermediate-of-two": "X6", "trust-domains/intermediate-of-another": "X6",
}

// Theme is the part of the ID before the slash.
func (c Case) Theme() string {
	theme, _, _ := strings.Cut(c.ID, "/")
	return theme
}

// All makes every case anew, at the present time. It needs about as many keys as
// there are cases, which takes well under a second.
func All(tb forge.TB) []Case {
	m := &maker{tb: tb, now: time.Now()}
	for _, theme := range []func(*maker){
		sound, times, signatures, keys, basicConstraints, keyUsages, extendedUsages, uriConstraints, otherConstraints,
		uriNames, otherNames, links, extensions, chains, anchors, trustDomains,
	} {
		theme(m)
	}
	slices.SortFunc(m.cases, func(a, b Case) int { return strings.Compare(a.ID, b.ID) })
	return m.cases
}

// maker collects cases.
type maker struct {
	tb     forge.TB
	now    time.Time
	shared *forge.Authority
	cases  []Case
}

// root is the root that most cases share, or with changes one of its own.
func (m *maker) root(changes ...forge.Change) *forge.Authority {
	if len(changes) > 0 {
		return forge.New(m.tb, TrustDomain, changes...)
	}
	if m.shared == nil {
		m.shared = m.impostor()
	}
	return m.shared
}

// impostor is a root like the others, which nobody trusts unless a case says so.
func (m *maker) impostor() *forge.Authority { return forge.New(m.tb, TrustDomain) }

// below is an intermediate of the root.
func (m *maker) below(changes ...forge.Change) *forge.Authority {
	return m.root().Intermediate(changes...)
}

// option changes a case.
type option func(*Case)

// trusting replaces the trust bundle's authorities.
func trusting(certs ...*x509.Certificate) option {
	return func(c *Case) { c.Trusted = certs }
}

// presenting replaces what the peer shows.
func presenting(raw ...[]byte) option {
	return func(c *Case) { c.Presented = raw }
}

// presentingCerts is presenting for parsed certificates.
func presentingCerts(certs ...*x509.Certificate) option {
	return func(c *Case) {
		c.Presented = nil
		for _, cert := range certs {
			c.Presented = append(c.Presented, cert.Raw)
		}
	}
}

// holding is for a first certificate that is not the leaf's: its private key.
func holding(key crypto.Signer) option { return func(c *Case) { c.Key = key } }

// at judges the path at another time.
func at(t time.Time) option { return func(c *Case) { c.Time = t } }

// bySPIFFE and byPrudence say who gives the verdict, where RFC 5280 does not. To it a
// trust anchor is a name and a key (§6.1.1 d): what a root's certificate says beyond
// them counts by prudence.
func byRFC5280(c *Case)  { c.By = RFC5280 }
func bySPIFFE(c *Case)   { c.By = SPIFFE }
func byPrudence(c *Case) { c.By = Prudence }

// accept adds a path that is good.
func (m *maker) accept(id, why string, ca *forge.Authority, leaf *forge.SVID, options ...option) {
	m.add(true, id, why, ca, leaf, options)
}

// refuse adds a path that is not.
func (m *maker) refuse(id, why string, ca *forge.Authority, leaf *forge.SVID, options ...option) {
	m.add(false, id, why, ca, leaf, options)
}

func (m *maker) add(accept bool, id, why string, ca *forge.Authority, leaf *forge.SVID, options []option) {
	c := Case{
		ID: id, Why: why, Accept: accept, TrustDomain: ca.TrustDomain,
		Trusted: []*x509.Certificate{ca.Root().Cert}, Presented: leaf.Raw(), Key: leaf.Key, Time: m.now, By: RFC5280,
	}
	for _, o := range options {
		o(&c)
	}
	m.cases = append(m.cases, c)
}
