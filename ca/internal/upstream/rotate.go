// More than one root and JWT key: the next ones are made beside those that sign,
// take over when the store says so, and are removed when nobody needs them. Of a
// new root the one before says under its key that it follows, so that replicas
// take it from the store.

package upstream

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"merlon.dev/ca/internal/authority"
)

// ErrRootEnded is returned where the root that signs has ended.
var ErrRootEnded = errors.New("the root ended")

// roots are the roots that are known here. It is immutable.
type roots struct {
	active *generation
	all    []*generation // without signers on a replica
}

// root is the root under which the intermediate is, or is to be; nil before Open
// has found one.
func (k *Keys) root() *generation {
	if r := k.roots.Load(); r != nil {
		return r.active
	}
	return nil
}

// Anchors are the CA's own roots, which vouch for policy keys: their keys are
// here, or a root that was here before has vouched for them. SVIDs are verified
// with them too, unless an upstream authority signs our intermediates.
func (k *Keys) Anchors() []*x509.Certificate {
	var certs []*x509.Certificate
	for _, gen := range k.roots.Load().all {
		certs = append(certs, gen.cert)
	}
	return certs
}

// anchor is the known root with the given ID; nil if there is none.
func (k *Keys) anchor(id string) *generation {
	for _, gen := range k.roots.Load().all {
		if rootID(gen.cert) == id {
			return gen
		}
	}
	return nil
}

// rootOf is the known root that signed cert; nil if none did.
func (k *Keys) rootOf(cert *x509.Certificate) *generation {
	for _, gen := range k.roots.Load().all {
		if cert.CheckSignatureFrom(gen.cert) == nil {
			return gen
		}
	}
	return nil
}

// RootOf is the known root that signed cert; nil if none did.
func (k *Keys) RootOf(cert *x509.Certificate) *x509.Certificate {
	if gen := k.rootOf(cert); gen != nil {
		return gen.cert
	}
	return nil
}

func rootID(cert *x509.Certificate) string { return hex.EncodeToString(cert.SubjectKeyId) }

// openRoots takes over the roots that are on disk.
func (k *Keys) openRoots(all []*generation, now time.Time) error {
	active := all[len(all)-1]
	for _, gen := range all {
		if rootID(gen.cert) == k.cfg.ActiveRoot {
			active = gen
		}
	}
	k.roots.Store(&roots{active: active, all: all})
	err := k.checkRoot(active.cert, now)
	if errors.Is(err, ErrRootEnded) && k.cfg.NewRoot {
		return k.firstRoot(all, now)
	}
	return err
}

// firstRoot makes a root that signs at once: the first, or the first after
// everything has ended.
func (k *Keys) firstRoot(before []*generation, now time.Time) error {
	root, err := k.makeRoot(now)
	if err != nil {
		return fmt.Errorf("make a root: %w", err)
	}
	k.roots.Store(&roots{active: root, all: append(slices.Clone(before), root)})
	return nil
}

// ErrUpstreamRoot is returned where an upstream authority's root signs, which is
// not ours to replace.
var ErrUpstreamRoot = errors.New("the root is the upstream authority's: it is replaced there")

// Root is one of the roots under which this CA signs, or could.
type Root struct {
	Certificate *x509.Certificate
	// Seal is the signature over it of the root SealedBy, which signs now; none over
	// an upstream authority's.
	Seal     []byte
	SealedBy string
}

// PrepareRoot makes a root that signs nothing yet.
func (k *Keys) PrepareRoot(now time.Time) (*Root, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.HasUpstream():
		return nil, ErrUpstreamRoot
	case !k.HoldsRoot():
		return nil, ErrNoRootKey
	}
	gen, err := k.makeRoot(now)
	if err != nil {
		return nil, fmt.Errorf("make a root: %w", err)
	}
	before := k.roots.Load()
	k.roots.Store(&roots{active: before.active, all: append(slices.Clone(before.all), gen)})
	return k.sealRoot(gen)
}

// sealRoot lets the root that signs say that gen follows.
func (k *Keys) sealRoot(gen *generation) (*Root, error) {
	by := k.root()
	seal, err := by.seal(sealSuccession, gen.cert.Raw)
	if err != nil {
		return nil, err
	}
	return &Root{Certificate: gen.cert, Seal: seal, SealedBy: rootID(by.cert)}, nil
}

// Roots are the roots under which this CA can sign, oldest first: those whose keys
// are here, or the upstream authority's; none on a replica.
func (k *Keys) Roots() (all []*Root, err error) {
	switch {
	case k.HasUpstream():
		return []*Root{{Certificate: k.external.root}}, nil
	case !k.HoldsRoot():
		return nil, nil
	}
	for _, gen := range k.roots.Load().all {
		root, err := k.sealRoot(gen)
		if err != nil {
			return nil, err
		}
		all = append(all, root)
	}
	return all, nil
}

// AddAnchor puts away a root that is known from the store, if the root that it
// names as its predecessor is here and has sealed it.
func (k *Keys) AddAnchor(cert *x509.Certificate, seal []byte, sealedBy string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.anchor(rootID(cert)) != nil {
		return nil
	}
	by := k.anchor(sealedBy)
	if by == nil || !sealed(by.cert, sealSuccession, cert.Raw, seal) {
		return fmt.Errorf("root %s is in the store, and no root that is known here has sealed it: who wrote it there does not have the CA's root key", rootID(cert))
	}
	if err := k.checkRoot(cert, cert.NotBefore); err != nil {
		return err
	}
	gen, err := k.dir.add(kindAnchor, madeKey{}, cert)
	if err != nil {
		return err
	}
	before := k.roots.Load()
	k.roots.Store(&roots{active: before.active, all: append(slices.Clone(before.all), gen)})
	return nil
}

