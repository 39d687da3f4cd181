// What a sealed key file is: a private key under AES-256-GCM, bound to its kind,
// its generation and its trust domain, so that no file passes for another. The
// header says how the key-encryption key (KEK) comes about and which one it was, so
// that a wrong one is told from damage; all of it is authenticated.
//
//	version 1 | derivation 1 | scrypt: log2 N 1, salt 16 | KEK ID 8 | nonce 12, ciphertext, tag 16

package upstream

import (
	"bytes"
	"crypto/cipher"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"
)

const (
	sealedFile  = "key.sealed"
	sealedType  = "MERLON SEALED KEY"
	sealVersion = 1
	saltSize    = 16
	kekIDSize   = 8
	nonceSize   = 12
	tagSize     = 16
	// minLogN and maxLogN bound what a file can ask of scrypt: 1 GiB at most.
	minLogN, maxLogN = 10, 20
)

// Errors of sealed keys. The words around them name the file.
var (
	// ErrWrongKEK: sealed under another key-encryption key than the one at hand.
	ErrWrongKEK = errors.New("it is sealed under another key-encryption key")
	// ErrSealBroken: the file is not what was once sealed here.
	ErrSealBroken = errors.New("it is damaged, or was sealed as another generation, kind, or for another trust domain")
)

type derivation byte

const (
	derivedNot    derivation = 0 // the KEK's 32 bytes as they are
	derivedScrypt derivation = 1 // from a passphrase, with r = 8 and p = 1
)

// scryptParams go into the file: whoever has the passphrase needs nothing else.
type scryptParams struct {
	logN byte
	salt [saltSize]byte
}

// sealedKey is a parsed file.
type sealedKey struct {
	derivation derivation
	scrypt     scryptParams // zero unless derivedScrypt
	kekID      [kekIDSize]byte
	box        []byte // nonce, ciphertext, tag
}

// header is what precedes the box.
func (s *sealedKey) header() []byte {
	b := []byte{sealVersion, byte(s.derivation)}
	if s.derivation == derivedScrypt {
		b = append(append(b, s.scrypt.logN), s.scrypt.salt[:]...)
	}
	return append(b, s.kekID[:]...)
}

func (s *sealedKey) encode() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: sealedType, Bytes: append(s.header(), s.box...)})
}

// parseSealed reads a file. Each sealed key has one encoding: what is accepted is
// what encode would write.
func parseSealed(text []byte) (*sealedKey, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != sealedType {
		return nil, fmt.Errorf("%w: not one %s in PEM", ErrSealBroken, sealedType)
	}
	s, err := decodeSealed(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSealBroken, err)
	}
	if !bytes.Equal(s.encode(), text) {
		return nil, fmt.Errorf("%w: there is more in the file than a sealed key", ErrSealBroken)
	}
	return s, nil
}

func decodeSealed(b []byte) (*sealedKey, error) {
	errShort := errors.New("the file is too short")
	if len(b) < 2 {
		return nil, errShort
	}
	if b[0] != sealVersion {
		return nil, fmt.Errorf("format %d is not known here; a newer merlon-ca may have written it", b[0])
	}
	s := &sealedKey{derivation: derivation(b[1])}
	b = b[2:]
	switch s.derivation {
	case derivedNot:
	case derivedScrypt:
		if len(b) < 1+saltSize {
			return nil, errShort
		}
		if s.scrypt.logN = b[0]; s.scrypt.logN < minLogN || s.scrypt.logN > maxLogN {
			return nil, fmt.Errorf("scrypt with N = 2^%d is out of bounds", s.scrypt.logN)
		}
		copy(s.scrypt.salt[:], b[1:])
		b = b[1+saltSize:]
	default:
		return nil, fmt.Errorf("key derivation %d is not known here", s.derivation)
	}
	if len(b) < kekIDSize+nonceSize+tagSize {
		return nil, errShort
	}
	copy(s.kekID[:], b)
	s.box = bytes.Clone(b[kekIDSize:])
	return s, nil
}

// seat is the one place where a sealed key is of use.
type seat struct {
	trustDomain string
	kind        kind
	number      int
}

// associated is what the seal covers beside the private key. No part of it can
// hold a line break.
func (s *sealedKey) associated(at seat) []byte {
	b := []byte("merlon sealed key\n" + at.trustDomain + "\n" + string(at.kind) + "\n" + strconv.Itoa(at.number) + "\n")
	return append(b, s.header()...)
}

// seal seals the PKCS #8 private key for its seat.
func (k *kek) seal(private []byte, at seat) ([]byte, error) {
	s := &sealedKey{}
	aead, err := k.prepare(s)
	if err != nil {
		return nil, err
	}
	s.box = aead.Seal(nil, nil, private, s.associated(at)) //nolint:gosec // the AEAD draws a fresh nonce itself (NewGCMWithRandomNonce)
	return s.encode(), nil
}

// open is the reverse of seal.
func (k *kek) open(text []byte, at seat) ([]byte, error) {
	s, err := parseSealed(text)
	if err != nil {
		return nil, err
	}
	var aead cipher.AEAD
	if aead, err = k.match(s); err != nil {
		return nil, err
	}
	private, err := aead.Open(nil, nil, s.box, s.associated(at))
	if err != nil {
		return nil, ErrSealBroken
	}
	return private, nil
}
