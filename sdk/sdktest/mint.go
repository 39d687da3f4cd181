// The authority of a test's trust domain: the profile of the CA's X509-SVIDs,
// in as few lines as it takes.

package sdktest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/sdk/svid"
)

// agentHandle is what every serial number of this package begins with.
const agentHandle = 1

// backdate is how far NotBefore lies in the past, as with the CA.
const backdate = time.Minute

type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// newRoot makes the root that signs from now on, and puts it into the trust
// bundle.
func (td *TD) newRoot() {
	td.serial++
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          new(big.Int).SetUint64(td.serial),
		Subject:               pkix.Name{Organization: []string{"Merlon sdktest - do not trust"}, CommonName: fmt.Sprintf("root %d", td.serial)},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: td.name}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	key := td.newKey()
	td.root = &authority{td.sign(template, template, key.Public(), key), key}
	td.roots = append(td.roots, td.root)
}

// mint issues an X509-SVID.
func (td *TD) mint(id spiffeid.ID) *x509svid.SVID {
	return td.mintUntil(id, time.Now().Add(td.ttl))
}

func (td *TD) mintUntil(id spiffeid.ID, notAfter time.Time) *x509svid.SVID {
	serial, err := svid.NewSerial(agentHandle, td.revision)
	if err != nil {
		td.t.Fatalf("sdktest: %v", err)
	}
	key := td.newKey()
	template := &x509.Certificate{
		SerialNumber:          serial.Big(),
		SubjectKeyId:          keyID(key),
		URIs:                  []*url.URL{id.URL()},
		NotBefore:             time.Now().Add(-backdate),
		NotAfter:              notAfter,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	leaf := td.sign(template, td.root.cert, key.Public(), td.root.key)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

// keyID is RFC 7093's first method: 160 bits of the SHA-256 of the key.
func keyID(key *ecdsa.PrivateKey) []byte {
	point, err := key.PublicKey.Bytes()
	if err != nil {
		panic("sdktest: " + err.Error()) // not a key of newKey
	}
	sum := sha256.Sum256(point)
	return sum[:20]
}

func (td *TD) newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		td.t.Fatalf("sdktest: %v", err)
	}
	return key
}

func (td *TD) sign(template, parent *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, signer)
	if err != nil {
		td.t.Fatalf("sdktest: %v", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		td.t.Fatalf("sdktest: %v", err)
	}
	return cert
}
