// Looks at the very bytes that are about to be signed and compares them with the
// profile and the request. The template says what was meant; only the encoded
// certificate says what will be trusted, and it cannot be taken back.

package authority

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"slices"

	"merlon.dev/sdk/svid"
)

// LintError says which rule of the profile a certificate would have broken.
type LintError struct {
	Rule   string // number of SECURITY.md, e.g. "X1"
	Reason string
}

// Error implements error.
func (e *LintError) Error() string {
	return fmt.Sprintf("refused to sign: certificate breaks %s: %s", e.Rule, e.Reason)
}

// lintingSigner lets the key see a message only after lint did. It is a
// crypto.MessageSigner, which is what makes crypto/x509 give it the message.
type lintingSigner struct {
	crypto.Signer
	lint func(tbs []byte) error
}

// Sign hides the embedded method: a digest cannot be linted, so it is not signed.
func (s *lintingSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("this signer signs only what it can read")
}

// SignMessage implements crypto.MessageSigner.
func (s *lintingSigner) SignMessage(rand io.Reader, tbs []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := s.lint(tbs); err != nil {
		return nil, err
	}
	return crypto.SignMessage(s.Signer, rand, tbs, opts)
}

// The extensions of a leaf and whether each is critical. A SAN is critical where
// the subject is empty (X5).
var leafExtensions = map[string]bool{
	"2.5.29.15": true,  // keyUsage (X10)
	"2.5.29.37": false, // extended key usage
	"2.5.29.19": true,  // basicConstraints
	"2.5.29.14": false, // subject key ID
	"2.5.29.35": false, // authority key ID
	"2.5.29.17": false, // SAN
}

type lintRule struct {
	rule, reason string
	broken       func(c *x509.Certificate, req LeafRequest, want, issuer *x509.Certificate) bool
}

var leafRules = []lintRule{
	{"X1", "it does not have exactly one URI SAN, the SPIFFE ID of the request", func(c *x509.Certificate, req LeafRequest, _, _ *x509.Certificate) bool {
		return len(c.URIs) != 1 || c.URIs[0].String() != req.SPIFFEID.String()
	}},
	{"X1", "it has other names than the request", func(c *x509.Certificate, req LeafRequest, _, _ *x509.Certificate) bool {
		return len(c.EmailAddresses)+len(c.IPAddresses) > 0 || !slices.Equal(c.DNSNames, req.DNSNames)
	}},
	{"X3", "its SPIFFE ID has no path", func(_ *x509.Certificate, req LeafRequest, _, _ *x509.Certificate) bool {
		return req.SPIFFEID.Path() == ""
	}},
	{"X5", "its subject is not the common name of the request alone", func(c *x509.Certificate, req LeafRequest, _, _ *x509.Certificate) bool {
		names := 1
		if req.CommonName == "" {
			names = 0
		}
		return c.Subject.CommonName != req.CommonName || len(c.Subject.Names) != names
	}},
	{"X8", "it is a signing certificate", func(c *x509.Certificate, _ LeafRequest, _, _ *x509.Certificate) bool {
		return !c.BasicConstraintsValid || c.IsCA || c.MaxPathLen != -1
	}},
	{"X11", "its keyUsage is not digitalSignature alone", func(c *x509.Certificate, _ LeafRequest, _, _ *x509.Certificate) bool {
		return c.KeyUsage != x509.KeyUsageDigitalSignature
	}},
	{"X12", "its extended key usage is not serverAuth and clientAuth", func(c *x509.Certificate, _ LeafRequest, _, _ *x509.Certificate) bool {
		return len(c.UnknownExtKeyUsage) > 0 ||
			!slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth})
	}},
	{"X13", "its subject key ID is not the template's, or its authority key ID not the issuer's", func(c *x509.Certificate, _ LeafRequest, want, issuer *x509.Certificate) bool {
		return len(c.SubjectKeyId) == 0 || !bytes.Equal(c.SubjectKeyId, want.SubjectKeyId) ||
			len(issuer.SubjectKeyId) == 0 || !bytes.Equal(c.AuthorityKeyId, issuer.SubjectKeyId)
	}},
	{"X13", "its issuer is not the subject of the issuing certificate", func(c *x509.Certificate, _ LeafRequest, _, issuer *x509.Certificate) bool {
		return !bytes.Equal(c.RawIssuer, issuer.RawSubject)
	}},
	{"X13", "it is valid outside the time of its issuer, or not as the template says", func(c *x509.Certificate, _ LeafRequest, want, issuer *x509.Certificate) bool {
		return c.NotBefore.Before(issuer.NotBefore) || c.NotAfter.After(issuer.NotAfter) ||
			!c.NotBefore.Equal(want.NotBefore) || !c.NotAfter.Equal(want.NotAfter) || !c.NotBefore.Before(c.NotAfter)
	}},
	{"X13", "its public key is not the one of the request", func(c *x509.Certificate, req LeafRequest, _, _ *x509.Certificate) bool {
		key, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
		return !ok || !key.Equal(req.PublicKey)
	}},
	{"X13", "its public key is its issuer's", func(c *x509.Certificate, _ LeafRequest, _, issuer *x509.Certificate) bool {
		return bytes.Equal(c.RawSubjectPublicKeyInfo, issuer.RawSubjectPublicKeyInfo)
	}},
	{"T44", "its serial number is not the one of the request, at most 159 bits", func(c *x509.Certificate, req LeafRequest, _, _ *x509.Certificate) bool {
		serial, ok := svid.SerialFromBig(c.SerialNumber)
		return !ok || serial != req.Serial
	}},
}

