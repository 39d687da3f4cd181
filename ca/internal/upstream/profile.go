// The certificates of root and intermediate. Every generation has its own subject
// and key ID: a verifier that has many roots of one subject would try each
// signature.

package upstream

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/authority"
)

const organization = "Merlon"

func (k *Keys) makeRoot(now time.Time) (*generation, error) {
	template, err := k.caTemplate("root", now, k.cfg.RootTTL)
	if err != nil {
		return nil, err
	}
	template.MaxPathLen = 1 // the intermediate, and no authority below it
	return k.makeAuthority(kindRoot, template, nil)
}

func (k *Keys) makeIntermediate(now time.Time) (*generation, error) {
	template, err := k.intermediateTemplate(now)
	if err != nil {
		return nil, err
	}
	return k.makeAuthority(kindIntermediate, template, k.root())
}

// intermediateTemplate is the profile of every replica's intermediate.
func (k *Keys) intermediateTemplate(now time.Time) (*x509.Certificate, error) {
	root := k.root().cert
	if !now.Before(root.NotAfter) {
		return nil, fmt.Errorf("the root ended at %s", root.NotAfter.Format(time.RFC3339))
	}
	if now.Before(root.NotBefore) {
		return nil, fmt.Errorf("the clock says %s, and the root begins at %s: set the clock right", now.UTC().Format(time.RFC3339), root.NotBefore.Format(time.RFC3339))
	}
	template, err := k.caTemplate("intermediate", now, k.cfg.IntermediateTTL)
	if err != nil {
		return nil, err
	}
	template.MaxPathLen, template.MaxPathLenZero = 0, true
	if template.NotAfter.After(root.NotAfter) {
		template.NotAfter = root.NotAfter
	}
	if template.NotBefore.Before(root.NotBefore) {
		template.NotBefore = root.NotBefore
	}
	if td := k.cfg.TrustDomain; constrainable(td) {
		template.PermittedURIDomains = []string{td.Name()}
		template.PermittedDNSDomainsCritical = true // despite its name, of the whole extension
	}
	return template, nil
}

// makeAuthority makes a key, has softcas sign its certificate by issuer, which is
// itself where there is none, and puts both away.
func (k *Keys) makeAuthority(what kind, template *x509.Certificate, issuer *generation) (*generation, error) {
	key, err := k.dir.create(what)
	if err != nil {
		return nil, err
	}
	template.PublicKey = key.signer.Public()
	if issuer == nil {
		issuer = &generation{signer: key.signer, cert: template}
	}
	cert, err := signBy(issuer, template)
	if err != nil {
		return nil, k.dir.discard(key, err)
	}
	if err := checkAuthority(cert, template); err != nil {
		return nil, k.dir.discard(key, fmt.Errorf("the certificate that was made is not the one asked for: %w", err))
	}
	return k.dir.add(what, key, cert)
}

// caTemplate is what root and intermediate have in common (X6, X8, X10, X11).
func (k *Keys) caTemplate(role string, now time.Time, ttl time.Duration) (*x509.Certificate, error) {
	generation, err := randomHex(8)
	if err != nil {
		return nil, err
	}
	td := k.cfg.TrustDomain
	subject := pkix.Name{
		Organization: []string{organization},
		CommonName:   "Merlon " + role + " " + td.Name(),
		SerialNumber: generation,
	}
	if k.cfg.Development {
		subject.Organization = []string{authority.DevelopmentOrganization}
	}
	if len(subject.CommonName) > 64 { // RFC 5280 appendix A.1
		subject.CommonName = "Merlon " + role
	}
	now = now.UTC().Truncate(time.Second)
	return &x509.Certificate{
		Subject:               subject,
		NotBefore:             now.Add(-authority.Backdate),
		NotAfter:              now.Add(ttl),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		URIs:                  []*url.URL{td.ID().URL()},
	}, nil
}

// checkAuthority compares what an upstream returned with what was asked: the
// default one is a library, others will be services.
func checkAuthority(got, want *x509.Certificate) error {
	switch {
	case got == nil:
		return errors.New("there is none")
	case !got.IsCA || !got.BasicConstraintsValid || got.KeyUsage != want.KeyUsage:
		return errors.New("it is not a signing certificate")
	case got.MaxPathLen != want.MaxPathLen || got.MaxPathLenZero != want.MaxPathLenZero:
		return errors.New("its path length differs")
	case len(got.URIs) != 1 || got.URIs[0].String() != want.URIs[0].String():
		return errors.New("it does not carry exactly the SPIFFE ID of the trust domain")
	case !slices.Equal(got.PermittedURIDomains, want.PermittedURIDomains):
		return errors.New("its name constraints differ")
	case got.NotAfter.After(want.NotAfter):
		return errors.New("it lives longer")
	case len(got.SubjectKeyId) == 0:
		return errors.New("it has no subject key ID")
	}
	return nil
}

// constrainable: crypto/x509 cannot match a URI whose host is an IP address
// against a name constraint, and does not parse constraints that are no host
// names, while SPIFFE allows both as trust domains (ID4). Those go without.
func constrainable(td spiffeid.TrustDomain) bool {
	name := td.Name()
	if _, err := netip.ParseAddr(name); err == nil || len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "-_") != label || strings.Contains(label, "_") {
			return false
		}
	}
	return true
}

func randomHex(n int) (string, error) {
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		return "", fmt.Errorf("read randomness: %w", err)
	}
	return hex.EncodeToString(b), nil
}
