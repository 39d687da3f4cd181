// The certificate of the key that signs the log's checkpoints. The authority
// that issues vouches for it, so that whoever has the trust bundle can verify
// them, and anew whenever the authority is another. It is no SVID: no name in
// it means anything to a verifier of SVIDs.

package authority

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"time"

	"merlon.dev/sdk/checkpoint"
)

// CertifyLogKey says, for as long as the issuing chain lives, that key signs the
// log of the replica of that name. It returns the chain, without the root; DER.
func (a *X509Authority) CertifyLogKey(replica string, key ed25519.PublicKey, now time.Time) ([][]byte, error) {
	td, err := a.TrustDomain()
	if err != nil {
		return nil, fmt.Errorf("certify the log's key: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("number the certificate of the log's key: %w", err)
	}
	issuer := a.Chain[0]
	notBefore := now.Add(-Backdate)
	if notBefore.Before(issuer.NotBefore) {
		notBefore = issuer.NotBefore
	}
	template := &x509.Certificate{
		SerialNumber:          serial.Add(serial, big.NewInt(1)),
		Subject:               pkix.Name{Organization: issuer.Subject.Organization, OrganizationalUnit: []string{checkpoint.Unit}, CommonName: replica},
		NotBefore:             notBefore.UTC().Truncate(time.Second),
		NotAfter:              a.NotAfter(),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		BasicConstraintsValid: true,
		AuthorityKeyId:        issuer.SubjectKeyId,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, key, a.Signer)
	if err != nil {
		return nil, fmt.Errorf("certify the log's key: %w", err)
	}
	chain := [][]byte{der}
	for _, c := range a.Chain {
		chain = append(chain, c.Raw)
	}
	at := now
	if at.Before(notBefore) {
		at = notBefore
	}
	got, err := checkpoint.VerifyChain(chain, []*x509.Certificate{a.Root}, td.Name(), at)
	if err != nil {
		return nil, fmt.Errorf("certify the log's key: the certificate that was made is not the one asked for: %w", err)
	}
	if !got.Public.Equal(key) || got.Replica != replica {
		return nil, errors.New("certify the log's key: the certificate that was made is not the one asked for")
	}
	return chain, nil
}
