// What may be asked for: names, lifetime and key of an X509-SVID.

package authority

import (
	"errors"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
)

// MaxTTL bounds what a configuration mistake can issue. Entries are held to
// tighter limits by the CA.
const MaxTTL = 7 * 24 * time.Hour

func checkLeafRequest(req LeafRequest, td spiffeid.TrustDomain) error {
	if err := checkSubject(req.SPIFFEID, td); err != nil {
		return err
	}
	if err := checkKey("public_key", req.PublicKey); err != nil {
		return err
	}
	if err := checkSerial(req.Serial); err != nil {
		return err
	}
	if err := checkLifetime(req.TTL, req.Now); err != nil {
		return err
	}
	if err := checkCommonName(req.CommonName); err != nil {
		return err
	}
	seen := make(map[string]bool, len(req.DNSNames))
	for _, name := range req.DNSNames {
		if err := checkDNSName(name); err != nil {
			return err
		}
		if seen[strings.ToLower(name)] {
			return invalid("dns_names", "%q occurs twice", name)
		}
		seen[strings.ToLower(name)] = true
	}
	return nil
}

// checkSubject: a workload of this trust domain (X3, ID6), or the authority would
// speak for others.
func checkSubject(id spiffeid.ID, td spiffeid.TrustDomain) error {
	switch {
	case id.IsZero():
		return invalid("spiffe_id", "is missing")
	case id.Path() == "":
		return invalid("spiffe_id", "%q has no path, so it names a trust domain", id)
	case id.TrustDomain() != td:
		return invalid("spiffe_id", "%q is not of the trust domain %s", id, td)
	case len(id.String()) > svid.MaxIDBytes:
		return invalid("spiffe_id", "has %d bytes; the longest has %d", len(id.String()), svid.MaxIDBytes)
	}
	return nil
}

func checkSerial(s svid.Serial) error {
	if s.Random == 0 || s.Agent > svid.MaxAgent || s.Realm > svid.MaxRealm || s.Revision > svid.MaxRevision {
		return invalid("serial", "was not made by svid.NewSerial")
	}
	return nil
}

func checkLifetime(ttl time.Duration, now time.Time) error {
	switch {
	case now.IsZero():
		return invalid("now", "is missing")
	case ttl < time.Second:
		return invalid("ttl", "%s is shorter than 1s", ttl)
	case ttl > MaxTTL:
		return invalid("ttl", "%s is longer than %s", ttl, MaxTTL)
	}
	return nil
}

// checkCommonName: RFC 5280 appendix A.1 allows 64 characters.
func checkCommonName(cn string) error {
	switch {
	case cn == "":
		return nil
	case !utf8.ValidString(cn) || utf8.RuneCountInString(cn) > 64:
		return invalid("common_name", "has more than 64 characters or is not UTF-8")
	case strings.ContainsFunc(cn, func(r rune) bool { return !unicode.IsPrint(r) }) || strings.TrimSpace(cn) != cn:
		return invalid("common_name", "%q has control characters or space around it", cn)
	}
	return nil
}

// checkDNSName takes exact host names only: a wildcard in an identity speaks for
// names that nobody registered.
func checkDNSName(name string) error {
	if name == "" || len(name) > 253 {
		return invalid("dns_names", "%q does not have 1 to 253 characters", name)
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return invalid("dns_names", "%q is an IP address", name)
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-") {
			return invalid("dns_names", "%q is not a host name", name)
		}
		if i := strings.IndexFunc(label, func(r rune) bool { return !hostRune(r) }); i >= 0 {
			return invalid("dns_names", "%q is not a host name", name)
		}
	}
	return nil
}

func hostRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_'
}

// checkText stops text that would read differently elsewhere: encoding/json
// replaces what is not UTF-8.
func checkText(s string) error {
	if !utf8.ValidString(s) {
		return errors.New("not UTF-8")
	}
	if strings.ContainsFunc(s, unicode.IsControl) {
		return errors.New("has control characters")
	}
	return nil
}
