// Package upstream holds the CA's own keys: the root, the issuing intermediate,
// the JWT key, and the keys that sign policy bundles and the log. A replica has
// all but the root, whose holder certifies them. Certificates are made by
// smallstep's softcas and keys by go.step.sm/crypto/kms, sealed in a folder that
// only the CA's user can read.
package upstream

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms"
	kmsapi "go.step.sm/crypto/kms/apiv1"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/sdk/seal"
)

// Defaults of Config.
const (
	DefaultRootTTL         = 365 * 24 * time.Hour
	DefaultIntermediateTTL = 24 * time.Hour
	DefaultName            = "ca"
	// What JWT-SVIDs can be signed with, and the length of RSA keys made for it.
	ES256     = "ES256"
	RS256     = "RS256"
	rs256Bits = 2048
	// MinTTL is the shortest life of an authority.
	MinTTL = 10 * time.Second
)

// Config says where keys are and how long authorities live.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Dir holds the keys, mode 0700. It is made when missing.
	Dir string
	// Development marks the root as one that nobody should trust. A folder keeps
	// to what it was made for: opening it the other way is an error.
	Development bool
	// Name is the name of this replica, once and for all. Empty on the root
	// holder: DefaultName; on others: whatever the root holder says.
	Name string
	// ExistingRoot says that there is a root already, so that none may be made.
	ExistingRoot bool
	// RootHolder makes this a replica of the CA that holds the root. Nil: the
	// root is here.
	RootHolder RootHolder
	// JWTAlgorithm is what JWT keys made from now on sign with: ES256 (also if
	// empty) or RS256.
	JWTAlgorithm string
	// ActiveRoot is the ID of the root that signs, as the store says, and ActiveJWT
	// that of the JWT key of the named replica. Empty, and nil: the newest.
	ActiveRoot string
	ActiveJWT  func(replica string) string
	// NewRoot makes a root, where the one that signs has ended.
	NewRoot bool
	// RootTTL and IntermediateTTL apply to authorities made from now on. Zero means
	// the defaults.
	RootTTL, IntermediateTTL time.Duration
	// KEK is what the keys are sealed under. Zero: a file beside Dir.
	KEK seal.Source
	// Upstream signs our intermediates. Zero: our own root.
	Upstream AuthorityConfig
	// KMS makes and holds keys. Zero: they are sealed files.
	KMS KMSConfig
	// Logger says what was sealed; nil: nobody.
	Logger *slog.Logger
}

// Keys are the CA's authorities. They are safe for concurrent use.
type Keys struct {
	cfg      Config
	keys     kmsapi.KeyManager
	external *external                  // nil: our own root signs
	policy   atomic.Pointer[generation] // its certificate changes with the root
	log      *generation
	name     string

	x509    atomic.Pointer[authority.X509Authority]
	roots   atomic.Pointer[roots]
	jwt     atomic.Pointer[authority.JWTAuthority]
	jwtKeys atomic.Pointer[[]*generation]

	mu      sync.Mutex // guards the making of generations and the fields below
	dir     *keyDir
	pending *madeKey // for a replica's next intermediate, not put away yet
	wanted  string   // ID of the root that is to sign for this replica; empty: as it is
}

// Open loads the keys in cfg.Dir, and makes those that are missing: all of them
// on first use. It refuses files that others can read, keys of another trust
// domain, and a folder whose root is gone while other keys are there.
func Open(ctx context.Context, cfg Config) (*Keys, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("open the CA keys: no trust domain")
	}
	// SPIFFE allows such names (ID4), but crypto/x509 parses no certificate with one.
	if name := cfg.TrustDomain.Name(); strings.HasPrefix(name, ".") || strings.Contains(name, "..") {
		return nil, fmt.Errorf("open the CA keys: trust domain %q has an empty label, which Go's X.509 cannot read", name)
	}
	if cfg.RootTTL == 0 {
		cfg.RootTTL = DefaultRootTTL
	}
	if cfg.Upstream.Type != "" {
		cfg.RootTTL = externalRootTTL // nobody verifies SVIDs with it, and nothing replaces it
	}
	if cfg.IntermediateTTL == 0 {
		cfg.IntermediateTTL = DefaultIntermediateTTL
	}
	if cfg.JWTAlgorithm == "" {
		cfg.JWTAlgorithm = ES256
	}
	if cfg.JWTAlgorithm != ES256 && cfg.JWTAlgorithm != RS256 {
		return nil, fmt.Errorf("open the CA keys: JWT-SVIDs are signed with %s or %s, not %q", ES256, RS256, cfg.JWTAlgorithm)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.RootTTL < MinTTL || cfg.IntermediateTTL < MinTTL {
		return nil, fmt.Errorf("open the CA keys: an authority lives at least %s", MinTTL)
	}
	k := &Keys{cfg: cfg}
	if err := k.open(ctx); err != nil {
		err = errors.Join(err, k.Close())
		return nil, fmt.Errorf("open the CA keys in %s: %w", cfg.Dir, err)
	}
	return k, nil
}

