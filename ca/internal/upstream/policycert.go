// The certificate of a key that signs policy bundles: it says under the root
// which replica the key belongs to, and lets the key do nothing else. Whoever
// can write the store alone can name any key; with this he convinces nobody.

package upstream

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"

	"merlon.dev/ca/internal/replica"
)

// policyUnit marks the subject of such a certificate.
const policyUnit = "policy"

// CertifyPolicyKey gives the policy key of the replica called name its
// certificate. It is the root holder's.
func (k *Keys) CertifyPolicyKey(name string, key crypto.PublicKey, now time.Time) (*x509.Certificate, error) {
	if !k.HoldsRoot() {
		return nil, ErrNoRootKey
	}
	if err := replica.CheckName(name); err != nil {
		return nil, err
	}
	generation, err := randomHex(8)
	if err != nil {
		return nil, err
	}
	root := k.root.cert
	template := &x509.Certificate{
		Subject: pkix.Name{
			Organization: root.Subject.Organization, OrganizationalUnit: []string{policyUnit}, CommonName: name, SerialNumber: generation,
		},
		NotBefore:             root.NotBefore, // bundles are signed for longer than a year: as long as the root
		NotAfter:              root.NotAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		BasicConstraintsValid: true,
		PublicKey:             key,
	}
	cert, err := k.signByRoot(template)
	if err != nil {
		return nil, fmt.Errorf("certify the policy key of %s: %w", name, err)
	}
	if _, _, err := VerifyPolicyCertificate(cert.Raw, root, now); err != nil {
		return nil, fmt.Errorf("certify the policy key of %s: the certificate that was made is not the one asked for: %w", name, err)
	}
	return cert, nil
}

// signByRoot has softcas sign template, whose PublicKey is that of the subject.
func (k *Keys) signByRoot(template *x509.Certificate) (*x509.Certificate, error) {
	signer := &softcas.SoftCAS{CertificateChain: []*x509.Certificate{k.root.cert}, Signer: k.root.signer}
	made, err := signer.CreateCertificate(&apiv1.CreateCertificateRequest{Template: template, Lifetime: template.NotAfter.Sub(template.NotBefore)})
	if err != nil {
		return nil, err
	}
	return made.Certificate, nil
}

// VerifyPolicyCertificate returns the replica and the key that a policy
// certificate names, if root vouches for it at now.
func VerifyPolicyCertificate(der []byte, root *x509.Certificate, now time.Time) (name string, key *ecdsa.PublicKey, err error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return "", nil, fmt.Errorf("read a policy certificate: %w", err)
	}
	key, isEC := cert.PublicKey.(*ecdsa.PublicKey)
	units := cert.Subject.OrganizationalUnit
	switch {
	case !bytes.Equal(cert.RawIssuer, root.RawSubject) || cert.CheckSignatureFrom(root) != nil:
		err = errors.New("it is not the root's")
	case !cert.BasicConstraintsValid || cert.IsCA:
		err = errors.New("it is a signing certificate")
	case cert.KeyUsage != x509.KeyUsageDigitalSignature,
		len(cert.UnknownExtKeyUsage) > 0, !slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}):
		err = errors.New("it is for something else than signing policy")
	case len(cert.URIs)+len(cert.DNSNames)+len(cert.EmailAddresses)+len(cert.IPAddresses) > 0:
		err = errors.New("it carries names")
	case len(units) != 1 || units[0] != policyUnit || replica.CheckName(cert.Subject.CommonName) != nil:
		err = errors.New("its subject is not a replica")
	case !isEC || key.Curve != elliptic.P256():
		err = errors.New("its key is not a P-256 key")
	case now.Before(cert.NotBefore) || now.After(cert.NotAfter) || now.After(root.NotAfter):
		err = errors.New("it is not valid now")
	}
	if err != nil {
		return "", nil, fmt.Errorf("policy certificate of %.80q refused: %w", cert.Subject.CommonName, err)
	}
	return cert.Subject.CommonName, key, nil
}
