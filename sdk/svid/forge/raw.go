// Certificates that crypto/x509 would not write: their content is given as bytes,
// and signed as it is.

package forge

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
)

// ecdsaWithSHA256 is the AlgorithmIdentifier of RFC 5758 §3.2.
var ecdsaWithSHA256 = []byte{0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}

// SignTBS makes a certificate of tbs, the DER of a TBSCertificate (RFC 5280 §4.1),
// by the authority's key, which has to be an ECDSA key. Nil: tbs is no DER.
func (a *Authority) SignTBS(tbs []byte) []byte {
	digest := sha256.Sum256(tbs)
	sig, err := a.Key.(*ecdsa.PrivateKey).Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil
	}
	return Assemble(tbs, ecdsaWithSHA256, sig)
}

// Assemble makes a certificate of its three parts: the DER of a TBSCertificate, that
// of an AlgorithmIdentifier, and the bytes of a signature. Nil: one of the first two
// is no DER.
func Assemble(tbs, algorithm, signature []byte) []byte {
	var parts struct {
		TBS, Algorithm asn1.RawValue
		Signature      asn1.BitString
	}
	for _, part := range []struct {
		from []byte
		to   *asn1.RawValue
	}{{tbs, &parts.TBS}, {algorithm, &parts.Algorithm}} {
		if rest, err := asn1.Unmarshal(part.from, part.to); err != nil || len(rest) > 0 {
			return nil
		}
	}
	parts.Signature = asn1.BitString{Bytes: signature, BitLength: len(signature) * 8}
	der, err := asn1.Marshal(parts)
	if err != nil {
		return nil
	}
	return der
}
