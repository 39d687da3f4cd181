// What a key has to be before it vouches for anybody, for those who take keys of
// another trust domain in: what the verifiers would refuse later is refused at
// once, where somebody reads the reason.

package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// CheckAuthority says why no X509-SVID below cert would be accepted, whatever it
// says: the rules that every signing certificate has to obey. Whether it is still
// valid is not looked at. The error is an *Error.
func CheckAuthority(cert *x509.Certificate) error {
	if err := checkAuthority(cert); err != nil {
		return err
	}
	return nil
}

// AuthorityTrustDomain is the trust domain whose name the signing certificate
// carries (X6); zero for one that carries none, as CAs that are no SVIDs do.
func AuthorityTrustDomain(cert *x509.Certificate) (spiffeid.TrustDomain, error) {
	id, err := certID(cert)
	return id.TrustDomain(), err
}

// CheckJWTKey says why no JWT-SVID signed by the key would be accepted.
func CheckJWTKey(key crypto.PublicKey) error {
	switch key.(type) {
	case *ecdsa.PublicKey, *rsa.PublicKey:
		return checkKey(key)
	}
	return fmt.Errorf("a key of type %T signs no JWT-SVID", key)
}
