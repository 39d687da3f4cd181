// An upstream authority: a CA of somebody else's that signs our intermediates, by
// smallstep's CAS interface. Its root is what our SVIDs are verified with. The root
// that is made here all the same vouches for policy keys and is in no trust bundle.
// What the upstream returns is judged before it is used: it is a service, with
// templates and policies of its own.

package upstream

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
	"go.step.sm/crypto/kms"
	kmsapi "go.step.sm/crypto/kms/apiv1"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/durable"
)

// Types of upstream authorities.
const (
	UpstreamDisk  = "disk"
	UpstreamStep  = "stepcas"
	UpstreamVault = "vaultcas"
	UpstreamCloud = "cloudcas"
)

// externalRootTTL is the life of our own root below an upstream authority.
const externalRootTTL = 10 * 365 * 24 * time.Hour

// Errors of upstream authorities.
var (
	// ErrUpstreamNotBuilt is returned for a type that this binary does not know.
	ErrUpstreamNotBuilt = errors.New("this merlon-ca was built without it")
	// ErrUpstreamAway is returned when there is no intermediate, and none to be had.
	ErrUpstreamAway = errors.New("the upstream authority gives no intermediate")
	// ErrUpstreamAnswer is returned for an intermediate that is of no use.
	ErrUpstreamAnswer = errors.New("what the upstream authority signed cannot be used")
	// ErrOtherUpstream is returned for keys of a CA with another root.
	ErrOtherUpstream = errors.New("the intermediate here is of another root")
)

// AuthorityConfig says who signs the intermediates of this CA. Zero: its own root.
type AuthorityConfig struct {
	// Type is disk, stepcas, vaultcas or cloudcas.
	Type string
	// RootFile holds the root, in PEM, to which everything must chain.
	RootFile string
	// Address is the URL of step-ca or Vault, or the resource name of a Google CA.
	Address string
	// CertFile and KeyFile are the certificate, with what is above it, and the key
	// of the CA on disk, or those of step-ca's provisioner: X5C with a certificate,
	// JWK without.
	CertFile, KeyFile string
	// Provisioner is the name of step-ca's, PasswordFile opens its key.
	Provisioner, PasswordFile string
	// ConfigFile is the JSON of vaultcas, or Google's credentials.
	ConfigFile string
}

var upstreamBuild = map[string]string{
	UpstreamStep:  "go build -C ca/cmd/merlon-ca-full -tags stepcas",
	UpstreamVault: "go build -C ca/cmd/merlon-ca-full -tags vaultcas",
	UpstreamCloud: "go build -C ca/cmd/merlon-ca-full -tags cloudcas",
}

// Validate says what is wrong with c.
func (c AuthorityConfig) Validate() error {
	if c == (AuthorityConfig{}) {
		return nil
	}
	needs := map[string][]struct{ key, value string }{
		UpstreamDisk:  {{"cert_file", c.CertFile}, {"key_file", c.KeyFile}},
		UpstreamStep:  {{"address", c.Address}, {"key_file", c.KeyFile}, {"provisioner", c.Provisioner}},
		UpstreamVault: {{"address", c.Address}, {"config_file", c.ConfigFile}},
		UpstreamCloud: {{"address", c.Address}},
	}
	required, ok := needs[c.Type]
	if !ok {
		return fmt.Errorf("upstream: %q is none of merlon, disk, stepcas, vaultcas, cloudcas", c.Type)
	}
	for _, need := range required {
		if need.value == "" {
			return fmt.Errorf("upstream_%s: is missing, with upstream %s", need.key, c.Type)
		}
	}
	if c.RootFile == "" {
		return errors.New("upstream_root_file: is missing: it holds the root that SVIDs are verified with")
	}
	return nil
}

// external is an upstream authority.
type external struct {
	cfg  AuthorityConfig
	root *x509.Certificate
	busy chan struct{} // holds a token while a call is under way
}

// openExternal reads the root; the upstream itself is asked when it is needed.
func openExternal(cfg AuthorityConfig) (*external, error) {
	if err := cfg.Validate(); err != nil || cfg.Type == "" {
		return nil, err
	}
	roots, err := readCerts(cfg.RootFile)
	switch {
	case err != nil:
		return nil, fmt.Errorf("upstream_root_file: %w", err)
	case len(roots) != 1:
		return nil, fmt.Errorf("upstream_root_file: %s holds %d certificates; want the root alone", cfg.RootFile, len(roots))
	}
	if _, ok := apiv1.LoadCertificateAuthorityServiceNewFunc(apiv1.Type(cfg.casType())); !ok {
		return nil, fmt.Errorf("upstream %s: %w: %s", cfg.Type, ErrUpstreamNotBuilt, upstreamBuild[cfg.Type])
	}
	return &external{cfg: cfg, root: roots[0], busy: make(chan struct{}, 1)}, nil
}

func (c AuthorityConfig) casType() string {
	if c.Type == UpstreamDisk {
		return apiv1.SoftCAS
	}
	return c.Type
}

func readCerts(path string) (certs []*x509.Certificate, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%s holds no certificate in PEM", path)
	}
	return certs, nil
}

// signed is what an upstream made: a certificate, and what is above it.
type signed struct {
	cert  *x509.Certificate
	above []*x509.Certificate
	err   error
}

