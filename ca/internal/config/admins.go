// The settings of administrators: which users of this machine and which OIDC
// tokens have which role. Workloads have theirs by registration entry.

package config

import (
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"merlon.dev/ca/internal/oidc"
	"merlon.dev/ca/internal/role"
	"merlon.dev/sdk/unixsock"
)

// maxCAFile bounds what is read of a file with certificates.
const maxCAFile = 1 << 20

// Admin is a user of this machine who may use the admin socket.
type Admin struct {
	UID uint32 `yaml:"uid"`
	// Role is viewer, registrar, policy-publisher or operator.
	Role string `yaml:"role"`
	// Prefix is the path at or below which the SPIFFE IDs of a registrar lie,
	// such as "/ns/shop".
	Prefix string `yaml:"prefix"`
}

// OIDC is a provider whose tokens administer the CA on its gRPC and HTTPS ports.
type OIDC struct {
	// Issuer is the provider as its tokens name it, https://….
	Issuer string `yaml:"issuer"`
	// Audience is whom a token must be meant for, and for nobody else.
	Audience string `yaml:"audience"`
	// KeysURL is where the provider's keys are, when they are not on its own
	// host. Default: what its discovery document says.
	KeysURL string `yaml:"keys_url"`
	// CAFile is a PEM file with the authorities of the provider's TLS certificate.
	// Default: the system's.
	CAFile string `yaml:"ca_file"`
	// Roles say which of its tokens have a role. A token has those of all that
	// match.
	Roles []OIDCRole `yaml:"roles"`
}

// OIDCRole gives a role to the tokens with all of the claims. A claim that is a
// list has to hold the value; email counts only when it is verified.
type OIDCRole struct {
	Claims map[string]string `yaml:"claims"`
	Role   string            `yaml:"role"`
	Prefix string            `yaml:"prefix"`
}

func (c Config) checkAdmins() error {
	if _, err := c.UIDRoles(); err != nil {
		return err
	}
	seen := make(map[string]bool)
	for n, o := range c.OIDC {
		if err := o.issuer(nil).Validate(); err != nil {
			return fmt.Errorf("oidc[%d].%w", n, err)
		}
		if seen[o.Issuer] {
			return fmt.Errorf("oidc[%d].issuer: %q is there twice", n, o.Issuer)
		}
		seen[o.Issuer] = true
	}
	return nil
}

// UIDRoles are admin_uids and admins together.
func (c Config) UIDRoles() (map[uint32]role.Role, error) {
	roles := make(map[uint32]role.Role)
	for _, uid := range c.AdminUIDs {
		roles[uid] = role.Role{Name: role.Operator}
	}
	for n, a := range c.Admins {
		r := role.Role{Name: role.Name(a.Role), Prefix: a.Prefix}
		if err := r.CheckName(); err != nil {
			return nil, fmt.Errorf("admins[%d].role: %w", n, err)
		}
		if err := r.CheckPrefix(); err != nil {
			return nil, fmt.Errorf("admins[%d].prefix: %w", n, err)
		}
		if a.UID == 0 {
			return nil, fmt.Errorf("admins[%d].uid: is 0 or missing; root is an operator whatever is configured", n)
		}
		if _, twice := roles[a.UID]; twice {
			return nil, fmt.Errorf("admins[%d].uid: %d has a role already", n, a.UID)
		}
		roles[a.UID] = r
	}
	return roles, nil
}

func (o OIDC) issuer(roots *x509.CertPool) oidc.Issuer {
	i := oidc.Issuer{URL: o.Issuer, Audience: o.Audience, KeysURL: o.KeysURL, Roots: roots}
	for _, r := range o.Roles {
		i.Rules = append(i.Rules, oidc.Rule{Claims: r.Claims, Role: role.Role{Name: role.Name(r.Role), Prefix: r.Prefix}})
	}
	return i
}

// AdminTokens judges the tokens of the configured providers; nil: there is none.
func (c Config) AdminTokens(log *slog.Logger) (*oidc.Verifier, error) {
	var issuers []oidc.Issuer
	for n, o := range c.OIDC {
		roots, err := readRoots(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("oidc[%d].ca_file: %w", n, err)
		}
		issuers = append(issuers, o.issuer(roots))
	}
	if len(issuers) == 0 {
		return nil, nil
	}
	return oidc.New(issuers, log), nil
}

func readRoots(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if len(data) > maxCAFile || !roots.AppendCertsFromPEM(data) {
		return nil, errors.New("holds no certificate in PEM, or is too large")
	}
	return roots, nil
}

// AdminAccess lets other users reach the admin socket only where some of them
// are administrators; the server then asks each who it is.
func (c Config) AdminAccess() unixsock.Access {
	if len(c.AdminUIDs)+len(c.Admins) > 0 {
		return unixsock.Shared
	}
	return unixsock.Private
}
