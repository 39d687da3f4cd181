// The certificate of a log's key: an authority of the CA says with it which
// replica's log the key signs for, and lets the key do nothing else. It is no
// SVID, for it has no SPIFFE ID.

package checkpoint

import (
	"crypto/ed25519"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Unit marks the subject of a log key's certificate; its common name is the
// replica's.
const Unit = "log"

// maxChain is how many certificates there may be, without the root.
const maxChain = 8

// VerifyChain returns the key that a log's certificate names, if the chain from
// it (DER, without the root) ends at one of roots at now.
func VerifyChain(chain [][]byte, roots []*x509.Certificate, trustDomain string, now time.Time) (Key, error) {
	certs, err := parseChain(chain)
	if err != nil {
		return Key{}, err
	}
	pool, above := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	for _, c := range certs[1:] {
		above.AddCert(c)
	}
	cert := certs[0]
	if _, err := cert.Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: above, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, // keyOf judges; those of a larger PKI above are its own
	}); err != nil {
		return Key{}, fmt.Errorf("certificate of a log refused: %w", err)
	}
	key, err := keyOf(cert)
	if err != nil {
		return Key{}, fmt.Errorf("certificate of the log of %.80q refused: %w", cert.Subject.CommonName, err)
	}
	return Key{TrustDomain: trustDomain, Replica: cert.Subject.CommonName, Public: key}, nil
}

func parseChain(chain [][]byte) ([]*x509.Certificate, error) {
	if n := len(chain); n == 0 || n > maxChain {
		return nil, fmt.Errorf("certificate of a log refused: the chain has %d certificates; 1 to %d", n, maxChain)
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		var err error
		if certs[i], err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("certificate of a log refused: %w", err)
		}
	}
	return certs, nil
}

func keyOf(cert *x509.Certificate) (ed25519.PublicKey, error) {
	key, isEd25519 := cert.PublicKey.(ed25519.PublicKey)
	units := cert.Subject.OrganizationalUnit
	switch {
	case !cert.BasicConstraintsValid || cert.IsCA:
		return nil, errors.New("it is a signing certificate")
	case cert.KeyUsage != x509.KeyUsageDigitalSignature,
		len(cert.UnknownExtKeyUsage) > 0, !slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}):
		return nil, errors.New("it is for something else than signing checkpoints")
	case len(cert.URIs)+len(cert.DNSNames)+len(cert.EmailAddresses)+len(cert.IPAddresses) > 0:
		return nil, errors.New("it carries names")
	case len(units) != 1 || units[0] != Unit || cert.Subject.CommonName == "":
		return nil, errors.New("its subject is no replica's log")
	case !isEd25519:
		return nil, errors.New("its key is not an Ed25519 key")
	}
	return key, nil
}
