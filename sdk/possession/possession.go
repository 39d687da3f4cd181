// Package possession is the proof that a node holds the private key of a
// certificate which its agent shows to the CA. What is signed is worth nothing
// elsewhere: it has the keying material of one TLS connection, to which the CA's
// random numbers went as well as the agent's, and the CSR of the request. So a
// signature that was seen or stolen cannot be replayed, on no other connection
// and for no other key, and there is no nonce for the CA to remember.
package possession

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
)

const (
	// label is that of the exporter (RFC 8446 §7.5), and at the same time tells
	// this signature from all others that the key may make.
	label      = "EXPORTER-Merlon-node-x509pop-v1"
	exporterBy = 32

	// The upper bounds are those of what a check may cost.
	minRSABits, maxRSABits = 2048, 8192
	minRSAExponent         = 65537
	maxRSAExponent         = 1<<31 - 1
)

// Statement is what is signed: for this connection and this CSR.
func Statement(conn tls.ConnectionState, csr []byte) ([]byte, error) {
	if conn.Version != tls.VersionTLS13 || !conn.HandshakeComplete || conn.DidResume {
		return nil, errors.New("bind the proof to the connection: it is no fresh TLS 1.3 connection")
	}
	own, err := conn.ExportKeyingMaterial(label, nil, exporterBy)
	if err != nil {
		return nil, fmt.Errorf("bind the proof to the connection: %w", err)
	}
	request := sha256.Sum256(csr)
	// As a signature of TLS 1.3 begins (RFC 8446 §4.4.3), with a context of its own:
	// the key may be that of a TLS certificate.
	statement := []byte(strings.Repeat(" ", 64) + label + "\x00")
	return append(append(statement, own...), request[:]...), nil
}

// CheckKey says why a key is not fit for the proof.
func CheckKey(pub crypto.PublicKey) error {
	switch pub := pub.(type) {
	case ed25519.PublicKey:
		return nil
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P256() || pub.Curve == elliptic.P384() {
			return nil
		}
		return errors.New("its curve is neither P-256 nor P-384")
	case *rsa.PublicKey:
		if bits := pub.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return fmt.Errorf("it is an RSA key of %d bits; want %d to %d", bits, minRSABits, maxRSABits)
		}
		if pub.E < minRSAExponent || pub.E > maxRSAExponent {
			return fmt.Errorf("it is an RSA key with exponent %d; want at least %d", pub.E, minRSAExponent)
		}
		return nil
	}
	return errors.New("it is no Ed25519, P-256, P-384 or RSA key")
}

// Sign makes the proof.
func Sign(key crypto.Signer, statement []byte) ([]byte, error) {
	if err := CheckKey(key.Public()); err != nil {
		return nil, fmt.Errorf("prove that the node's key is held: %w", err)
	}
	message, opts := digest(key.Public(), statement)
	signature, err := key.Sign(rand.Reader, message, opts)
	if err != nil {
		return nil, fmt.Errorf("prove that the node's key is held: %w", err)
	}
	return signature, nil
}

// Verify says whether signature is the proof by the key of pub.
func Verify(pub crypto.PublicKey, statement, signature []byte) bool {
	if CheckKey(pub) != nil {
		return false
	}
	message, opts := digest(pub, statement)
	switch pub := pub.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(pub, message, signature)
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(pub, message, signature)
	case *rsa.PublicKey:
		return rsa.VerifyPSS(pub, opts.HashFunc(), message, signature, opts.(*rsa.PSSOptions)) == nil
	}
	return false
}

// digest is what the key signs of a statement, and how.
func digest(pub crypto.PublicKey, statement []byte) ([]byte, crypto.SignerOpts) {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P384() {
			sum := sha512.Sum384(statement)
			return sum[:], crypto.SHA384
		}
	case *rsa.PublicKey:
		sum := sha256.Sum256(statement)
		return sum[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
	case ed25519.PublicKey:
		return statement, crypto.Hash(0)
	}
	sum := sha256.Sum256(statement)
	return sum[:], crypto.SHA256
}
