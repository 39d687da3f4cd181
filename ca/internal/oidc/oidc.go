// Package oidc says who holds an OIDC token and in which roles that person or
// pipeline administers the CA, and for other ends what such a token claims. It trusts the configured issuers and nobody else:
// a token is looked at with the keys of the issuer that it names, if that is
// configured, and a provider is asked for nothing but its keys.
//
// A token is a bearer credential, so there is no nonce to check: that binds a
// login to a browser. What bounds a stolen one is that it names this CA alone as
// its audience and ends within a day.
package oidc

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"merlon.dev/ca/internal/role"
)

// Issuer is an OpenID provider whose tokens administer the CA.
type Issuer struct {
	// URL is the issuer as its tokens name it, https://….
	URL string
	// Audience is whom a token must be meant for, and for nobody else.
	Audience string
	// KeysURL is where the issuer's keys are, when they are not on its own host;
	// empty asks its discovery document.
	KeysURL string
	// KeysFile is a file with its keys (a JWKS); then nobody is asked.
	KeysFile string
	// Roots are the authorities of its TLS certificate; nil for the system's.
	Roots *x509.CertPool
	Rules []Rule
}

// Rule gives a role to the tokens in which all of the claims are as it says. A
// claim that is a list has to hold the text.
type Rule struct {
	Claims map[string]string
	Role   role.Role
}

// fixed are the claims that mean something already.
var fixed = []string{"iss", "aud", "exp", "nbf", "iat", "jti", "email_verified"}

// Validate says what is wrong with i as an issuer of administrators, naming the
// setting.
func (i Issuer) Validate() error {
	if err := i.ValidateSource(); err != nil {
		return err
	}
	if len(i.Rules) == 0 {
		return errors.New("roles: are missing: no token of this issuer would open anything")
	}
	for n, r := range i.Rules {
		if err := r.validate(); err != nil {
			return fmt.Errorf("roles[%d].%w", n, err)
		}
	}
	return nil
}

// ValidateSource says what is wrong with i apart from its rules.
func (i Issuer) ValidateSource() error {
	if err := checkURL(i.URL); err != nil {
		return fmt.Errorf("issuer: %q %w", i.URL, err)
	}
	if i.KeysURL != "" {
		if err := checkURL(i.KeysURL); err != nil {
			return fmt.Errorf("keys_url: %q %w", i.KeysURL, err)
		}
	}
	if i.Audience == "" {
		return errors.New("audience: is missing: tokens made for others would be taken")
	}
	return nil
}

func (r Rule) validate() error {
	if len(r.Claims) == 0 {
		return errors.New("claims: are missing: every token of the issuer would have the role")
	}
	for name, value := range r.Claims {
		if slices.Contains(fixed, name) {
			return fmt.Errorf("claims: %s is judged for every token already", name)
		}
		if name == "" || value == "" {
			return fmt.Errorf("claims: %q: %q: neither may be empty", name, value)
		}
	}
	if err := r.Role.CheckName(); err != nil {
		return fmt.Errorf("role: %w", err)
	}
	if err := r.Role.CheckPrefix(); err != nil {
		return fmt.Errorf("prefix: %w", err)
	}
	return nil
}

func checkURL(text string) error {
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Scheme != "https" || u.Hostname() == "":
		return errors.New("is not an https URL")
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(text, "#"):
		return errors.New("has more than host and path")
	}
	return nil
}

// Identity is who holds a token that was verified.
type Identity struct {
	Issuer, Subject string
	Expiry          time.Time
	// Roles are those of the rules that match, in their order, and Matched the
	// claims that those rules ask for.
	Roles   []role.Role
	Matched []map[string]string
}

// Name is the holder for audit and errors.
func (id Identity) Name() string { return id.Issuer + "#" + id.Subject }

// ErrUnavailable says that the keys of an issuer cannot be had now, so that its
// tokens are neither good nor bad.
var ErrUnavailable = errors.New("the keys of its issuer cannot be fetched now")

// Verifier judges tokens. It is safe for concurrent use and holds nothing open.
type Verifier struct{ issuers map[string]*issuer }

type issuer struct {
	Issuer
	keys *keySet
}

// New makes a verifier for issuers that are valid. It asks no provider for
// anything: the first token does.
func New(issuers []Issuer, log *slog.Logger) *Verifier {
	v := &Verifier{issuers: make(map[string]*issuer)}
	for _, i := range issuers {
		v.issuers[i.URL] = &issuer{i, newKeySet(i, log)}
	}
	return v
}

// Source verifies the tokens of one issuer for ends of others. It is safe for
// concurrent use and holds nothing open.
type Source struct{ issuer }

// NewSource makes a source of an issuer that ValidateSource takes.
func NewSource(i Issuer, log *slog.Logger) *Source { return &Source{issuer{i, newKeySet(i, log)}} }

// Claims returns what token claims, which holds at now; sub is a text. Errors are
// as those of Verify.
func (s *Source) Claims(ctx context.Context, token string, now time.Time) (map[string]any, error) {
	t, err := parse(token)
	if err != nil {
		return nil, err
	}
	claims, err := s.claims(ctx, t, now)
	if err != nil {
		return nil, err
	}
	_, err = s.judge(claims, now)
	return claims, err
}

// claims are those of a token that the issuer signed.
func (i *issuer) claims(ctx context.Context, t unverified, now time.Time) (map[string]any, error) {
	key, err := i.keys.find(ctx, t.kid, now)
	if err != nil {
		return nil, err
	}
	return t.verify(key)
}

// Verify says who holds token at now. The error is for its bearer: it says what
// is wrong with the token, and ErrUnavailable when that could not be found out.
func (v *Verifier) Verify(ctx context.Context, token string, now time.Time) (Identity, error) {
	t, err := parse(token)
	if err != nil {
		return Identity{}, err
	}
	iss, ok := v.issuers[t.issuer]
	if !ok {
		return Identity{}, errors.New("its issuer is not configured")
	}
	claims, err := iss.claims(ctx, t, now)
	if err != nil {
		return Identity{}, err
	}
	return iss.judge(claims, now)
}

// Still are the roles that rules of issuer give for exactly the claims in matched,
// which a token had earlier: what is left of its roles when only the configuration
// is asked.
func (v *Verifier) Still(issuer string, matched []map[string]string) (roles []role.Role) {
	i, ok := v.issuers[issuer]
	if !ok {
		return nil
	}
	for _, r := range i.Rules {
		if slices.ContainsFunc(matched, func(claims map[string]string) bool { return maps.Equal(claims, r.Claims) }) {
			roles = append(roles, r.Role)
		}
	}
	return roles
}

// matching are the roles of the rules that claims match, and what those ask for.
func (i Issuer) matching(claims map[string]any) (roles []role.Role, matched []map[string]string) {
	for _, r := range i.Rules {
		if !r.matches(claims) {
			continue
		}
		matched = append(matched, r.Claims)
		if !slices.Contains(roles, r.Role) {
			roles = append(roles, r.Role)
		}
	}
	return roles, matched
}

// matches: an address that nobody has verified is whatever its owner typed.
func (r Rule) matches(claims map[string]any) bool {
	for name, want := range r.Claims {
		if !holds(claims[name], want) || name == "email" && claims["email_verified"] != true {
			return false
		}
	}
	return len(r.Claims) > 0
}

func holds(claim any, want string) bool {
	switch claim := claim.(type) {
	case string:
		return claim == want
	case []any:
		return slices.Contains(claim, any(want))
	}
	return false
}
