// Package authority issues SVIDs: the certificate profile, the lint that every
// certificate passes before the key touches it, the leaf signer, the policy on
// CSRs and keys, and JWT-SVIDs. It knows signers and certificates, not where they
// come from (ca/internal/upstream) and not who may have an SVID (ca).
package authority

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
)

// Backdate is how long before its issuance an X509-SVID is valid, for clocks that
// are behind.
const Backdate = time.Minute

// X509Authority signs leaves. It is immutable and safe for concurrent use as far
// as Signer is.
type X509Authority struct {
	Chain  []*x509.Certificate // the issuer and what is above it, without the root
	Root   *x509.Certificate
	Signer crypto.Signer // key of Chain[0]
}

// LeafRequest asks for an X509-SVID.
type LeafRequest struct {
	SPIFFEID  spiffeid.ID
	PublicKey crypto.PublicKey
	Serial    svid.Serial
	// TTL is how long it lives from Now, cut at the end of the issuing chain.
	TTL time.Duration
	// DNSNames are DNS SANs; CommonName is the subject. Both are optional.
	DNSNames   []string
	CommonName string
	Now        time.Time
}

// Leaf is a signed X509-SVID.
type Leaf struct {
	DER                 []byte
	NotBefore, NotAfter time.Time
	Serial              svid.Serial
	Cut                 bool // the TTL was cut at the end of the issuing chain
}

// InvalidError reports a request that the authority refuses to sign.
type InvalidError struct {
	Field  string // of LeafRequest or JWTRequest in snake case, or "csr"
	Reason string
}

// Error implements error.
func (e *InvalidError) Error() string { return e.Field + ": " + e.Reason }

func invalid(field, format string, args ...any) error {
	return &InvalidError{Field: field, Reason: fmt.Sprintf(format, args...)}
}

// TrustDomain is the one whose root signs here, by the root's own SPIFFE ID.
func (a *X509Authority) TrustDomain() (spiffeid.TrustDomain, error) {
	if a == nil || a.Root == nil || len(a.Chain) == 0 || a.Signer == nil {
		return spiffeid.TrustDomain{}, errors.New("authority is incomplete")
	}
	if len(a.Root.URIs) != 1 {
		return spiffeid.TrustDomain{}, errors.New("the root does not carry the SPIFFE ID of a trust domain")
	}
	id, err := spiffeid.FromURI(a.Root.URIs[0])
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("read the root's SPIFFE ID: %w", err)
	}
	return id.TrustDomain(), nil
}

// ID names the authority in revocation records and logs: the hex subject key ID
// of the issuing certificate.
func (a *X509Authority) ID() string { return fmt.Sprintf("%x", a.Chain[0].SubjectKeyId) }

// NotAfter is when the issuing chain ends.
func (a *X509Authority) NotAfter() time.Time {
	end := a.Root.NotAfter
	for _, cert := range a.Chain {
		if cert.NotAfter.Before(end) {
			end = cert.NotAfter
		}
	}
	return end
}

// Issue signs a leaf. A request that breaks the profile is an *InvalidError; that
// a signed certificate would break it is a *LintError, and nothing was signed.
func (a *X509Authority) Issue(req LeafRequest) (*Leaf, error) {
	td, err := a.TrustDomain()
	if err != nil {
		return nil, fmt.Errorf("issue an X509-SVID: %w", err)
	}
	if err := checkLeafRequest(req, td); err != nil {
		return nil, err
	}
	template, cut, err := a.template(req)
	if err != nil {
		return nil, err
	}
	// crypto/x509 hands the exact bytes to be signed to a MessageSigner, and checks
	// the signature that comes back, so a fault in the signer leaks no bad one.
	signer := &lintingSigner{Signer: a.Signer, lint: func(tbs []byte) error {
		return lintLeaf(tbs, req, template, a.Chain[0])
	}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.Chain[0], req.PublicKey, signer)
	if err != nil {
		if lint, ok := errors.AsType[*LintError](err); ok {
			return nil, lint
		}
		return nil, fmt.Errorf("sign the X509-SVID of %s: %w", req.SPIFFEID, err)
	}
	return &Leaf{DER: der, NotBefore: template.NotBefore, NotAfter: template.NotAfter, Serial: req.Serial, Cut: cut}, nil
}

// template is the profile of a leaf. Extensions that are not here are not in the
// certificate.
func (a *X509Authority) template(req LeafRequest) (tmpl *x509.Certificate, cut bool, err error) {
	keyID, err := keyID(req.PublicKey)
	if err != nil {
		return nil, false, err
	}
	issuer := a.Chain[0]
	notBefore := req.Now.Add(-Backdate).UTC().Truncate(time.Second)
	if notBefore.Before(issuer.NotBefore) {
		notBefore = issuer.NotBefore
	}
	notAfter := req.Now.Add(req.TTL).UTC().Truncate(time.Second)
	if end := a.NotAfter(); end.Before(notAfter) {
		notAfter, cut = end, true
	}
	if !notAfter.After(req.Now) {
		return nil, false, fmt.Errorf("issue an X509-SVID: the issuing chain ended at %s", a.NotAfter().Format(time.RFC3339))
	}
	id := req.SPIFFEID.URL()
	return &x509.Certificate{
		SerialNumber:          req.Serial.Big(),
		Subject:               pkix.Name{CommonName: req.CommonName},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          keyID,
		AuthorityKeyId:        issuer.SubjectKeyId,
		DNSNames:              req.DNSNames,
		URIs:                  []*url.URL{id},
	}, cut, nil
}

// keyID is method 1 of RFC 7093 §2: SHA-256 of the key's bits, cut to 160.
func keyID(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, invalid("public_key", "cannot be encoded: %v", err)
	}
	var spki struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &spki); err != nil {
		return nil, invalid("public_key", "cannot be encoded: %v", err)
	}
	sum := sha256.Sum256(spki.Key.RightAlign())
	return bytes.Clone(sum[:20]), nil
}
