// The client of bundle endpoints. Whoever answers may be hostile, or a machine in the
// middle that cannot sign: nothing of an answer is taken that the standard does not
// give, and no answer costs more than a bounded time and memory (SECURITY.md T23, T40).

package federation

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

const (
	// FetchTimeout bounds one fetch, redirects and a slow body included.
	FetchTimeout = 20 * time.Second
	dialTimeout  = 5 * time.Second
	maxRedirects = 3
	maxHeader    = 16 << 10
)

// Error is why a bundle could not be had. Reason is one of a few words, for metrics.
type Error struct {
	Reason string
	Err    error
}

// Error implements error. Much of it the other side has written, so what could forge a
// line or move a cursor is quoted (SECURITY.md T36).
func (e *Error) Error() string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, e.Err.Error())
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

func failure(reason, format string, args ...any) error {
	return &Error{reason, fmt.Errorf(format, args...)}
}

// Reasons of an Error.
const (
	Unreachable = "unreachable"
	Untrusted   = "untrusted" // the server is not who it should be
	Redirected  = "redirect"
	BadStatus   = "status"
	TooLarge    = "too_large"
	Refused     = "refused" // the document; what could be an attack has a word of its own:
	OwnKey      = "own_key" // it has a key of our own trust domain
	// It is not later than what is known.
	Older        = trust.Older
	SameSequence = trust.SameSequence
	NoSequence   = trust.NoSequence
	Ended        = trust.Ended
)

// ReasonOf is the reason of err in one word: "ok" for none, "error" for what is no
// *Error.
func ReasonOf(err error) string {
	failed, ok := errors.AsType[*Error](err)
	switch {
	case err == nil:
		return "ok"
	case ok:
		return failed.Reason
	}
	return "error"
}

// Fetch gets the document of s. verifiers has the trust bundle that verifies a
// https_spiffe server: always the latest one that is known (§5.2.2.4). It sends no
// credential, and follows temporary redirects only, whose targets are held to the same
// rules and are not remembered (§5.2.1.4).
func Fetch(ctx context.Context, s *Source, verifiers x509bundle.Source) ([]byte, error) {
	return fetchWithin(ctx, FetchTimeout, s, verifiers)
}

func fetchWithin(ctx context.Context, most time.Duration, s *Source, verifiers x509bundle.Source) ([]byte, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	config, err := s.tls(verifiers)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	next, err := url.Parse(s.URL)
	if err != nil {
		return nil, err
	}
	first := next.Host
	for range maxRedirects + 1 {
		body, target, err := get(ctx, next, config, next.Host != first)
		if err != nil || target == nil {
			return body, err
		}
		if err := CheckURL(target.String()); err != nil {
			return nil, failure(Redirected, "%s redirects to an address that no bundle endpoint has: %w", next.Host, err)
		}
		next = target
	}
	return nil, failure(Redirected, "%s redirects more than %d times", first, maxRedirects)
}

// get makes one request. target is where it redirects to. guarded: the address must be
// one of the internet, since the other side, and not an operator, has named it.
func get(ctx context.Context, u *url.URL, config *tls.Config, guarded bool) (body []byte, target *url.URL, err error) {
	dialer := &net.Dialer{Timeout: dialTimeout, Control: notLinkLocal}
	if guarded {
		dialer.Control = publicOnly
	}
	transport := &http.Transport{
		DialContext: dialer.DialContext, TLSClientConfig: config, TLSHandshakeTimeout: dialTimeout,
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeader,
	}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "merlon-ca")
	res, err := transport.RoundTrip(req)
	if err != nil {
		return nil, nil, classify(u, err)
	}
	defer res.Body.Close()
	switch res.StatusCode {
	case http.StatusOK:
		body, err = read(res)
		return body, nil, err
	case http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect:
		target, err = res.Location()
		if err != nil {
			return nil, nil, failure(Redirected, "%s redirects to nowhere", u.Host)
		}
		return nil, target, nil
	case http.StatusMovedPermanently, http.StatusPermanentRedirect:
		return nil, nil, failure(Redirected, "%s has moved for good, to %.200q: that is not followed; ask the other side, and set the new URL", u.Host, res.Header.Get("Location"))
	}
	return nil, nil, failure(BadStatus, "%s answers %d, not 200", u.Host, res.StatusCode)
}

