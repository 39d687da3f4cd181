// What stands for a trust domain that is not, or not any more, federated with.
// Envoy drops no secret that it has once got, whatever it is told: it would go on
// trusting the roots that it was given last. So it gets others, whose key nobody
// has.

package sds

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// isTrustDomain says whether a name is the SPIFFE ID of a trust domain.
func isTrustDomain(name string) bool {
	td, err := spiffeid.TrustDomainFromString(name)
	return err == nil && td.IDString() == name
}

// nobody is a root, DER, whose key was forgotten as soon as it had signed it.
var nobody = sync.OnceValue(func() []byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic("sds: " + err.Error()) // never fails, see crypto/rand
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "nobody: there is no federation"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic("sds: " + err.Error()) // a template that always works
	}
	return der
})
