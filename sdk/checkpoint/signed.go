// Which SVID a record of the log is about: the hash of what was signed, without
// the signature. Whoever holds an ECDSA signature can make another one that is
// as good, and the SVID would look like one that nobody recorded.

package checkpoint

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// CertificateHash is the SHA-256, in hex, of the TBSCertificate of a
// certificate, DER.
func CertificateHash(der []byte) (string, error) {
	in := cryptobyte.String(der)
	var cert, tbs cryptobyte.String
	if !in.ReadASN1(&cert, asn1.SEQUENCE) || !in.Empty() || !cert.ReadASN1Element(&tbs, asn1.SEQUENCE) {
		return "", errors.New("hash a certificate: it is none")
	}
	return hexHash(tbs), nil
}

// TokenHash is the SHA-256, in hex, of the signing input of a JWT in compact
// serialization.
func TokenHash(token string) (string, error) {
	end := strings.LastIndexByte(token, '.')
	if end < 0 || strings.Count(token, ".") != 2 {
		return "", errors.New("hash a token: it is no JWT in compact serialization")
	}
	return hexHash([]byte(token[:end])), nil
}

func hexHash(signed []byte) string {
	sum := sha256.Sum256(signed)
	return hex.EncodeToString(sum[:])
}