func (k *Keys) open(ctx context.Context) error {
	var err error
	if k.keys, err = kms.New(ctx, kmsapi.Options{Type: kmsapi.SoftKMS}); err != nil {
		return fmt.Errorf("start the software KMS: %w", err)
	}
	if k.external, err = openExternal(k.cfg.Upstream); err != nil {
		return err
	}
	if k.dir, err = openKeyDir(ctx, k.cfg, k.keys); err != nil {
		return err
	}
	now := time.Now()
	if k.cfg.RootHolder != nil {
		err = k.openReplica(ctx, now)
	} else {
		err = k.openRootHolder(ctx, now)
	}
	if err == nil && k.cfg.Name != "" && k.cfg.Name != k.name {
		err = fmt.Errorf("%w: those of %s, and this CA is configured as %s", ErrOtherReplica, k.name, k.cfg.Name)
	}
	if err == nil && k.cfg.ActiveJWT != nil && k.HoldsJWT(k.cfg.ActiveJWT(k.name)) {
		err = k.UseJWT(k.cfg.ActiveJWT(k.name))
	}
	return err
}

// Close lets go of the KMS. No key can be used afterwards.
func (k *Keys) Close() error {
	if k.dir == nil {
		return nil
	}
	var err error
	if k.pending != nil {
		err = k.dir.discard(*k.pending, nil)
	}
	return errors.Join(err, k.dir.kms.close())
}

func (k *Keys) openRootHolder(ctx context.Context, now time.Time) error {
	if err := k.openRoot(now); err != nil {
		return err
	}
	if err := k.openPlainKeys(); err != nil {
		return err
	}
	if err := k.certifyOwnPolicy(now); err != nil {
		return err
	}
	if err := k.checkOwnPolicy(now); err != nil {
		return err
	}
	return k.openIntermediate(ctx, now)
}

func (k *Keys) openRoot(now time.Time) error {
	all, err := k.dir.all(kindRoot)
	switch {
	case err != nil:
		return err
	case k.dir.holds(kindAnchor):
		return ErrIsReplica
	case len(all) > 0:
		return k.openRoots(all, now)
	case k.cfg.ExistingRoot:
		return ErrNoKeys
	case k.dir.holds(kindIntermediate, kindJWT, kindPolicy):
		return errors.New("the root is missing while other keys are there; restore it from a backup, or remove all of them to begin a new trust domain")
	}
	return k.firstRoot(nil, now)
}

func (k *Keys) checkRoot(root *x509.Certificate, now time.Time) error {
	if len(root.URIs) != 1 || root.URIs[0].String() != k.cfg.TrustDomain.IDString() {
		return fmt.Errorf("the root is of another trust domain than %s", k.cfg.TrustDomain)
	}
	if dev := authority.IsDevelopment(root); dev != k.cfg.Development {
		return fmt.Errorf("the root was made with development=%t and the configuration says development=%t", dev, k.cfg.Development)
	}
	if now.After(root.NotAfter) {
		return fmt.Errorf("%w at %s", ErrRootEnded, root.NotAfter.Format(time.RFC3339))
	}
	return nil
}

// openPlainKeys loads or makes the keys that have no certificate.
func (k *Keys) openPlainKeys() error {
	if err := k.openJWT(); err != nil {
		return err
	}
	policy, err := k.plainKey(kindPolicy)
	if err != nil {
		return err
	}
	k.policy.Store(policy)
	k.log, err = k.plainKey(kindLog)
	return err
}

func (k *Keys) plainKey(what kind) (*generation, error) {
	gen, err := k.dir.newest(what)
	if err == nil && gen == nil {
		return k.makePlainKey(what)
	}
	if err != nil {
		return nil, err
	}
	return gen, k.checkPlainKey(what, gen.signer.Public())
}

func (k *Keys) makePlainKey(what kind) (*generation, error) {
	key, err := k.dir.create(what)
	if err != nil {
		return nil, err
	}
	return k.dir.add(what, key, nil)
}

func (k *Keys) checkPlainKey(what kind, key crypto.PublicKey) error {
	switch what {
	case kindJWT:
		return k.checkJWTKey(key)
	case kindLog:
		if _, ok := key.(ed25519.PublicKey); !ok {
			return fmt.Errorf("the %s key is not an Ed25519 key", what)
		}
		return nil
	}
	if pub, ok := key.(*ecdsa.PublicKey); !ok || pub.Curve != elliptic.P256() {
		return fmt.Errorf("the %s key is not a P-256 key", what)
	}
	return nil
}

