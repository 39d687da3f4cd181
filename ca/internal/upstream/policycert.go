// The certificate of a key that signs policy bundles: it says under the root
// which replica the key belongs to, and lets the key do nothing else. Whoever
// can write the store alone can name any key; with this he convinces nobody.

package upstream

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"

	"merlon.dev/ca/internal/replica"
)

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
	root := k.root().cert
	template := &x509.Certificate{
		Subject: pkix.Name{
			Organization: root.Subject.Organization, OrganizationalUnit: []string{replica.PolicyUnit}, CommonName: name, SerialNumber: generation,
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
	if _, err := replica.VerifyPolicyCertificate(cert.Raw, []*x509.Certificate{root}, now); err != nil {
		return nil, fmt.Errorf("certify the policy key of %s: the certificate that was made is not the one asked for: %w", name, err)
	}
	return cert, nil
}

// signByRoot has softcas sign template, whose PublicKey is that of the subject.
func (k *Keys) signByRoot(template *x509.Certificate) (*x509.Certificate, error) {
	return signBy(k.root(), template)
}

func signBy(issuer *generation, template *x509.Certificate) (*x509.Certificate, error) {
	signer := &softcas.SoftCAS{CertificateChain: []*x509.Certificate{issuer.cert}, Signer: issuer.signer}
	made, err := signer.CreateCertificate(&apiv1.CreateCertificateRequest{Template: template, Lifetime: template.NotAfter.Sub(template.NotBefore)})
	if err != nil {
		return nil, err
	}
	return made.Certificate, nil
}
