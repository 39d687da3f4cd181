// The settings of the public endpoint: where it is, and how its certificate comes.

package config

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/webcert"
	"merlon.dev/sdk/seal"
)

// BundleEndpoint is the endpoint for those who know nothing of SPIFFE yet: the trust
// bundle by the profile https_web, and OpenID Connect discovery where jwt_issuer is
// set. Either files or ACME give its certificate.
type BundleEndpoint struct {
	// Address is its host:port. Empty: there is no such endpoint.
	Address string `yaml:"address"`
	// CertFile and KeyFile are a certificate chain and its key in PEM. They are
	// read again when they change.
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	// ACME asks an ACME server for the certificate, by tls-alpn-01: the server has
	// to reach Address as port 443 of the domains.
	ACME *ACME `yaml:"acme"`
}

// ACME says who issues the endpoint's certificate.
type ACME struct {
	// Directory is the server's, https://….
	Directory string   `yaml:"directory"`
	Domains   []string `yaml:"domains"`
	Email     string   `yaml:"email"`
	// CAFile has the authorities of the server's own certificate in PEM. Default:
	// the system's.
	CAFile string `yaml:"ca_file"`
	// AcceptTerms says that you agree to the server's terms of service.
	AcceptTerms bool `yaml:"accept_terms"`
}

func (c Config) checkEndpoint() error {
	if err := c.BundleEndpoint.validate(); err != nil {
		return fmt.Errorf("bundle_endpoint.%w", err)
	}
	if c.JWTIssuer == "" {
		return nil
	}
	if c.BundleEndpoint.Address == "" {
		return errors.New("jwt_issuer: it needs bundle_endpoint.address, where its discovery document is served")
	}
	u, err := url.Parse(c.JWTIssuer)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.RawPath != "":
		return fmt.Errorf("jwt_issuer: %q is no https:// URL of a host, with at most a path (OpenID Connect Discovery 1.0 §3)", c.JWTIssuer)
	case strings.HasSuffix(c.JWTIssuer, "/") || strings.HasSuffix(c.JWTIssuer, "?") || strings.HasSuffix(c.JWTIssuer, "#"):
		return fmt.Errorf("jwt_issuer: %q: leave out the last character: relying parties compare it byte by byte", c.JWTIssuer)
	}
	return nil
}

func (e BundleEndpoint) validate() error {
	files := e.CertFile != "" || e.KeyFile != ""
	switch {
	case e.Address == "":
		if files || e.ACME != nil {
			return errors.New("address: is missing")
		}
		return nil
	case files && e.ACME != nil:
		return errors.New("acme: there is cert_file, too; choose one")
	case !files && e.ACME == nil:
		return errors.New("cert_file: is missing, and so is acme: one of the two gives the certificate")
	case files && (e.CertFile == "" || e.KeyFile == ""):
		return errors.New("key_file: cert_file and key_file go together")
	}
	if err := checkAddress(e.Address); err != nil {
		return fmt.Errorf("address: %q: %w", e.Address, err)
	}
	if e.ACME != nil {
		if err := e.ACME.validate(); err != nil {
			return fmt.Errorf("acme.%w", err)
		}
	}
	return nil
}

func (a *ACME) validate() error {
	u, err := url.Parse(a.Directory)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil:
		return fmt.Errorf("directory: %q is no https:// URL: give the one of your ACME server", a.Directory)
	case len(a.Domains) == 0:
		return errors.New("domains: is missing: name the hosts of the endpoint")
	case !a.AcceptTerms:
		return errors.New("accept_terms: has to be true: ACME servers serve those who agree to their terms")
	}
	for _, name := range a.Domains {
		if err := entry.CheckDNSName(name); err != nil || strings.HasPrefix(name, "*") {
			return fmt.Errorf("domains: %q is no host name (tls-alpn-01 knows no wildcards)", name)
		}
	}
	return nil
}

// endpointCertificate opens the endpoint's certificate.
func (c Config) endpointCertificate(log *slog.Logger) (webcert.Source, error) {
	e := c.BundleEndpoint
	if e.ACME == nil {
		files, err := webcert.OpenFiles(e.CertFile, e.KeyFile, log, time.Now())
		if err != nil {
			return nil, fmt.Errorf("bundle_endpoint: %w", err)
		}
		return files, nil
	}
	roots, err := readRoots(e.ACME.CAFile)
	if err != nil {
		return nil, fmt.Errorf("bundle_endpoint.acme.ca_file: %w", err)
	}
	kek, err := c.ReadKEK()
	if err != nil {
		return nil, fmt.Errorf("bundle_endpoint.acme: %w", err)
	}
	return webcert.NewACME(webcert.ACMEConfig{
		Directory: e.ACME.Directory, Domains: e.ACME.Domains, Email: e.ACME.Email, Roots: roots,
		Dir: filepath.Join(c.DataDir, "acme"), Key: kek,
	}), nil
}

// ReadKEK reads the key-encryption key; the one that no setting names is made where all
// keys of this CA lie in an HSM.
func (c Config) ReadKEK() (*seal.Key, error) {
	source, err := c.KEK()
	if err != nil {
		return nil, err
	}
	kek, err := seal.Read(source, c.DataDir)
	if errors.Is(err, seal.ErrNoKey) && source == (seal.Source{}) {
		if err := seal.Make(c.DataDir); err != nil {
			return nil, err
		}
		return seal.Read(source, c.DataDir)
	}
	return kek, err
}

// EndpointTLS is the configuration of the public endpoint.
func (c Config) EndpointTLS(log *slog.Logger) (*tls.Config, error) {
	source, err := c.endpointCertificate(log)
	if err != nil {
		return nil, err
	}
	return webcert.Config(source), nil
}