func (k *Keys) checkJWTKey(key crypto.PublicKey) error {
	alg, err := authority.JWSAlgorithm(key)
	if err != nil {
		return fmt.Errorf("the JWT key: %w", err)
	}
	if alg != k.cfg.JWTAlgorithm {
		k.cfg.Logger.Warn("the JWT key stays as it is: jwt_algorithm is for JWT keys that are made from now on, such as by merlon authority prepare --kind jwt",
			slog.String("signs", alg), slog.String("jwt_algorithm", k.cfg.JWTAlgorithm))
	}
	return nil
}

func (k *Keys) openIntermediate(ctx context.Context, now time.Time) error {
	if k.external != nil {
		return k.openUpstream(ctx, now)
	}
	gen, err := k.dir.newest(kindIntermediate)
	if err != nil {
		return err
	}
	if gen != nil && len(gen.chain) > 0 {
		return fmt.Errorf("%w: an upstream authority signed it, and none is configured", ErrOtherUpstream)
	}
	if gen != nil {
		root := k.rootOf(gen.cert)
		if root == nil {
			return errors.New("the intermediate is not the root's")
		}
		if root == k.root() { // or else another root has become active meanwhile
			k.x509.Store(authorityOf(gen, root))
		}
	}
	_, err = k.RenewIntermediate(ctx, now)
	return err
}

func authorityOf(gen, root *generation) *authority.X509Authority {
	if n := len(gen.chain); n > 0 { // an upstream authority signed it
		return &authority.X509Authority{
			Chain: append([]*x509.Certificate{gen.cert}, gen.chain[:n-1]...), Root: gen.chain[n-1], Signer: gen.signer,
		}
	}
	return &authority.X509Authority{Chain: []*x509.Certificate{gen.cert}, Root: root.cert, Signer: gen.signer}
}

// HasUpstream says whether somebody else signs our intermediates.
func (k *Keys) HasUpstream() bool { return k.external != nil }

// X509 is the current issuing authority. Hold on to the answer for one issuance,
// not longer: a renewed intermediate takes its place.
func (k *Keys) X509() *authority.X509Authority { return k.x509.Load() }

// JWT is the current JWT authority.
func (k *Keys) JWT() *authority.JWTAuthority { return k.jwt.Load() }

// Policy is the ES256 key that signs policy bundles, with its key ID.
func (k *Keys) Policy() (kid string, signer crypto.Signer) {
	signer = k.policy.Load().signer
	kid, _ = keyID(signer) // a P-256 key always encodes; Open has checked the type
	return kid, signer
}

// Log is the Ed25519 key that signs the checkpoints of this replica's log.
func (k *Keys) Log() crypto.Signer { return k.log.signer }

// Name is the name of this replica, as its policy certificate says.
func (k *Keys) Name() string { return k.name }

// PolicyCertificate is the DER certificate of the policy key.
func (k *Keys) PolicyCertificate() []byte { return bytes.Clone(k.policy.Load().cert.Raw) }

// TrustBundle is what others verify this CA's SVIDs with: the root and the JWT
// key that sign. It is a fresh copy without a sequence number, which
// ca/internal/trust adds.
func (k *Keys) TrustBundle() (*spiffebundle.Bundle, error) {
	bundle := spiffebundle.New(k.cfg.TrustDomain)
	bundle.AddX509Authority(k.X509().Root)
	jwt := k.JWT()
	if err := bundle.AddJWTAuthority(jwt.KeyID, jwt.Signer.Public()); err != nil {
		return nil, fmt.Errorf("assemble the trust bundle: %w", err)
	}
	return bundle, nil
}

// RenewIntermediate replaces the intermediate by a new generation, with another
// subject and key, once half of its life is over, or at once where another root
// is to sign. The old one's key is removed. A replica asks the root holder.
func (k *Keys) RenewIntermediate(ctx context.Context, now time.Time) (renewed bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if current := k.x509.Load(); current != nil && inFirstHalf(current.Chain[0], now) && k.underWanted(current) {
		return false, nil
	}
	if k.external != nil {
		if err := k.renewFromUpstream(ctx, now); err != nil {
			return false, fmt.Errorf("renew the intermediate: %w", err)
		}
		return true, nil
	}
	if !k.HoldsRoot() {
		if err := k.recertify(ctx, now); err != nil {
			return false, fmt.Errorf("renew the intermediate: %w", err)
		}
		return true, nil
	}
	gen, err := k.makeIntermediate(now)
	if err != nil {
		return false, fmt.Errorf("make an intermediate: %w", err)
	}
	k.x509.Store(authorityOf(gen, k.root()))
	if err := k.dir.removeOlder(gen); err != nil {
		return true, fmt.Errorf("remove old intermediates: %w", err)
	}
	return true, nil
}

// inFirstHalf says whether cert need not be replaced yet. One that is not valid
// yet, made while the clock was ahead, must be.
func inFirstHalf(cert *x509.Certificate, now time.Time) bool {
	return !now.Before(cert.NotBefore) && !now.After(cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore)/2))
}

// keyID names a key by its contents, so that no two keys share one.
func keyID(signer crypto.Signer) (string, error) { return replica.KeyID(signer.Public()) }
