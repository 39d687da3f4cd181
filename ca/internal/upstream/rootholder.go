// What the replica that holds the root key does for the others: it signs their
// intermediates and policy keys, and seals the tokens by which they join. Only
// public keys come here; nothing private leaves.

package upstream

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// ErrNoRootKey is returned where only the root's key could help.
var ErrNoRootKey = errors.New("this replica does not hold the root key")

// HoldsRoot says whether the root's key is here.
func (k *Keys) HoldsRoot() bool {
	root := k.root()
	return root != nil && root.signer != nil
}

// SignIntermediate makes an intermediate for a replica's key: of the profile and
// the life of the root holder's own, with a subject and a key ID of its own.
func (k *Keys) SignIntermediate(key crypto.PublicKey, now time.Time) (*x509.Certificate, error) {
	if !k.HoldsRoot() {
		return nil, ErrNoRootKey
	}
	if k.HasUpstream() {
		return nil, errors.New("sign an intermediate: below an upstream authority there is one replica")
	}
	ec, ok := key.(*ecdsa.PublicKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, errors.New("sign an intermediate: its key is not a P-256 key")
	}
	template, err := k.intermediateTemplate(now)
	if err != nil {
		return nil, fmt.Errorf("sign an intermediate: %w", err)
	}
	template.PublicKey = key
	cert, err := k.signByRoot(template)
	if err != nil {
		return nil, fmt.Errorf("sign an intermediate: %w", err)
	}
	if err := k.checkIntermediate(cert, template, ec); err != nil {
		return nil, fmt.Errorf("sign an intermediate: the certificate that was made is not the one asked for: %w", err)
	}
	return cert, nil
}

// checkIntermediate judges an intermediate for key, however it came here.
func (k *Keys) checkIntermediate(cert, want *x509.Certificate, key *ecdsa.PublicKey) error {
	if err := checkAuthority(cert, want); err != nil {
		return err
	}
	if err := cert.CheckSignatureFrom(k.root().cert); err != nil {
		return fmt.Errorf("it is not the root's: %w", err)
	}
	if !key.Equal(cert.PublicKey) {
		return errors.New("it has another key")
	}
	return nil
}

// The contexts keep what the root's key says here apart, also from certificates,
// which begin with another byte.
const (
	sealAdmission  = "merlon replica token v1\n"
	sealSuccession = "merlon next root v1\n"
)

// Seal signs statement, what is stored of a replica's token, with the root's
// key: who can write the store alone cannot let a replica in.
func (k *Keys) Seal(statement []byte) ([]byte, error) {
	if !k.HoldsRoot() {
		return nil, ErrNoRootKey
	}
	return k.root().seal(sealAdmission, statement)
}

// Sealed says whether seal is a root's for statement.
func (k *Keys) Sealed(statement, seal []byte) bool {
	return slices.ContainsFunc(k.Anchors(), func(root *x509.Certificate) bool { return sealed(root, sealAdmission, statement, seal) })
}

func (g *generation) seal(context string, statement []byte) ([]byte, error) {
	seal, err := g.signer.Sign(rand.Reader, sealDigest(context, statement), crypto.SHA384)
	if err != nil {
		return nil, fmt.Errorf("seal with the root's key: %w", err)
	}
	if !sealed(g.cert, context, statement, seal) {
		return nil, errors.New("seal with the root's key: the signer gave a wrong signature")
	}
	return seal, nil
}

func sealed(root *x509.Certificate, context string, statement, seal []byte) bool {
	key, ok := root.PublicKey.(*ecdsa.PublicKey)
	return ok && ecdsa.VerifyASN1(key, sealDigest(context, statement), seal)
}

func sealDigest(context string, statement []byte) []byte {
	sum := sha512.Sum384(append([]byte(context), statement...))
	return sum[:]
}
