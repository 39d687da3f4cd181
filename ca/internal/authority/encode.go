// Writes the TBSCertificate of a leaf (RFC 5280 §4.1) from what an authority has
// encoded once: all leaves below it differ in six places only. crypto/x509 would
// build the same bytes, by reflection and in four hundred allocations; that they
// are the same is a property test, and that they are sound the lint looks at
// itself, on what was written here.

package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cryptobyte_asn1 "golang.org/x/crypto/cryptobyte/asn1"

	"merlon.dev/sdk/svid"
)

// leafForm is what all leaves below one issuing certificate have in common. It
// is immutable.
type leafForm struct {
	trustDomain spiffeid.TrustDomain
	algorithm   []byte // AlgorithmIdentifier of the issuer's signatures
	issuer      []byte // its name
	authorityID []byte // the extension authority key ID
	end         time.Time
}

// leafValues is what one leaf has for itself.
type leafValues struct {
	serial              svid.Serial
	notBefore, notAfter time.Time
	key                 publicKey
	id                  string
	commonName          string
	dnsNames            []string
}

// publicKey is a key in its encodings.
type publicKey struct {
	info []byte // SubjectPublicKeyInfo
	id   []byte // method 1 of RFC 7093 §2: SHA-256 of the key's bits, cut to 160
}

// The extensions in front, the same in every leaf: keyUsage (critical)
// digitalSignature, extended key usage serverAuth and clientAuth, and
// basicConstraints (critical), empty, which is CA:FALSE.
var leafUsage = []byte{
	0x30, 0x0e, 6, 3, 0x55, 0x1d, 0x0f, 1, 1, 0xff, 4, 4, 3, 2, 7, 0x80,
	0x30, 0x1d, 6, 3, 0x55, 0x1d, 0x25, 4, 0x16, 0x30, 0x14,
	6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2,
	0x30, 0x0c, 6, 3, 0x55, 0x1d, 0x13, 1, 1, 0xff, 4, 2, 0x30, 0,
}

var (
	oidSubjectKeyID   = asn1.ObjectIdentifier{2, 5, 29, 14}
	oidAuthorityKeyID = asn1.ObjectIdentifier{2, 5, 29, 35}
)

var (
	tagVersion    = cryptobyte_asn1.Tag(0).ContextSpecific().Constructed()
	tagExtensions = cryptobyte_asn1.Tag(3).ContextSpecific().Constructed()
	tagKeyID      = cryptobyte_asn1.Tag(0).ContextSpecific()
	tagDNSName    = cryptobyte_asn1.Tag(2).ContextSpecific()
	tagURI        = cryptobyte_asn1.Tag(6).ContextSpecific()
)

func newLeafForm(td spiffeid.TrustDomain, issuer *x509.Certificate, algorithm []byte, end time.Time) (*leafForm, error) {
	var b cryptobyte.Builder
	addExtension(&b, oidAuthorityKeyID, false, func(b *cryptobyte.Builder) {
		b.AddASN1(cryptobyte_asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(tagKeyID, func(b *cryptobyte.Builder) { b.AddBytes(issuer.SubjectKeyId) })
		})
	})
	authorityID, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode the authority key ID: %w", err)
	}
	return &leafForm{trustDomain: td, algorithm: algorithm, issuer: issuer.RawSubject, authorityID: authorityID, end: end}, nil
}

// leafBytes is about the size of a leaf with a P-256 key and some names.
const leafBytes = 1 << 10

// encode writes the TBSCertificate.
func (f *leafForm) encode(v leafValues) ([]byte, error) {
	subject, err := encodeSubject(v.commonName)
	if err != nil {
		return nil, err
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, leafBytes))
	b.AddASN1(cryptobyte_asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(tagVersion, func(b *cryptobyte.Builder) { b.AddASN1Int64(2) }) // version 3
		b.AddASN1BigInt(v.serial.Big())
		b.AddBytes(f.algorithm)
		b.AddBytes(f.issuer)
		b.AddASN1(cryptobyte_asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, v.notBefore)
			addTime(b, v.notAfter)
		})
		b.AddBytes(subject)
		b.AddBytes(v.key.info)
		b.AddASN1(tagExtensions, func(b *cryptobyte.Builder) {
			b.AddASN1(cryptobyte_asn1.SEQUENCE, func(b *cryptobyte.Builder) { f.addExtensions(b, v) })
		})
	})
	return b.Bytes()
}

