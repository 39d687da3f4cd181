// A CSR supplies a public key and the proof that its sender holds the private
// one, and nothing else: names come from attestation (SECURITY.md T11). One that
// asks for more is refused rather than cut down to its key: who asks for a name
// that he cannot get is wrong or lies, and would find out only at his peers.

package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cryptobyte_asn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// MaxCSRBytes is the size of the largest CSR that is parsed. One with an RSA key
// of 3072 bits has about 1 KiB.
const MaxCSRBytes = 8 << 10

// MaxKeyBytes is the size of the largest SubjectPublicKeyInfo that is parsed:
// that of an RSA key of 3072 bits has 422 bytes.
const MaxKeyBytes = 512

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// PublicKeyFromCSR checks a DER PKCS #10 request: its self-signature, its key, and
// that it asks for no name or extension. A URI SAN equal to the ID of own, if one
// is given, is tolerated. The subject is ignored. Errors are *InvalidError.
func PublicKeyFromCSR(der []byte, own ...spiffeid.ID) (crypto.PublicKey, error) {
	if len(der) > MaxCSRBytes {
		return nil, invalid("csr", "has %d bytes; at most %d are read", len(der), MaxCSRBytes)
	}
	if n, ok := keyBytes(der); ok && n > MaxKeyBytes {
		return nil, invalid("csr", "has a public key of %d bytes; at most %d are read, which is RSA of 3072 bits", n, MaxKeyBytes)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, invalid("csr", "does not parse: %v", err)
	}
	if err := checkKey("csr", csr.PublicKey); err != nil { // before work with it
		return nil, err
	}
	if err := checkRequestedNames(csr, own); err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, invalid("csr", "is not signed by its own key: %v", err)
	}
	return csr.PublicKey, nil
}

// keyBytes is the size of the SubjectPublicKeyInfo, found without looking into
// it. What is false here does not parse.
func keyBytes(csr []byte) (n int, ok bool) {
	outer, info, key := cryptobyte.String(csr), cryptobyte.String(nil), cryptobyte.String(nil)
	ok = outer.ReadASN1(&outer, cryptobyte_asn1.SEQUENCE) &&
		outer.ReadASN1(&info, cryptobyte_asn1.SEQUENCE) &&
		info.SkipASN1(cryptobyte_asn1.INTEGER) && // version
		info.SkipASN1(cryptobyte_asn1.SEQUENCE) && // subject
		info.ReadASN1Element(&key, cryptobyte_asn1.SEQUENCE)
	return len(key), ok
}

func checkRequestedNames(csr *x509.CertificateRequest, own []spiffeid.ID) error {
	for _, uri := range csr.URIs {
		if len(own) == 0 || uri.String() != own[0].String() {
			return invalid("csr", "asks for the URI SAN %q; names come from the registration entry", uri)
		}
	}
	switch {
	case len(csr.URIs) > 1:
		return invalid("csr", "asks for %d URI SANs", len(csr.URIs))
	case len(csr.DNSNames) > 0:
		return invalid("csr", "asks for the DNS SAN %q; names come from the registration entry", csr.DNSNames[0])
	case len(csr.IPAddresses) > 0:
		return invalid("csr", "asks for the IP SAN %s; names come from the registration entry", csr.IPAddresses[0])
	case len(csr.EmailAddresses) > 0:
		return invalid("csr", "asks for the email SAN %q; names come from the registration entry", csr.EmailAddresses[0])
	}
	for _, ext := range csr.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			return invalid("csr", "asks for the extension %s; the profile is the CA's", ext.Id)
		}
		if len(csr.URIs) == 0 {
			return invalid("csr", "asks for a SAN of an unknown kind")
		}
	}
	return nil
}

// checkKey is the key policy: ECDSA on P-256 or P-384, RSA of 2048 or 3072 bits.
// Every verification of a longer RSA key costs each peer more than it gains him.
// Ed25519 is left out because too many TLS peers do not offer it.
func checkKey(field string, pub crypto.PublicKey) error {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P256() || key.Curve == elliptic.P384() {
			return nil
		}
		return invalid(field, "has a key on curve %s; P-256 and P-384 are accepted", key.Curve.Params().Name)
	case *rsa.PublicKey:
		switch bits := key.N.BitLen(); {
		case bits != 2048 && bits != 3072:
			return invalid(field, "has an RSA key of %d bits; 2048 and 3072 are accepted", bits)
		case key.N.Bit(0) == 0:
			return invalid(field, "has an RSA key with an even modulus")
		case key.E < 65537 || key.E%2 == 0:
			return invalid(field, "has an RSA key with the exponent %d; 65537 is the least accepted", key.E)
		}
		return nil
	case nil:
		return invalid(field, "has no key")
	}
	return invalid(field, "has a key of type %T; ECDSA and RSA are accepted", pub)
}