// sign asks for a certificate for the key of signer. The CAS interface knows no
// context: a call that hangs is left behind, and no other begins meanwhile.
func (e *external) sign(ctx context.Context, template *x509.Certificate, signer crypto.Signer) (signed, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: template.Subject, URIs: template.URIs}, signer)
	if err != nil {
		return signed{}, fmt.Errorf("make a CSR: %w", err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return signed{}, fmt.Errorf("make a CSR: %w", err)
	}
	template.PublicKey = signer.Public()
	select {
	case e.busy <- struct{}{}:
	default:
		return signed{}, errors.New("it has not answered the call before this one")
	}
	answer := make(chan signed, 1)
	go func() {
		defer func() { <-e.busy }()
		answer <- e.ask(template, csr) //nolint:contextcheck // see above
	}()
	select {
	case s := <-answer:
		return s, s.err
	case <-ctx.Done():
		return signed{}, fmt.Errorf("it does not answer: %w", context.Cause(ctx))
	}
}

func (e *external) ask(template *x509.Certificate, csr *x509.CertificateRequest) signed {
	options, err := e.options()
	if err != nil {
		return signed{err: err}
	}
	open, ok := apiv1.LoadCertificateAuthorityServiceNewFunc(apiv1.Type(options.Type))
	if !ok {
		return signed{err: ErrUpstreamNotBuilt}
	}
	// Made anew each time: stepcas already speaks to step-ca here, and files change.
	service, err := open(context.Background(), options)
	if err != nil {
		return signed{err: err}
	}
	got, err := service.CreateCertificate(&apiv1.CreateCertificateRequest{
		Template: template, CSR: csr, Lifetime: template.NotAfter.Sub(template.NotBefore) - authority.Backdate, Backdate: authority.Backdate,
	})
	if err != nil {
		return signed{err: err}
	}
	return signed{cert: got.Certificate, above: got.CertificateChain}
}

// options are the settings in smallstep's words.
func (e *external) options() (apiv1.Options, error) {
	fingerprint := sha256.Sum256(e.root.Raw)
	options := apiv1.Options{
		Type: e.cfg.casType(), CertificateAuthority: e.cfg.Address, CertificateAuthorityFingerprint: hex.EncodeToString(fingerprint[:]),
	}
	switch e.cfg.Type {
	case UpstreamDisk:
		return options, e.readDisk(&options)
	case UpstreamStep:
		issuer := &apiv1.CertificateIssuer{Type: "jwk", Provisioner: e.cfg.Provisioner, Certificate: e.cfg.CertFile, Key: e.cfg.KeyFile}
		if e.cfg.CertFile != "" {
			issuer.Type = "x5c"
		}
		if e.cfg.PasswordFile != "" {
			password, err := durable.ReadGuarded(e.cfg.PasswordFile, 0o600, maxSecret)
			if err != nil {
				return options, fmt.Errorf("upstream_password_file: %w", err)
			}
			issuer.Password = string(bytes.TrimRight(password, "\r\n"))
		}
		options.CertificateIssuer = issuer
	case UpstreamVault:
		config, err := durable.ReadGuarded(e.cfg.ConfigFile, 0o600, maxPEM)
		if err != nil {
			return options, fmt.Errorf("upstream_config_file: %w", err)
		}
		options.Config = config
	case UpstreamCloud:
		options.CredentialsFile = e.cfg.ConfigFile
	}
	return options, nil
}

// UpstreamFault says why what the upstream authority needs here cannot be used: the
// files that are read for each intermediate. It does not ask the upstream.
func (k *Keys) UpstreamFault() error {
	if k.external == nil {
		return nil
	}
	if _, err := k.external.options(); err != nil {
		return fmt.Errorf("the next intermediate could not be signed: %w", err)
	}
	return nil
}

func (e *external) readDisk(options *apiv1.Options) error {
	chain, err := readCerts(e.cfg.CertFile)
	if err != nil {
		return fmt.Errorf("upstream_cert_file: %w", err)
	}
	text, err := durable.ReadGuarded(e.cfg.KeyFile, 0o600, maxPEM)
	if err != nil {
		return fmt.Errorf("upstream_key_file: %w", err)
	}
	signer, err := kms.Default.CreateSigner(&kmsapi.CreateSignerRequest{SigningKeyPEM: text})
	if err != nil {
		return fmt.Errorf("upstream_key_file: %w", err)
	}
	if key, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(chain[0].PublicKey) {
		return fmt.Errorf("upstream_key_file: it is not the key of the first certificate in %s", e.cfg.CertFile)
	}
	options.CertificateChain, options.Signer = chain, signer
	return nil
}

// path orders what leads from cert to the root: above it, the root last.
func (e *external) path(s signed) ([]*x509.Certificate, error) {
	var path []*x509.Certificate
	for last := s.cert; last.CheckSignatureFrom(e.root) != nil; {
		i := slices.IndexFunc(s.above, func(c *x509.Certificate) bool {
			return !slices.ContainsFunc(path, c.Equal) && last.CheckSignatureFrom(c) == nil
		})
		if i < 0 {
			return nil, fmt.Errorf("it does not chain to the root in %s (%s): set upstream_root_file to the root of this upstream", e.cfg.RootFile, e.root.Subject)
		}
		last = s.above[i]
		path = append(path, last)
	}
	return append(path, e.root), nil
}
