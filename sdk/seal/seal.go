// Package seal keeps secrets in files: AES-256-GCM under a key-encryption key (KEK),
// bound to what the secret is and where it belongs, so that no sealed thing passes
// for another. The header says how the KEK comes about and which one it was, so that
// a wrong one is told from damage; all of it is authenticated.
//
//	version 1 | derivation 1 | scrypt: log2 N 1, salt 16 | KEK ID 8 | nonce 12, ciphertext, tag 16
//
// The CA seals its private keys so, and the agent what it keeps on disk.
package seal

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

const (
	version   = 1
	saltSize  = 16
	keyIDSize = 8
	nonceSize = 12
	tagSize   = 16
	// minLogN and maxLogN bound what a file can ask of scrypt: 1 GiB at most.
	minLogN, maxLogN = 10, 20
)

// Errors of Open. The words around them name the file.
var (
	// ErrWrongKey: sealed under another key-encryption key than the one at hand.
	ErrWrongKey = errors.New("it is sealed under another key-encryption key")
	// ErrBroken: not what was once sealed as this.
	ErrBroken = errors.New("it is damaged, or was sealed as something else, or for another trust domain")
)

type derivation byte

const (
	derivedNot    derivation = 0 // the KEK's 32 bytes as they are
	derivedScrypt derivation = 1 // from a passphrase, with r = 8 and p = 1
)

// scryptParams go into the header: whoever has the passphrase needs nothing else.
type scryptParams struct {
	logN byte
	salt [saltSize]byte
}

// sealed is a parsed sealed thing.
type sealed struct {
	derivation derivation
	scrypt     scryptParams // zero unless derivedScrypt
	keyID      [keyIDSize]byte
	box        []byte // nonce, ciphertext, tag
}

// header is what precedes the box.
func (s *sealed) header() []byte {
	b := []byte{version, byte(s.derivation)}
	if s.derivation == derivedScrypt {
		b = append(append(b, s.scrypt.logN), s.scrypt.salt[:]...)
	}
	return append(b, s.keyID[:]...)
}

func (s *sealed) encode() []byte { return append(s.header(), s.box...) }

// decode reads a sealed thing. Each has one encoding: what is accepted is what
// encode would write.
func decode(b []byte) (*sealed, error) {
	errShort := errors.New("it is too short")
	if len(b) < 2 {
		return nil, errShort
	}
	if b[0] != version {
		return nil, fmt.Errorf("format %d is not known here; a newer version may have written it", b[0])
	}
	s := &sealed{derivation: derivation(b[1])}
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
	if len(b) < keyIDSize+nonceSize+tagSize {
		return nil, errShort
	}
	copy(s.keyID[:], b)
	s.box = bytes.Clone(b[keyIDSize:])
	return s, nil
}

// associated is what the seal covers beside the secret. No part of as may hold a
// line break.
func (s *sealed) associated(as []string) []byte {
	return append([]byte(strings.Join(as, "\n")+"\n"), s.header()...)
}

// Seal seals secret as what as names, part by part: its kind, its trust domain, its
// number. It opens as the same only. No part may hold a line break.
func (k *Key) Seal(secret []byte, as ...string) ([]byte, error) {
	s := &sealed{}
	aead, err := k.prepare(s)
	if err != nil {
		return nil, err
	}
	s.box = aead.Seal(nil, nil, secret, s.associated(as)) //nolint:gosec // the AEAD draws a fresh nonce itself (NewGCMWithRandomNonce)
	return s.encode(), nil
}

// Open is the reverse of Seal: ErrWrongKey or ErrBroken.
func (k *Key) Open(b []byte, as ...string) ([]byte, error) {
	s, err := decode(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBroken, err)
	}
	aead, err := k.match(s)
	if err != nil {
		return nil, err
	}
	secret, err := aead.Open(nil, nil, s.box, s.associated(as))
	if err != nil {
		return nil, ErrBroken
	}
	return secret, nil
}
