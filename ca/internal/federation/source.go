// Package federation is how trust bundles come from other trust domains by themselves:
// where each is to be had and how its server is known (Source), what one operator
// hands another so that both need not write that down (Invite), and a client that
// takes nothing on trust (Fetch). The standard is SPIFFE Federation.
package federation

import (
	"cmp"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

// Profile is how a bundle endpoint proves who it is (SPIFFE Federation §5.2).
type Profile string

// The profiles. There is no default: nothing is inferred (§5.1).
const (
	Web    Profile = "https_web"
	SPIFFE Profile = "https_spiffe"
)

// SourcePrefix is where the store keeps sources, by name of the trust domain.
const SourcePrefix = "federation/source/"

const (
	sourceVersion  = 1
	maxURLBytes    = 2048
	maxAuthorities = 64 << 10
	maxFailure     = 500
	maxIgnored     = 16
)

// Without a hint a trust bundle is fetched every 5 minutes (SPIFFE Trust Domain and
// Bundle §6.1); hints count between PollLeast and PollMost.
const (
	PollDefault = 5 * time.Minute
	PollLeast   = 10 * time.Second
	PollMost    = time.Hour
)

// Source says where the trust bundle of a trust domain is to be had, and what became
// of that the last time. It is immutable.
type Source struct {
	TrustDomain spiffeid.TrustDomain
	URL         string
	Profile     Profile
	// EndpointID is the SPIFFE ID of a https_spiffe server.
	EndpointID spiffeid.ID
	// Authorities verify a https_web server, in PEM; empty: the system's do.
	Authorities string
	SetAt       time.Time

	Outcome
	// Revision is the store revision that wrote it.
	Revision uint64
}

// Outcome is what became of fetching. The zero value: it was not tried yet.
type Outcome struct {
	TriedAt time.Time `json:"tried_at"`
	// FetchedAt is when a document was last had that could be taken.
	FetchedAt time.Time `json:"fetched_at"`
	// RefreshHint is what that document said of how often to come back; 0: nothing.
	RefreshHint time.Duration `json:"refresh_hint,omitempty"`
	// Ignored says of the keys in that document that do not count, why.
	Ignored []string `json:"ignored,omitempty"`
	// Failure says why the last try failed; empty: it did not. Reason is the same in
	// one word, and FailingSince when it began.
	Failure      string    `json:"failure,omitempty"`
	Reason       string    `json:"reason,omitempty"`
	FailingSince time.Time `json:"failing_since"`
}

// After is the outcome of one more try at now, which got d or failed.
func (o Outcome) After(d *trust.Document, err error, now time.Time) Outcome {
	o.TriedAt = now.UTC()
	if err == nil {
		return Outcome{TriedAt: o.TriedAt, FetchedAt: o.TriedAt, RefreshHint: d.RefreshHint, Ignored: fewOf(d.Ignored)}
	}
	if o.Failure == "" {
		o.FailingSince = o.TriedAt
	}
	o.Failure, o.Reason = err.Error()[:min(len(err.Error()), maxFailure)], ReasonOf(err)
	return o
}

// fewOf is as much of why keys were ignored as is kept: the other side writes it.
func fewOf(ignored []string) []string {
	if n := len(ignored) - maxIgnored; n > 0 {
		return append(slices.Clone(ignored[:maxIgnored]), fmt.Sprintf("and %d more", n))
	}
	return ignored
}

// Interval is how long to wait before the next try: after a failure as long as after a
// success, since a server in trouble is not helped by more requests (§6.2).
func (o Outcome) Interval() time.Duration {
	return min(max(cmp.Or(o.RefreshHint, PollDefault), PollLeast), PollMost)
}

// Due is how long to wait at now for the next try: another replica, or this one before
// it was started anew, may have tried a moment ago.
func (o Outcome) Due(now time.Time) time.Duration {
	since := now.Sub(o.TriedAt)
	if since < 0 { // the clock was set
		return 0
	}
	return max(o.Interval()-since, 0)
}

type storedSource struct {
	Version     int       `json:"v"`
	URL         string    `json:"url"`
	Profile     Profile   `json:"profile"`
	EndpointID  string    `json:"endpoint_id,omitempty"`
	Authorities string    `json:"authorities,omitempty"`
	SetAt       time.Time `json:"set_at"`
	Outcome     Outcome   `json:"outcome"`
}

// Check says what is wrong with a source, naming the part.
func (s Source) Check() error {
	if err := CheckURL(s.URL); err != nil {
		return fmt.Errorf("url: %w", err)
	}
	switch s.Profile {
	case Web:
		if !s.EndpointID.IsZero() {
			return errors.New("endpoint_spiffe_id: a https_web server has a certificate of the web, and no SPIFFE ID")
		}
		_, err := s.roots()
		return err
	case SPIFFE:
		if s.EndpointID.Path() == "" {
			return errors.New("endpoint_spiffe_id: a https_spiffe server has one, such as spiffe://partner.test/ca; it is not inferred")
		}
		if s.Authorities != "" {
			return errors.New("web_authorities: a https_spiffe server is verified by its trust domain's trust bundle")
		}
		return nil
	}
	return fmt.Errorf("profile: %.40q is neither https_web nor https_spiffe; it is not inferred", s.Profile)
}

// CheckURL says why text is no URL of a bundle endpoint (SPIFFE Federation §5.2.1.1).
func CheckURL(text string) error {
	u, err := url.Parse(text)
	switch {
	case len(text) > maxURLBytes:
		return fmt.Errorf("it has %d bytes; at most %d", len(text), maxURLBytes)
	case err != nil:
		return errors.New("it is no URL")
	case u.Scheme != "https":
		return fmt.Errorf("%q does not begin with https://", text)
	case u.User != nil:
		return errors.New("it has a user name or password, which no bundle endpoint asks for")
	case u.Hostname() == "" || u.Opaque != "":
		return fmt.Errorf("%q names no host", text)
	case strings.Contains(text, "#"):
		return fmt.Errorf("%q has a fragment", text)
	case strings.ContainsFunc(u.Hostname(), func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		return fmt.Errorf("%q has a space in the name of the host", text)
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("%q has the port %s, and ports go from 1 to 65535", text, port)
		}
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil && !endpointAddress(ip) {
		return fmt.Errorf("%q: %s is no address of a bundle endpoint", text, ip)
	}
	return nil
}

// roots are the authorities of a https_web server; nil: the system's.
func (s Source) roots() (*x509.CertPool, error) {
	if s.Authorities == "" {
		return nil, nil
	}
	pool := x509.NewCertPool()
	if len(s.Authorities) > maxAuthorities || !pool.AppendCertsFromPEM([]byte(s.Authorities)) {
		return nil, errors.New("web_authorities: it holds no certificate in PEM, or is too large")
	}
	return pool, nil
}

// Put is the write that makes s the source of its trust domain.
func (s Source) Put() (store.Op, error) {
	stored := storedSource{sourceVersion, s.URL, s.Profile, "", s.Authorities, s.SetAt.UTC(), s.Outcome}
	if !s.EndpointID.IsZero() {
		stored.EndpointID = s.EndpointID.String()
	}
	value, err := json.Marshal(stored)
	if err != nil {
		return store.Op{}, fmt.Errorf("encode the source of %s: %w", s.TrustDomain, err)
	}
	return store.Put(SourcePrefix+s.TrustDomain.Name(), value), nil
}

// DecodeSource reads the store's record.
func DecodeSource(kv store.KV) (*Source, error) {
	td, err := trustDomainOf(kv.Key, SourcePrefix)
	if err != nil {
		return nil, err
	}
	var stored storedSource
	if err := decode(kv, &stored); err != nil {
		return nil, err
	}
	if stored.Version != sourceVersion {
		return nil, fmt.Errorf("decode %s: version %d is not known", kv.Key, stored.Version)
	}
	s := &Source{
		TrustDomain: td, URL: stored.URL, Profile: stored.Profile, Authorities: stored.Authorities, SetAt: stored.SetAt,
		Outcome: stored.Outcome, Revision: kv.ModRevision,
	}
	if stored.EndpointID != "" {
		if s.EndpointID, err = spiffeid.FromString(stored.EndpointID); err != nil {
			return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
		}
	}
	if err := s.Check(); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	return s, nil
}

func trustDomainOf(key, prefix string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(key[min(len(prefix), len(key)):])
	if err != nil || prefix+td.Name() != key {
		return td, fmt.Errorf("decode %s: it names no trust domain", key)
	}
	return td, nil
}

func decode(kv store.KV, to any) error {
	if err := json.Unmarshal(kv.Value, to); err != nil {
		return fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	return nil
}
