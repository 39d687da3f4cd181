// The keys of one issuer: fetched when a token needs them, kept for a while, and
// never from anywhere but the issuer's own host or the configured URL or file
// (SECURITY.md T40).

package oidc

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
)

const (
	// freshFor is how long keys are used without a look for new ones, and keptFor
	// how long they are used while no new ones can be had.
	freshFor = time.Hour
	keptFor  = 24 * time.Hour
	// askEvery bounds how often a provider is asked, whatever tokens come.
	askEvery       = 30 * time.Second
	fetchTimeout   = 5 * time.Second
	maxAnswerBytes = 256 << 10
	maxHeaderBytes = 16 << 10
	maxKeys        = 100

	discoveryPath = "/.well-known/openid-configuration"
)

// keySet is safe for concurrent use.
type keySet struct {
	issuer Issuer
	client *http.Client
	log    *slog.Logger
	asking chan struct{} // holds one element while the provider is being asked
	now    atomic.Pointer[keys]
}

// keys are immutable.
type keys struct {
	byID map[string]crypto.PublicKey
	// fetched is when they came, asked when they were last asked for.
	fetched, asked time.Time
}

func newKeySet(i Issuer, log *slog.Logger) *keySet {
	s := &keySet{issuer: i, log: log, asking: make(chan struct{}, 1), client: HTTPClient(i.Roots)}
	s.now.Store(&keys{})
	return s
}

// HTTPClient asks a server that an operator configured, and no other that this
// one names. Its TLS certificate is verified by roots; nil for the system's.
func HTTPClient(roots *x509.CertPool) *http.Client {
	return &http.Client{
		Timeout:       fetchTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("it redirects, which is not followed") },
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: fetchTimeout, Control: refuseLinkLocal}).DialContext,
			TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			MaxResponseHeaderBytes: maxHeaderBytes,
			DisableKeepAlives:      true, // it is asked now and then
		},
	}
}

// refuseLinkLocal: that is where clouds keep the credentials of a machine.
func refuseLinkLocal(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if ip := at.Addr().Unmap(); ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() {
		return fmt.Errorf("%s is no address of a provider", ip)
	}
	return nil
}

// find returns the key called kid.
func (s *keySet) find(ctx context.Context, kid string, now time.Time) (crypto.PublicKey, error) {
	k := s.now.Load()
	if k.lack(kid, now) {
		k = s.refresh(ctx, kid, now)
	}
	if k.fetched.IsZero() || now.Sub(k.fetched) > keptFor {
		return nil, ErrUnavailable
	}
	key, ok := k.byID[kid]
	if !ok {
		return nil, errors.New("its issuer has no key of that kid")
	}
	return key, nil
}

// lack says whether it is time to ask for new keys.
func (k *keys) lack(kid string, now time.Time) bool {
	_, known := k.byID[kid]
	return (!known || now.Sub(k.fetched) > freshFor) && now.Sub(k.asked) >= askEvery
}

// refresh asks the provider, or waits for whoever does so already; with a key
// that is known, nobody waits for another.
func (s *keySet) refresh(ctx context.Context, kid string, now time.Time) *keys {
	select {
	case s.asking <- struct{}{}:
	default:
		if k := s.now.Load(); k.byID[kid] != nil {
			return k
		}
		select {
		case s.asking <- struct{}{}:
		case <-ctx.Done():
			return s.now.Load()
		}
	}
	defer func() { <-s.asking }()
	old := s.now.Load()
	if !old.lack(kid, now) {
		return old
	}
	next := &keys{old.byID, old.fetched, now}
	// Whoever asks may go away; the answer is for all.
	if byID, err := s.fetch(context.WithoutCancel(ctx)); err != nil {
		s.log.LogAttrs(ctx, slog.LevelWarn, "keys of an OIDC issuer not fetched", slog.String("issuer", s.issuer.URL), slog.Any("err", err))
	} else {
		next.byID, next.fetched = byID, now
	}
	s.now.Store(next)
	return next
}

func (s *keySet) fetch(ctx context.Context) (map[string]crypto.PublicKey, error) {
	if s.issuer.KeysFile != "" {
		return readKeys(s.issuer.KeysFile)
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	from := s.issuer.KeysURL
	if from == "" {
		var err error
		if from, err = s.discover(ctx); err != nil {
			return nil, err
		}
	}
	var set jwks
	if err := s.get(ctx, from, &set); err != nil {
		return nil, err
	}
	return usable(set.Keys)
}

type jwks struct {
	Keys []json.RawMessage `json:"keys"`
}

// readKeys reads the keys of a file, which an operator, or what renews it, may
// replace.
func readKeys(path string) (map[string]crypto.PublicKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := readAll(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	var set jwks
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return usable(set.Keys)
}

func readAll(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxAnswerBytes+1))
	if err == nil && len(data) > maxAnswerBytes {
		err = fmt.Errorf("more than %d bytes", maxAnswerBytes)
	}
	return data, err
}

// discover asks the issuer where its keys are. A host that it names is not
// asked: whoever can write that document could have the CA call anything.
func (s *keySet) discover(ctx context.Context) (string, error) {
	var doc struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	if err := s.get(ctx, strings.TrimSuffix(s.issuer.URL, "/")+discoveryPath, &doc); err != nil {
		return "", err
	}
	if doc.Issuer != s.issuer.URL {
		return "", fmt.Errorf("the discovery document is that of issuer %.200q", doc.Issuer)
	}
	own, err := url.Parse(s.issuer.URL)
	if err != nil {
		return "", err
	}
	if err := checkURL(doc.JWKSURI); err != nil {
		return "", fmt.Errorf("jwks_uri %.200q %w", doc.JWKSURI, err)
	}
	if u, err := url.Parse(doc.JWKSURI); err != nil || !strings.EqualFold(u.Host, own.Host) {
		return "", fmt.Errorf("jwks_uri %.200q is on another host than the issuer: if that is right, configure it as keys_url", doc.JWKSURI)
	}
	return doc.JWKSURI, nil
}

func (s *keySet) get(ctx context.Context, from string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json, application/jwk-set+json") // the latter is all that Kubernetes has for keys
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("get %s: status %d", from, resp.StatusCode)
	}
	body, err := readAll(resp.Body)
	if err != nil {
		return fmt.Errorf("get %s: %w", from, err)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("get %s: %w", from, err)
	}
	return nil
}

// usable are the keys that can sign a token; others are passed over, because a
// provider has keys for other ends too. Two with one name are an error.
func usable(raw []json.RawMessage) (map[string]crypto.PublicKey, error) {
	if len(raw) > maxKeys {
		return nil, fmt.Errorf("there are %d keys; at most %d", len(raw), maxKeys)
	}
	byID := make(map[string]crypto.PublicKey)
	for _, text := range raw {
		var k jose.JSONWebKey
		if k.UnmarshalJSON(text) != nil || k.KeyID == "" || k.Use != "sig" && k.Use != "" {
			continue
		}
		alg := algorithmOf(k.Key)
		if alg == "" || k.Algorithm != "" && k.Algorithm != string(alg) {
			continue
		}
		if _, twice := byID[k.KeyID]; twice {
			return nil, fmt.Errorf("two keys are called %.100q", k.KeyID)
		}
		byID[k.KeyID] = k.Key
	}
	if len(byID) == 0 {
		return nil, errors.New("there is no key for RS256 or ES256 with a kid")
	}
	return byID, nil
}