// read takes a body of at most trust.MaxDocumentBytes, as it is.
func read(res *http.Response) ([]byte, error) {
	if enc := res.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return nil, failure(BadStatus, "%s sends the encoding %.40q, which was not asked for", res.Request.URL.Host, enc)
	}
	if res.ContentLength > trust.MaxDocumentBytes {
		return nil, failure(TooLarge, "%s announces %d bytes; at most %d are read", res.Request.URL.Host, res.ContentLength, trust.MaxDocumentBytes)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, trust.MaxDocumentBytes+1))
	if err == nil {
		// A server that sees the request given up can still end the body in good form.
		err = res.Request.Context().Err()
	}
	if err != nil {
		return nil, classify(res.Request.URL, err)
	}
	if len(body) > trust.MaxDocumentBytes {
		return nil, failure(TooLarge, "%s sends more than %d bytes", res.Request.URL.Host, trust.MaxDocumentBytes)
	}
	return body, nil
}

// classify tells a server that is another one from a server that is away.
func classify(u *url.URL, err error) error {
	var unverified *tls.CertificateVerificationError
	var refused *svid.Error
	switch {
	case errors.As(err, &unverified) || errors.As(err, &refused) || errors.Is(err, errOtherServer):
		return failure(Untrusted, "the server at %s is not the one that it should be: %w", u.Host, err)
	case errors.Is(err, errNotPublic):
		return failure(Redirected, "%s: %w", u.Host, err)
	}
	return failure(Unreachable, "reach %s: %w", u.Host, err)
}

var (
	errOtherServer = errors.New("it has another SPIFFE ID")
	errNotPublic   = errors.New("an address that is not of the internet is not gone to")
)

// tls verifies the server as the profile says.
func (s *Source) tls(verifiers x509bundle.Source) (*tls.Config, error) {
	if s.Profile == Web {
		roots, err := s.roots()
		return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}, err
	}
	if _, err := verifiers.GetX509BundleForTrustDomain(s.EndpointID.TrustDomain()); err != nil {
		return nil, failure(Untrusted, "there is no trust bundle of %s, which would verify %s", s.EndpointID.TrustDomain(), s.EndpointID)
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection does it, by SPIFFE ID
		VerifyConnection: func(cs tls.ConnectionState) error {
			peer, err := svid.VerifyChain(cs.PeerCertificates, verifiers, time.Now())
			if err == nil && peer.ID != s.EndpointID {
				err = fmt.Errorf("%w: %s, not %s", errOtherServer, peer.ID, s.EndpointID)
			}
			return err
		},
	}, nil
}

// notPublic are the ranges that the internet does not have, beside those that netip
// knows: shared address space, benchmarks, documentation, and what IPv6 wraps IPv4 in.
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("192.0.0.0/24"), netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("64:ff9b:1::/48"), netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("2002::/16"),
}

// notLinkLocal implements net.Dialer.Control for the URL that an operator has set, or
// taken over with an invite: it may be of a private network, and is never that of a
// cloud's metadata service.
func notLinkLocal(_, address string, _ syscall.RawConn) error {
	addr, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if ip := addr.Addr(); !endpointAddress(ip) {
		return fmt.Errorf("%w: %s is no address of a bundle endpoint", errNotPublic, ip)
	}
	return nil
}

// endpointAddress says whether a bundle endpoint can have that address.
func endpointAddress(ip netip.Addr) bool {
	ip = ip.Unmap()
	return !ip.IsLinkLocalUnicast() && !ip.IsMulticast() && !ip.IsUnspecified()
}

// publicOnly implements net.Dialer.Control: it sees the address that is connected to,
// so no name can stand for another one.
func publicOnly(_, address string, _ syscall.RawConn) error {
	addr, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := addr.Addr().Unmap()
	if !ip.IsGlobalUnicast() || ip.IsPrivate() || slices.ContainsFunc(notPublic, func(p netip.Prefix) bool { return p.Contains(ip) }) {
		return fmt.Errorf("%w: %s", errNotPublic, ip)
	}
	return nil
}
