// The keys of a replica that does not hold the root: made here, certified there.

package upstream

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"merlon.dev/ca/internal/replica"
)

// Errors by which a caller can tell the operator what to do.
var (
	// ErrNoKeys: no keys here, and the store belongs to a root already.
	ErrNoKeys = errors.New("the store belongs to another root, whose key is not here: this CA can only be a replica")
	// ErrIsReplica: the keys here are those of a replica, and nobody is named
	// that holds the root.
	ErrIsReplica = errors.New("the keys here are a replica's")
	// ErrIsRootHolder: the root's key is here, and somebody else is named who
	// should hold it.
	ErrIsRootHolder = errors.New("the root key is here: this CA is no replica of another")
	// ErrOtherReplica: the keys here are certified for another name.
	ErrOtherReplica = errors.New("the keys here are another replica's")
	// ErrEnded: the replica was away for longer than its intermediate lived.
	ErrEnded = errors.New("the replica's intermediate has ended")
)

// KeyRequests are the public keys of a replica, each as PKCS #10, DER.
type KeyRequests struct{ Intermediate, Policy, JWT []byte }

// Certificates are what the root holder makes of them.
type Certificates struct {
	Intermediate, Policy, Root *x509.Certificate
}

// RootHolder is the way to the replica that holds the root key.
type RootHolder interface {
	// Join is called once, by a replica that has no certificates. The root that
	// it returns is the one that the operator named.
	Join(ctx context.Context, keys KeyRequests) (*Certificates, error)
	// Certify asks for a new intermediate.
	Certify(ctx context.Context, keys KeyRequests) (*Certificates, error)
}

// openReplica loads a replica's keys, or makes them and joins.
func (k *Keys) openReplica(ctx context.Context, now time.Time) error {
	if k.dir.holds(kindRoot) {
		return ErrIsRootHolder
	}
	if err := k.openPlainKeys(); err != nil {
		return err
	}
	anchors, err := k.dir.all(kindAnchor)
	if err != nil {
		return err
	}
	if len(anchors) == 0 {
		return k.join(ctx, now)
	}
	k.roots.Store(&roots{all: anchors})
	gen, err := k.dir.newest(kindIntermediate)
	switch {
	case err != nil:
		return err
	case gen == nil:
		return errors.New("the intermediate is missing")
	}
	root := k.rootOf(gen.cert)
	if root == nil {
		return errors.New("the intermediate is not the root's")
	}
	k.roots.Store(&roots{active: root, all: anchors})
	if err := k.checkRoot(root.cert, now); err != nil {
		return err
	}
	if err := k.checkOwnPolicy(now); err != nil {
		return err
	}
	if !now.Before(gen.cert.NotAfter) {
		return fmt.Errorf("%w: at %s", ErrEnded, gen.cert.NotAfter.Format(time.RFC3339))
	}
	k.x509.Store(authorityOf(gen, root))
	return nil
}

// checkOwnPolicy: the certificate beside the policy key is a root's for it.
func (k *Keys) checkOwnPolicy(now time.Time) error {
	cert := k.policy.Load().cert
	if cert == nil {
		return errors.New("the policy key has no certificate")
	}
	key, err := replica.VerifyPolicyCertificate(cert.Raw, k.Anchors(), now)
	k.name = key.Replica
	return err
}

// join has the keys certified for the first time. The root is put away last: it
// is what makes the folder a replica's.
func (k *Keys) join(ctx context.Context, now time.Time) error {
	key, err := k.dir.create(kindIntermediate)
	if err != nil {
		return err
	}
	requests, err := k.requests(key)
	if err != nil {
		return k.dir.discard(key, err)
	}
	got, err := k.cfg.RootHolder.Join(ctx, requests)
	if err != nil {
		return k.dir.discard(key, err)
	}
	anchor := &generation{kind: kindAnchor, cert: got.Root}
	k.roots.Store(&roots{active: anchor, all: []*generation{anchor}})
	if err := k.checkRoot(got.Root, now); err != nil {
		return k.dir.discard(key, err)
	}
	gen, err := k.takeOver(got, key, now)
	if err != nil {
		return k.dir.discard(key, err)
	}
	if err := errors.Join(k.dir.removeOlder(gen), k.checkOwnPolicy(now)); err != nil {
		return err
	}
	anchor, err = k.dir.add(kindAnchor, madeKey{}, got.Root)
	if err == nil {
		k.roots.Store(&roots{active: anchor, all: []*generation{anchor}})
	}
	return err
}

