// Signs with an authority's key, and decides which of its signatures are checked
// before they leave.
//
// A wrong signature is worse than a useless one: from a single faulty RSA
// signature by the Chinese remainder theorem anybody computes the key (Boneh,
// DeMillo, Lipton), and from ECDSA with a deterministic nonce two signatures of
// one message, one of them faulty, do the same. So crypto/x509 verifies each
// signature that it asks for, and this costs more than the signature itself: 1.7
// times with P-256.
//
// Every signature is checked, unless the key is a plain *ecdsa.PrivateKey: of
// RSA, of an HSM, a KMS or any other signer whose nonces and memory are not
// known here. With Go's own ECDSA each nonce is fresh (the random bits go into it
// besides key and message, crypto/internal/fips140/ecdsa), so no two signatures
// share one. What is left is a bit of the key that flips in memory: a signature
// with such a key tells which bit flipped, and so that bit of the key (Giraud,
// Knudsen 2004), but always the same one until another flips. To learn a key that
// way takes a hundred and more different flips, each of them with a signature
// that leaves. Of such a key's signatures one in sixteen is checked, chosen at
// random, and the first; a single wrong one ends the use of the key until the CA
// has it from disk again. Even if each flip gave one signature only, a hundred go
// unseen with a chance of (15/16)^100, 0.2 percent; with the hundred signatures
// that a busy CA gives in a second, a single flip has no better one. Who can flip
// chosen bits, in chosen moments, in the memory of a CA does not need signatures.

package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"sync/atomic"
)

// checkOneIn is how many signatures of a plain ECDSA key there are to one that
// is checked.
const checkOneIn = 16

// ErrFaultyKey is returned once a key in this process's memory has given a wrong
// signature. It signs no more.
var ErrFaultyKey = errors.New("the signing key gave a wrong signature and is not used any more: the memory of this machine may be faulty; restart the CA, best on another one")

// signing is an authority's key with what signatures by it look like. It is safe
// for concurrent use as far as the signer is.
type signing struct {
	signer    crypto.Signer
	algorithm []byte // AlgorithmIdentifier, DER
	hash      crypto.Hash
	sampled   bool // a plain ECDSA key: see above

	used   atomic.Bool
	faulty atomic.Bool
}

// The AlgorithmIdentifiers of RFC 5758 §3.2 and RFC 4055 §5.
var (
	ecdsaWithSHA256 = []byte{0x30, 0x0a, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}
	ecdsaWithSHA384 = []byte{0x30, 0x0a, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3}
	rsaWithSHA256   = []byte{0x30, 0x0d, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 0x0b, 5, 0}
)

// newSigning: an issuing key is P-256, P-384 or RSA.
func newSigning(signer crypto.Signer) (*signing, error) {
	s := &signing{signer: signer}
	_, s.sampled = signer.(*ecdsa.PrivateKey)
	switch key := signer.Public().(type) {
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			s.algorithm, s.hash = ecdsaWithSHA256, crypto.SHA256
			return s, nil
		case elliptic.P384():
			s.algorithm, s.hash = ecdsaWithSHA384, crypto.SHA384
			return s, nil
		}
		return nil, fmt.Errorf("an authority does not sign with a key on curve %s", key.Curve.Params().Name)
	case *rsa.PublicKey:
		s.algorithm, s.hash = rsaWithSHA256, crypto.SHA256
		return s, nil
	}
	return nil, fmt.Errorf("an authority does not sign with a key of type %T", signer.Public())
}

// sign gives a signature of message: ASN.1 of ECDSA, PKCS #1 v1.5 of RSA.
func (s *signing) sign(message []byte) ([]byte, error) {
	if err := s.fault(); err != nil {
		return nil, err
	}
	signature, err := crypto.SignMessage(s.signer, rand.Reader, message, s.hash)
	if err != nil {
		return nil, err
	}
	if !s.due() || s.verify(message, signature) {
		return signature, nil
	}
	if s.sampled {
		s.faulty.Store(true)
		return nil, ErrFaultyKey
	}
	return nil, errors.New("the signer gave a wrong signature")
}

func (s *signing) fault() error {
	if s.faulty.Load() {
		return ErrFaultyKey
	}
	return nil
}

// due says whether the next signature is to be checked.
func (s *signing) due() bool {
	return !s.sampled || !s.used.Swap(true) || mathrand.Uint32N(checkOneIn) == 0 //nolint:gosec // who could foresee it would gain nothing
}

func (s *signing) verify(message, signature []byte) bool {
	h := s.hash.New()
	h.Write(message)
	digest := h.Sum(nil)
	switch key := s.signer.Public().(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, digest, signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, s.hash, digest, signature) == nil
	}
	return false
}
