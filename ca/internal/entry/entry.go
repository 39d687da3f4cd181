// Package entry holds registration entries: which selectors, under which
// agent, get which SPIFFE ID. It is pure: it decides what an entry may say and
// how it is written down, and neither stores nor issues anything.
package entry

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/role"
)

// Limits of an entry.
const (
	// MinTTL is the shortest life of an SVID that can be asked for.
	MinTTL = time.Second
	// MaxX509SVIDTTL and MaxJWTSVIDTTL are the longest. Revocation records
	// live as long as the longest of all, so raising them makes records live
	// longer.
	MaxX509SVIDTTL = 24 * time.Hour
	MaxJWTSVIDTTL  = time.Hour
	// MaxSVIDTTL is the longest life of any SVID.
	MaxSVIDTTL = MaxX509SVIDTTL

	maxIDBytes          = 2048 // SPIFFE-ID §2.3
	maxTrustDomainBytes = 255  // SPIFFE-ID §2.3
	maxSelectors        = 64
	maxDNSNames         = 64
	maxDNSNameBytes     = 253
	maxCommonNameBytes  = 64 // ub-common-name, RFC 5280 appendix A
	maxHintBytes        = 1024
	maxFederatesWith    = 64
)

// Entry is a registration entry. The zero value is invalid and matches
// nothing.
type Entry struct {
	// ID is made by the CA: 32 lower-case hex digits.
	ID       string
	SPIFFEID spiffeid.ID
	// ParentID is the agent on whose node the workload runs, or an alias of nodes.
	ParentID  spiffeid.ID
	Selectors []Selector
	// X509SVIDTTL and JWTSVIDTTL: zero means the CA's default.
	X509SVIDTTL time.Duration
	JWTSVIDTTL  time.Duration
	DNSNames    []string
	// CommonName is the subject's, for software that cannot read URI SANs.
	CommonName string
	Hint       string
	// KeyDelivery says who makes the key of its X509-SVIDs.
	KeyDelivery KeyDelivery
	// FederatesWith names the other trust domains whose SVIDs the workload can
	// verify, where the CA has their trust bundles.
	FederatesWith []string
	// Role lets the workload administer the CA; zero does not.
	Role role.Role
	// ExpiresAt is when the entry stops to hold; zero for never.
	ExpiresAt time.Time
	// Revision is the store revision of the last change; it is not part of the
	// encoding.
	Revision  uint64
	CreatedAt time.Time
}

// KeyDelivery says who makes the key of a workload's X509-SVIDs, and with it which
// call gives them out. It is the agent that keeps to it.
type KeyDelivery string

// The ways of a key.
const (
	// ByAgent: the agent makes it and hands it over, as the SPIFFE Workload API has it.
	ByAgent KeyDelivery = ""
	// ByWorkload: the workload makes it, shows a CSR, and never gives it away.
	ByWorkload KeyDelivery = "workload"
	// ByEither: as the workload asks.
	ByEither KeyDelivery = "both"
)

// InvalidError reports a registration entry, or another thing an operator
// asked for, that the CA refuses to store.
type InvalidError struct {
	Field  string // as spelled in the API, e.g. "selectors"
	Reason string
}

// Error implements error.
func (e *InvalidError) Error() string { return e.Field + ": " + e.Reason }

func invalid(field, format string, args ...any) *InvalidError {
	return &InvalidError{Field: field, Reason: fmt.Sprintf(format, args...)}
}

// NewID returns a random entry ID.
func NewID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

// ValidID says whether id looks like the ID of an entry.
func ValidID(id string) bool {
	if len(id) != 32 {
		return false
	}
	return strings.Trim(id, "0123456789abcdef") == ""
}

// Expired says whether the entry does not hold any more at now.
func (e *Entry) Expired(now time.Time) bool {
	return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt)
}

// X509TTL is how long an X509-SVID for the entry lives that is issued at now:
// never past the end of the entry. def is the CA's default. Zero or less means
// that the entry has expired.
func (e *Entry) X509TTL(now time.Time, def time.Duration) time.Duration {
	return e.ttl(now, e.X509SVIDTTL, def)
}

// AskedX509TTL is how long an X509-SVID for the entry should live.
func (e *Entry) AskedX509TTL(def time.Duration) time.Duration {
	if e.X509SVIDTTL != 0 {
		return e.X509SVIDTTL
	}
	return def
}

// JWTTTL is X509TTL for JWT-SVIDs.
func (e *Entry) JWTTTL(now time.Time, def time.Duration) time.Duration {
	return e.ttl(now, e.JWTSVIDTTL, def)
}

func (e *Entry) ttl(now time.Time, own, def time.Duration) time.Duration {
	ttl := own
	if ttl == 0 {
		ttl = def
	}
	if !e.ExpiresAt.IsZero() {
		ttl = min(ttl, e.ExpiresAt.Sub(now))
	}
	return ttl
}