// UseRoot lets the root with the given ID sign: a new intermediate is made under
// it, and a certificate for the policy key, unless they are there. A replica asks
// the root holder for both. changed says that the intermediate is another.
func (k *Keys) UseRoot(ctx context.Context, id string, now time.Time) (changed bool, err error) {
	if err := k.wantRoot(id, now); err != nil {
		return false, fmt.Errorf("use root %s: %w", id, err)
	}
	return k.RenewIntermediate(ctx, now)
}

func (k *Keys) wantRoot(id string, now time.Time) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	gen := k.anchor(id)
	if gen == nil {
		return errors.New("it is not here")
	}
	k.wanted = id
	if !k.HoldsRoot() {
		return nil
	}
	if err := k.checkRoot(gen.cert, now); err != nil {
		return err
	}
	before := k.roots.Load()
	k.roots.Store(&roots{active: gen, all: before.all})
	return k.certifyOwnPolicy(now)
}

// certifyOwnPolicy gives the root holder's own policy key a certificate under the
// root that signs, unless it has that. k.mu is held, or Open runs.
func (k *Keys) certifyOwnPolicy(now time.Time) error {
	policy := k.policy.Load()
	if policy.cert != nil && policy.cert.CheckSignatureFrom(k.root().cert) == nil {
		return nil
	}
	name := k.name
	if name == "" {
		name = k.cfg.Name
	}
	if name == "" {
		name = DefaultName
	}
	cert, err := k.CertifyPolicyKey(name, policy.signer.Public(), now)
	if err != nil {
		return err
	}
	if policy, err = k.dir.certify(policy, cert); err != nil {
		return err
	}
	k.policy.Store(policy)
	return nil
}

// underWanted says whether the issuing authority is under the root that is to
// sign.
func (k *Keys) underWanted(current *authority.X509Authority) bool {
	return k.wanted == "" || rootID(current.Root) == k.wanted
}

// openJWT loads the JWT keys, or makes the first.
func (k *Keys) openJWT() error {
	all, err := k.dir.all(kindJWT)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		first, err := k.makePlainKey(kindJWT)
		if err != nil {
			return err
		}
		all = append(all, first)
	}
	k.jwtKeys.Store(&all)
	for _, gen := range all {
		if _, err := authority.JWSAlgorithm(gen.signer.Public()); err != nil {
			return fmt.Errorf("the JWT key: %w", err)
		}
	}
	newest := all[len(all)-1]
	if err := k.checkPlainKey(kindJWT, newest.signer.Public()); err != nil {
		return err
	}
	return k.signJWTWith(newest)
}

func (k *Keys) signJWTWith(gen *generation) error {
	kid, err := keyID(gen.signer)
	if err != nil {
		return err
	}
	k.jwt.Store(&authority.JWTAuthority{TrustDomain: k.cfg.TrustDomain, KeyID: kid, Signer: gen.signer})
	return nil
}

// jwtKey is the JWT key with the given ID; nil if it is not here.
func (k *Keys) jwtKey(kid string) *generation {
	for _, gen := range *k.jwtKeys.Load() {
		if id, err := keyID(gen.signer); err == nil && id == kid {
			return gen
		}
	}
	return nil
}

// JWTKey is the public part of a JWT key that is here.
type JWTKey struct {
	KeyID string
	PKIX  []byte // DER
}

func publicJWT(gen *generation) (JWTKey, error) {
	kid, err := keyID(gen.signer)
	if err != nil {
		return JWTKey{}, err
	}
	der, err := x509.MarshalPKIXPublicKey(gen.signer.Public())
	if err != nil {
		return JWTKey{}, fmt.Errorf("encode JWT key %s: %w", kid, err)
	}
	return JWTKey{kid, der}, nil
}

// JWTKeys are those that are here, oldest first.
func (k *Keys) JWTKeys() (all []JWTKey, err error) {
	for _, gen := range *k.jwtKeys.Load() {
		key, err := publicJWT(gen)
		if err != nil {
			return nil, err
		}
		all = append(all, key)
	}
	return all, nil
}

// PrepareJWT makes a JWT key that signs nothing yet.
func (k *Keys) PrepareJWT() (JWTKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	gen, err := k.makePlainKey(kindJWT)
	if err != nil {
		return JWTKey{}, err
	}
	all := append(slices.Clone(*k.jwtKeys.Load()), gen)
	k.jwtKeys.Store(&all)
	return publicJWT(gen)
}

// HoldsJWT says whether the JWT key with the given ID is here.
func (k *Keys) HoldsJWT(kid string) bool { return k.jwtKey(kid) != nil }

// UseJWT lets the JWT key with the given ID sign.
func (k *Keys) UseJWT(kid string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.JWT().KeyID == kid {
		return nil
	}
	gen := k.jwtKey(kid)
	if gen == nil {
		return fmt.Errorf("use JWT key %s: it is not here", kid)
	}
	return k.signJWTWith(gen)
}

// Discard removes the keys of a root or JWT key that is revoked, and forgets it.
// What signs stays.
func (k *Keys) Discard(id string) (found bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	before := k.roots.Load()
	if gen := k.anchor(id); gen != nil && gen != before.active {
		k.roots.Store(&roots{active: before.active, all: without(before.all, gen)})
		return true, k.dir.remove(gen)
	}
	if gen := k.jwtKey(id); gen != nil && id != k.JWT().KeyID {
		rest := without(*k.jwtKeys.Load(), gen)
		k.jwtKeys.Store(&rest)
		return true, k.dir.remove(gen)
	}
	return false, nil
}

func without(all []*generation, gone *generation) []*generation {
	return slices.DeleteFunc(slices.Clone(all), func(gen *generation) bool { return gen == gone })
}