func (f *leafForm) addExtensions(b *cryptobyte.Builder, v leafValues) {
	b.AddBytes(leafUsage)
	addExtension(b, oidSubjectKeyID, false, func(b *cryptobyte.Builder) { b.AddASN1OctetString(v.key.id) })
	b.AddBytes(f.authorityID)
	noSubject := v.commonName == "" // X5: then the SAN is critical
	addExtension(b, oidSubjectAltName, noSubject, func(b *cryptobyte.Builder) {
		b.AddASN1(cryptobyte_asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			for _, name := range v.dnsNames {
				b.AddASN1(tagDNSName, func(b *cryptobyte.Builder) { b.AddBytes([]byte(name)) })
			}
			b.AddASN1(tagURI, func(b *cryptobyte.Builder) { b.AddBytes([]byte(v.id)) })
		})
	})
}

func addExtension(b *cryptobyte.Builder, oid asn1.ObjectIdentifier, critical bool, value cryptobyte.BuilderContinuation) {
	b.AddASN1(cryptobyte_asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oid)
		if critical {
			b.AddASN1Boolean(true)
		}
		b.AddASN1(cryptobyte_asn1.OCTET_STRING, value)
	})
}

// addTime follows RFC 5280 §4.1.2.5: two digits of the year up to 2049.
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t = t.UTC(); t.Year() < 2050 {
		b.AddASN1UTCTime(t)
		return
	}
	b.AddASN1GeneralizedTime(t)
}

var emptySubject = []byte{0x30, 0}

func encodeSubject(commonName string) ([]byte, error) {
	if commonName == "" {
		return emptySubject, nil
	}
	der, err := asn1.Marshal(pkix.Name{CommonName: commonName}.ToRDNSequence())
	if err != nil {
		return nil, invalid("common_name", "cannot be encoded: %v", err)
	}
	return der, nil
}

// The beginnings of the SubjectPublicKeyInfo of P-256 and P-384 keys, RFC 5480 §2;
// the point follows, uncompressed.
var (
	p256Info = []byte{0x30, 0x59, 0x30, 0x13, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7, 3, 0x42, 0}
	p384Info = []byte{0x30, 0x76, 0x30, 0x10, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 5, 0x2b, 0x81, 4, 0, 0x22, 3, 0x62, 0}
)

// encodeKey takes a key that the policy has let through (checkKey).
func encodeKey(pub crypto.PublicKey) (publicKey, error) {
	info, bits, err := keyInfo(pub)
	if err != nil {
		return publicKey{}, invalid("public_key", "cannot be encoded: %v", err)
	}
	sum := sha256.Sum256(bits)
	return publicKey{info: info, id: sum[:20]}, nil
}

func keyInfo(pub crypto.PublicKey) (info, bits []byte, err error) {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		if bits, err = key.Bytes(); err != nil {
			return nil, nil, err
		}
		head := p256Info
		if key.Curve == elliptic.P384() {
			head = p384Info
		}
		return slices.Concat(head, bits), bits, nil
	case *rsa.PublicKey:
		info, err = x509.MarshalPKIXPublicKey(key)
		return info, x509.MarshalPKCS1PublicKey(key), err
	}
	return nil, nil, fmt.Errorf("it has the type %T", pub)
}

// wrap makes the certificate of its signed part.
func wrap(tbs, algorithm, signature []byte) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(algorithm)+len(signature)+16))
	b.AddASN1(cryptobyte_asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(algorithm)
		b.AddASN1BitString(signature)
	})
	return b.Bytes()
}