// Validate says why the CA of trust domain td must not store e at now, as an
// *InvalidError. ID, Revision and CreatedAt are the CA's own and not looked at.
func (e *Entry) Validate(td spiffeid.TrustDomain, now time.Time) error {
	if e.Alias() {
		if err := e.validateAlias(td, now); err != nil {
			return err
		}
		return nil
	}
	for _, check := range []func() *InvalidError{
		func() *InvalidError { return checkWorkloadID("spiffe_id", e.SPIFFEID, td) },
		func() *InvalidError { return checkParent(e.ParentID, td) },
		func() *InvalidError { return checkWorkloadSelectors(e.Selectors) },
		func() *InvalidError { return checkTTL("x509_svid_ttl_seconds", e.X509SVIDTTL, MaxX509SVIDTTL) },
		func() *InvalidError { return checkTTL("jwt_svid_ttl_seconds", e.JWTSVIDTTL, MaxJWTSVIDTTL) },
		func() *InvalidError { return checkDNSNames(e.DNSNames) },
		func() *InvalidError { return checkCommonName(e.CommonName) },
		func() *InvalidError { return checkText("hint", e.Hint, maxHintBytes) },
		func() *InvalidError { return checkKeyDelivery(e.KeyDelivery) },
		func() *InvalidError { return checkFederatesWith(e.FederatesWith, td) },
		func() *InvalidError { return checkRole(e.Role) },
		func() *InvalidError { return e.checkExpiry(now) },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (e *Entry) checkExpiry(now time.Time) *InvalidError {
	if e.Expired(now) {
		return invalid("expires_at", "%s is not in the future", e.ExpiresAt.UTC().Format(time.RFC3339))
	}
	if y := e.ExpiresAt.Year(); !e.ExpiresAt.IsZero() && y > 9999 {
		return invalid("expires_at", "year %d is after 9999", y)
	}
	return nil
}

func checkTTL(field string, ttl, longest time.Duration) *InvalidError {
	if ttl != 0 && (ttl < MinTTL || ttl > longest) {
		return invalid(field, "%s is not between %s and %s (0 for the default)", ttl, MinTTL, longest)
	}
	return nil
}

// TTLFromSeconds converts seconds as they come over the wire; what no duration
// can hold is an *InvalidError naming field.
func TTLFromSeconds(field string, seconds int64) (time.Duration, error) {
	if seconds < 0 || seconds > int64(MaxSVIDTTL/time.Second) {
		return 0, invalid(field, "%d seconds is not between 0 and %d", seconds, int64(MaxSVIDTTL/time.Second))
	}
	return time.Duration(seconds) * time.Second, nil
}

func checkKeyDelivery(d KeyDelivery) *InvalidError {
	switch d {
	case ByAgent, ByWorkload, ByEither:
		return nil
	}
	return invalid("key_delivery", "%q is not known", d)
}

func checkRole(r role.Role) *InvalidError {
	if r == (role.Role{}) {
		return nil
	}
	if err := r.CheckName(); err != nil {
		return invalid("role", "%v", err)
	}
	if err := r.CheckPrefix(); err != nil {
		return invalid("role_prefix", "%v", err)
	}
	return nil
}

func checkCommonName(cn string) *InvalidError {
	if strings.TrimSpace(cn) != cn {
		return invalid("common_name", "%q has space around it", cn)
	}
	return checkText("common_name", cn, maxCommonNameBytes)
}

// checkText refuses what could forge a second line in a log or a table
// (SECURITY.md T36).
func checkText(field, s string, longest int) *InvalidError {
	if len(s) > longest {
		return invalid(field, "has %d bytes; at most %d", len(s), longest)
	}
	if !utf8.ValidString(s) {
		return invalid(field, "is not valid UTF-8")
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return invalid(field, "holds the unprintable character %U", r)
		}
	}
	return nil
}

// checkDNSNames takes host names as in RFC 1123 in lower case. No wildcards:
// an SVID that speaks for every host below a name has no owner.
func checkDNSNames(names []string) *InvalidError {
	if len(names) > maxDNSNames {
		return invalid("dns_names", "holds %d names; at most %d", len(names), maxDNSNames)
	}
	seen := make(map[string]bool, len(names))
	for _, name := range names {
		if reason := dnsNameFault(name); reason != "" {
			return invalid("dns_names", "%q %s", name, reason)
		}
		if seen[name] {
			return invalid("dns_names", "%q is there twice", name)
		}
		seen[name] = true
	}
	return nil
}

// CheckDNSName says why name cannot be a DNS SAN, as an *InvalidError.
func CheckDNSName(name string) error {
	if err := checkDNSNames([]string{name}); err != nil {
		return err
	}
	return nil
}

func dnsNameFault(name string) string {
	if name == "" {
		return "is empty"
	}
	if len(name) > maxDNSNameBytes {
		return fmt.Sprintf("has %d bytes; at most %d", len(name), maxDNSNameBytes)
	}
	labels := strings.Split(name, ".")
	for _, label := range labels {
		switch {
		case label == "":
			return "has an empty label"
		case len(label) > 63:
			return "has a label of more than 63 bytes"
		case label[0] == '-' || label[len(label)-1] == '-':
			return "has a label that begins or ends with a hyphen"
		}
		if i := strings.IndexFunc(label, notHostRune); i >= 0 {
			return "is not a host name: only a-z, 0-9, hyphens and dots"
		}
	}
	if last := labels[len(labels)-1]; strings.Trim(last, "0123456789") == "" {
		return "looks like an IP address"
	}
	return ""
}

func notHostRune(r rune) bool {
	return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
}
