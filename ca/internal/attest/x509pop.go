// X.509 proof of possession: a node that has a certificate of somebody else's,
// its manufacturer's or its site's, and shows that it holds the key. It can
// attest again as long as the certificate lives.

package attest

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/sdk/possession"
)

// X509POP is the kind of evidence in an agent's record.
const X509POP = "x509pop"

const (
	maxPOPChain     = 5
	maxPOPBytes     = 64 << 10
	maxPOPSignature = 1 << 10 // RSA of 8192 bits
	maxPOPNames     = 16      // DNS names that become selectors
	popByKey        = "public_key"
	popByCommonName = "common_name"
	popByDNSName    = "dns_name"
)

// POPNames are the ways to name a node by its certificate; the first is the
// default.
func POPNames() []string { return []string{popByKey, popByCommonName, popByDNSName} }

// POP proves nodes by their certificates. It is safe for concurrent use.
type POP struct {
	TrustDomain spiffeid.TrustDomain
	// Roots are who may vouch for nodes.
	Roots *x509.CertPool
	// Name is one of POPNames: what of the certificate the node is called by.
	Name string
}

// Prove says which node's the chain and the signature over statement are.
func (p *POP) Prove(chain [][]byte, signature, statement []byte, now time.Time) (*Node, error) {
	leaf, above, err := parsePOP(chain)
	if err != nil {
		return nil, err
	}
	verified, err := p.verify(leaf, above, now)
	if err != nil {
		return nil, err
	}
	if len(signature) > maxPOPSignature {
		return nil, refused(X509POP, Malformed, "the signature has %d bytes; at most %d", len(signature), maxPOPSignature)
	}
	if !possession.Verify(leaf.PublicKey, statement, signature) {
		return nil, refused(X509POP, NotProved, "the signature is not by the certificate's key over this connection and CSR: connect again and sign anew")
	}
	id, err := p.id(leaf)
	if err != nil {
		return nil, err
	}
	return &Node{ID: id, Kind: X509POP, Selectors: popFacts(leaf, verified)}, nil
}

// parsePOP reads the certificates: nothing of them counts before verify.
func parsePOP(chain [][]byte) (leaf *x509.Certificate, above []*x509.Certificate, err error) {
	if len(chain) == 0 || len(chain) > maxPOPChain {
		return nil, nil, refused(X509POP, Malformed, "the chain has %d certificates; want 1 to %d, leaf first and without the root", len(chain), maxPOPChain)
	}
	total := 0
	for _, der := range chain {
		total += len(der)
	}
	if total > maxPOPBytes {
		return nil, nil, refused(X509POP, Malformed, "the chain has %d bytes; at most %d", total, maxPOPBytes)
	}
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, refused(X509POP, Malformed, "certificate %d of the chain does not parse", i+1)
		}
		if err := possession.CheckKey(cert.PublicKey); err != nil {
			return nil, nil, refused(X509POP, Malformed, "the key of certificate %d of the chain is not taken: %v", i+1, err)
		}
		if i == 0 {
			leaf = cert
		} else {
			above = append(above, cert)
		}
	}
	return leaf, above, nil
}

// verify returns the shortest chain from leaf to a configured root.
func (p *POP) verify(leaf *x509.Certificate, above []*x509.Certificate, now time.Time) ([]*x509.Certificate, error) {
	switch {
	case leaf.IsCA:
		return nil, refused(X509POP, NotAllowed, "the certificate is that of an authority: a node needs one of its own")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return nil, refused(X509POP, NotAllowed, "the certificate is not for digital signatures (keyUsage)")
	}
	intermediates := x509.NewCertPool()
	for _, cert := range above {
		intermediates.AddCert(cert)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: p.Roots, Intermediates: intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return nil, refused(X509POP, Untrusted, "%s: the CA takes certificates below the roots in node_attestors.x509pop.ca_file only", popFault(err))
	}
	best := chains[0]
	for _, chain := range chains[1:] {
		if len(chain) < len(best) {
			best = chain
		}
	}
	return best, nil
}

// popFault is what is wrong with a chain, without what the sender put into it.
func popFault(err error) string {
	if e, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		switch e.Reason {
		case x509.Expired:
			return "a certificate of the chain has expired or is not valid yet"
		case x509.IncompatibleUsage:
			return "the certificate is not for client authentication (extKeyUsage)"
		}
		return "a certificate of the chain is not valid"
	}
	if _, ok := errors.AsType[x509.UnhandledCriticalExtension](err); ok {
		return "a certificate of the chain has a critical extension that is not known here"
	}
	return "the chain does not end in a configured root"
}

// id names the agent. Each way has names of its own, so that a common name is
// never taken for a hash. A hash of the whole certificate would be no name: its
// signature can be written in more than one way, and the node would have as many.
func (p *POP) id(leaf *x509.Certificate) (spiffeid.ID, error) {
	segments := []string{hexSHA256(leaf.RawSubjectPublicKeyInfo)}
	switch p.Name {
	case popByCommonName:
		segments = []string{"cn", leaf.Subject.CommonName}
	case popByDNSName:
		if len(leaf.DNSNames) != 1 {
			return spiffeid.ID{}, refused(X509POP, NotAllowed, "the certificate has %d DNS names, and nodes are called by the only one (node_attestors.x509pop.name)", len(leaf.DNSNames))
		}
		segments = []string{"dns", leaf.DNSNames[0]}
	}
	id, err := entry.AttestedID(p.TrustDomain, X509POP, segments...)
	if err != nil {
		return id, refused(X509POP, NotAllowed, "the certificate's %s cannot be a node's name: it has to be a path segment of a SPIFFE ID", p.Name)
	}
	return id, nil
}

func popFacts(leaf *x509.Certificate, verified []*x509.Certificate) []entry.Selector {
	f := facts{kind: X509POP}
	f.add("key-sha256", hexSHA256(leaf.RawSubjectPublicKeyInfo))
	f.add("subject-cn", leaf.Subject.CommonName)
	for _, name := range leaf.DNSNames[:min(len(leaf.DNSNames), maxPOPNames)] {
		f.add("dns", name)
	}
	for _, authority := range verified[1:] {
		f.add("ca-key-sha256", hexSHA256(authority.RawSubjectPublicKeyInfo))
	}
	return f.list
}

func hexSHA256(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// CheckPOPName says why name is no way to name nodes.
func CheckPOPName(name string) error {
	if !slices.Contains(POPNames(), name) {
		return fmt.Errorf("%q is none of %s", name, strings.Join(POPNames(), ", "))
	}
	return nil
}