// requests asks for an intermediate with key, and for the other two.
func (k *Keys) requests(key madeKey) (r KeyRequests, err error) {
	for _, request := range []struct {
		to   *[]byte
		with crypto.Signer
	}{{&r.Intermediate, key.signer}, {&r.Policy, k.policy.Load().signer}, {&r.JWT, k.JWT().Signer}} {
		if *request.to, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, request.with); err != nil {
			return KeyRequests{}, fmt.Errorf("make a CSR: %w", err)
		}
	}
	return r, nil
}

// JWTRequest asks for a place for the JWT key with the given ID: as PKCS #10, which
// proves that the key is here.
func (k *Keys) JWTRequest(kid string) ([]byte, error) {
	gen := k.jwtKey(kid)
	if gen == nil {
		return nil, fmt.Errorf("make a CSR for JWT key %s: it is not here", kid)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, gen.signer)
	if err != nil {
		return nil, fmt.Errorf("make a CSR for JWT key %s: %w", kid, err)
	}
	return der, nil
}

// checkAnswer judges what the root holder made for the key.
func (k *Keys) checkAnswer(got *Certificates, made madeKey, now time.Time) error {
	want, err := k.intermediateTemplate(now)
	if err != nil {
		return err
	}
	want.NotAfter = k.root().cert.NotAfter // how long it lives is the root holder's matter
	key, ok := made.signer.Public().(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("the intermediate's key is a %T", made.signer.Public())
	}
	if err := k.checkIntermediate(got.Intermediate, want, key); err != nil {
		return fmt.Errorf("the intermediate that the root holder made: %w", err)
	}
	policyKey, err := replica.VerifyPolicyCertificate(got.Policy.Raw, []*x509.Certificate{k.root().cert}, now)
	if err != nil {
		return err
	}
	if !policyKey.Public.Equal(k.policy.Load().signer.Public()) {
		return errors.New("the policy certificate that the root holder made has another key")
	}
	return nil
}

// takeOver checks what the root holder made, and puts it away.
func (k *Keys) takeOver(got *Certificates, made madeKey, now time.Time) (*generation, error) {
	if err := k.checkAnswer(got, made, now); err != nil {
		return nil, err
	}
	if policy := k.policy.Load(); policy.cert == nil || !policy.cert.Equal(got.Policy) {
		policy, err := k.dir.certify(policy, got.Policy)
		if err != nil {
			return nil, err
		}
		k.policy.Store(policy)
	}
	gen, err := k.dir.put(kindIntermediate, made, got.Intermediate)
	if err != nil {
		return nil, err
	}
	k.x509.Store(authorityOf(gen, k.root()))
	return gen, nil
}

// recertify asks the root holder for the next intermediate. k.mu is held. A key
// that was not put away is asked for again: the root holder may have certified it,
// and each further one would be an authority more of which nobody has the key.
func (k *Keys) recertify(ctx context.Context, now time.Time) error {
	if k.pending == nil {
		key, err := k.dir.create(kindIntermediate)
		if err != nil {
			return err
		}
		k.pending = &key
	}
	requests, err := k.requests(*k.pending)
	if err != nil {
		return err
	}
	got, err := k.cfg.RootHolder.Certify(ctx, requests)
	if err != nil {
		return fmt.Errorf("ask the root holder: %w", err)
	}
	// Another root than before is one of which a root that was here has said that
	// it follows.
	before, root := k.roots.Load(), k.anchor(rootID(got.Root))
	if root == nil || !got.Root.Equal(root.cert) {
		return errors.New("the root holder answers with another root")
	}
	k.roots.Store(&roots{active: root, all: before.all})
	gen, err := k.takeOver(got, *k.pending, now)
	if err != nil {
		k.roots.Store(before)
		return err
	}
	k.pending = nil
	if err := k.dir.removeOlder(gen); err != nil {
		return fmt.Errorf("remove old intermediates: %w", err)
	}
	return nil
}
