// Which keys sign policy bundles: those that a live record names in a
// certificate of the root's.

package replica

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"
)

// PolicyUnit marks the subject of a policy key's certificate.
const PolicyUnit = "policy"

// PolicyKey is a key that may sign policy bundles.
type PolicyKey struct {
	Replica string
	KID     string
	Public  *ecdsa.PublicKey
	PKIX    []byte // DER
}

// VerifyPolicyCertificate returns the key that a policy certificate names, if
// one of roots vouches for it at now.
func VerifyPolicyCertificate(der []byte, roots []*x509.Certificate, now time.Time) (PolicyKey, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return PolicyKey{}, fmt.Errorf("read a policy certificate: %w", err)
	}
	signer := slices.IndexFunc(roots, func(root *x509.Certificate) bool {
		return bytes.Equal(cert.RawIssuer, root.RawSubject) && cert.CheckSignatureFrom(root) == nil
	})
	key, isEC := cert.PublicKey.(*ecdsa.PublicKey)
	units := cert.Subject.OrganizationalUnit
	switch {
	case signer < 0:
		err = errors.New("it is not the root's")
	case !cert.BasicConstraintsValid || cert.IsCA:
		err = errors.New("it is a signing certificate")
	case cert.KeyUsage != x509.KeyUsageDigitalSignature,
		len(cert.UnknownExtKeyUsage) > 0, !slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}):
		err = errors.New("it is for something else than signing policy")
	case len(cert.URIs)+len(cert.DNSNames)+len(cert.EmailAddresses)+len(cert.IPAddresses) > 0:
		err = errors.New("it carries names")
	case len(units) != 1 || units[0] != PolicyUnit || CheckName(cert.Subject.CommonName) != nil:
		err = errors.New("its subject is not a replica")
	case !isEC || key.Curve != elliptic.P256():
		err = errors.New("its key is not a P-256 key")
	case now.Before(cert.NotBefore) || now.After(cert.NotAfter) || now.After(roots[signer].NotAfter):
		err = errors.New("it is not valid now")
	}
	if err != nil {
		return PolicyKey{}, fmt.Errorf("policy certificate of %.80q refused: %w", cert.Subject.CommonName, err)
	}
	kid, err := KeyID(key)
	if err != nil {
		return PolicyKey{}, err
	}
	return PolicyKey{Replica: cert.Subject.CommonName, KID: kid, Public: key, PKIX: cert.RawSubjectPublicKeyInfo}, nil
}

// PolicyKey is the key that r's certificate names, if one of roots vouches for it
// at now and for this very replica.
func (r *Record) PolicyKey(roots []*x509.Certificate, now time.Time) (PolicyKey, error) {
	key, err := VerifyPolicyCertificate(r.PolicyCertificate, roots, now)
	if err == nil && key.Replica != r.Name {
		return PolicyKey{}, fmt.Errorf("policy certificate of %s refused: the record is of replica %s", key.Replica, r.Name)
	}
	return key, err
}

// KeyID names a key by its contents, so that no two keys share one.
func KeyID(key crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("name the key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:16]), nil
}