// lintLeaf judges the bytes tbs of a certificate for req, made from the template
// want, below issuer.
func lintLeaf(tbs []byte, req LeafRequest, want, issuer *x509.Certificate) error {
	c, err := parseTBS(tbs)
	if err != nil {
		return &LintError{Rule: "X13", Reason: err.Error()}
	}
	if err := lintExtensions(c); err != nil {
		return err
	}
	for _, rule := range leafRules {
		if rule.broken(c, req, want, issuer) {
			return &LintError{Rule: rule.rule, Reason: rule.reason}
		}
	}
	return nil
}

func lintExtensions(c *x509.Certificate) error {
	if c.Version != 3 {
		return &LintError{Rule: "X13", Reason: "it is not version 3"}
	}
	seen := 0
	for _, ext := range c.Extensions {
		critical, known := leafExtensions[ext.Id.String()]
		if ext.Id.String() == "2.5.29.17" {
			critical = len(c.Subject.Names) == 0
		}
		switch {
		case !known:
			return &LintError{Rule: "X13", Reason: fmt.Sprintf("it has the extension %s, which the profile does not", ext.Id)}
		case ext.Critical != critical:
			return &LintError{Rule: "X10", Reason: fmt.Sprintf("its extension %s has critical=%t", ext.Id, ext.Critical)}
		}
		seen++
	}
	if seen != len(leafExtensions) { // crypto/x509 refuses duplicates
		return &LintError{Rule: "X10", Reason: fmt.Sprintf("it has %d extensions; the profile has %d", seen, len(leafExtensions))}
	}
	return nil
}

// parseTBS reads the part of a certificate that gets signed, by putting an empty
// signature around it.
func parseTBS(tbs []byte) (*x509.Certificate, error) {
	var head struct {
		Version   int `asn1:"optional,explicit,tag:0"`
		Serial    asn1.RawValue
		Algorithm asn1.RawValue
	}
	var body asn1.RawValue
	if rest, err := asn1.Unmarshal(tbs, &body); err != nil || len(rest) > 0 {
		return nil, errors.New("the bytes to sign are not one certificate")
	}
	if rest, err := asn1.Unmarshal(tbs, &head); err != nil || len(rest) > 0 {
		return nil, fmt.Errorf("the bytes to sign do not parse: %w", err)
	}
	der, err := asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}{body, head.Algorithm, asn1.BitString{Bytes: []byte{0}, BitLength: 8}})
	if err != nil {
		return nil, fmt.Errorf("the bytes to sign do not parse: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("the bytes to sign do not parse: %w", err)
	}
	return c, nil
}
