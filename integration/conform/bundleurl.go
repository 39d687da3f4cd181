// The trust bundle endpoint, asked as another trust domain would (Federation §5; Trust
// domain and bundle §4).

package main

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"mime"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const maxDocument = 4 << 20

// bundleServer says where a bundle is, and by which profile.
type bundleServer struct {
	url string
	// caFile has the CAs of a https_web server in PEM; empty: the system's.
	caFile string
	// id is the SPIFFE ID of a https_spiffe server; zero: https_web.
	id spiffeid.ID
	// roots verify id.
	roots *x509bundle.Bundle
}

// document is a trust bundle as it was sent.
type document struct {
	Sequence    json.RawMessage              `json:"spiffe_sequence"`
	RefreshHint json.RawMessage              `json:"spiffe_refresh_hint"`
	Keys        []map[string]json.RawMessage `json:"keys"`
}

// named checks what the flags say of the server, whose SPIFFE ID is id if any.
func (s *bundleServer) named(id string) (err error) {
	if u, err := url.Parse(s.url); s.url != "" && (err != nil || u.Scheme != "https" || u.User != nil || u.Host == "") {
		return usageError{fmt.Sprintf("--bundle-url %q is no URL of a trust bundle endpoint: it is https, without a user", s.url)}
	}
	if id != "" {
		if s.id, err = spiffeid.FromString(id); err != nil {
			return usageError{fmt.Sprintf("--bundle-id: %v", err)}
		}
	}
	return nil
}

// checkBundleURL fetches the bundle and makes every check of it. An error says that
// there is none to check.
func checkBundleURL(ctx context.Context, r *report, s bundleServer) error {
	if !s.id.IsZero() && s.roots == nil {
		return r.must("F-14", endpoint, fmt.Errorf("the Workload API gave no trust bundle to verify %s by", s.id))
	}
	config, err := s.tls()
	if err != nil {
		return err
	}
	body, res, err := s.fetch(ctx, config)
	if err != nil {
		return r.must("F-10", endpoint, fmt.Errorf("an anonymous GET of %s: %w", s.url, err))
	}
	if code := res.StatusCode; code == http.StatusMovedPermanently || code == http.StatusPermanentRedirect {
		return r.must("F-12", endpoint, fmt.Errorf("the endpoint redirects with %s", res.Status))
	}
	r.ok("F-12", endpoint)
	if res.StatusCode != http.StatusOK {
		return r.must("F-10", endpoint, fmt.Errorf("an anonymous GET of %s answers %s", s.url, res.Status))
	}
	r.ok("F-10", endpoint)
	if s.id.IsZero() {
		r.ok("F-6", endpoint)
	} else {
		r.ok("F-14", endpoint)
		r.ok("F-6", endpoint)
	}
	s.checkTLS(ctx, r, config)
	kind, _, err := mime.ParseMediaType(res.Header.Get("Content-Type"))
	r.check("F-11", endpoint, failIf(err != nil || kind != "application/json", "Content-Type is %q", res.Header.Get("Content-Type")))
	r.check("F-11", endpoint, failIf(!utf8.Valid(body), "the document is not UTF-8"))
	return checkDocument(r, body)
}

// tls is the configuration of a client without a certificate.
func (s bundleServer) tls() (*tls.Config, error) {
	if !s.id.IsZero() {
		return &tls.Config{
			MinVersion:         tls.VersionTLS12,
			InsecureSkipVerify: true, // VerifyConnection does it, by SPIFFE ID
			VerifyConnection: func(cs tls.ConnectionState) error {
				id, _, err := x509svid.Verify(cs.PeerCertificates, s.roots)
				if err == nil && id != s.id {
					err = fmt.Errorf("the server is %s, not %s", id, s.id)
				}
				return err
			},
		}, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if s.caFile != "" {
		text, err := os.ReadFile(s.caFile)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("%s has no certificate in PEM", s.caFile)
		}
	}
	return config, nil
}

func (s bundleServer) fetch(ctx context.Context, config *tls.Config) ([]byte, *http.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	client := &http.Client{
		Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if code := req.Response.StatusCode; code == http.StatusMovedPermanently || code == http.StatusPermanentRedirect || req.URL.Scheme != "https" || len(via) > 3 {
				return http.ErrUseLastResponse
			}
			return nil
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return nil, nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxDocument+1))
	if err == nil && len(body) > maxDocument {
		err = errors.New("the document has more than 4 MiB")
	}
	return body, res, err
}

// checkTLS: versions that Mozilla's intermediate profile does not have are refused.
func (s bundleServer) checkTLS(ctx context.Context, r *report, config *tls.Config) {
	for _, version := range []uint16{tls.VersionTLS10, tls.VersionTLS11} {
		old := config.Clone()
		old.MinVersion, old.MaxVersion = version, version
		_, _, err := s.fetch(ctx, old)
		r.check("F-6", endpoint, failIf(err == nil, "the server speaks %s", tls.VersionName(version)))
	}
}

// checkDocument holds a trust bundle against the standard.
func checkDocument(r *report, body []byte) error {
	var doc document
	if err := json.Unmarshal(body, &doc); err != nil {
		return r.must("B4", endpoint, fmt.Errorf("the trust bundle is no JSON object as the standard says: %w", err))
	}
	r.check("B4", endpoint, failIf(doc.Keys == nil, "the document has no keys"))
	r.check("B2", endpoint, wholeNumber("spiffe_sequence", doc.Sequence))
	if n, ok := new(big.Int).SetString(string(doc.Sequence), 10); ok && !n.IsUint64() {
		r.remark("B2", "spiffe_sequence is %.40s: consumers that read 64 bits refuse the bundle", n)
	}
	r.check("B3", endpoint, wholeNumber("spiffe_refresh_hint", doc.RefreshHint))
	kids, uses := make(map[string]bool), make(map[string]string)
	for _, k := range doc.Keys {
		checkKey(r, k, kids)
		key, use := string(k["x"])+string(k["y"])+string(k["n"]), string(k["use"])
		r.check("B9", endpoint, failIf(key != "" && uses[key] != "" && uses[key] != use, "one key is of use %s and of use %s", uses[key], use))
		uses[key] = use
	}
	return nil
}

func wholeNumber(name string, raw json.RawMessage) error {
	if len(raw) == 0 {
		return fmt.Errorf("%s is missing", name)
	}
	for _, c := range raw {
		if c < '0' || c > '9' {
			return fmt.Errorf("%s is %s", name, raw)
		}
	}
	return nil
}

// defined are the members that a key of a trust bundle may have (RFC 7517, RFC 7518).
var defined = []string{"kty", "use", "kid", "x5c", "crv", "x", "y", "n", "e", "alg"}

func checkKey(r *report, k map[string]json.RawMessage, kids map[string]bool) {
	text := func(name string) string {
		var s string
		if json.Unmarshal(k[name], &s) != nil {
			return ""
		}
		return s
	}
	for name := range k {
		r.check("B7", endpoint, failIf(!slices.Contains(defined, name), "a key has the member %s", name))
	}
	kid := text("kid")
	switch text("use") {
	case "x509-svid":
		var chain []string
		if err := json.Unmarshal(k["x5c"], &chain); err != nil || len(chain) != 1 || k["kid"] != nil {
			r.fail("X15", endpoint, "an X.509 authority has %d certificates and kid %q", len(chain), kid)
			return
		}
		r.check("X15", endpoint, authorityOf(k, chain[0]))
	case "jwt-svid":
		_, err := parseJWK(k)
		r.check("J11", endpoint, err)
		r.check("J11", endpoint, failIf(kid == "" || kids[kid], "a JWT authority has the kid %q, none or one that is there already", kid))
		kids[kid] = true
	case "wit-svid":
		r.check("W13", endpoint, failIf(kid == "" || kids[kid], "a WIT authority has the kid %q, none or one that is there already", kid))
		kids[kid] = true
	}
}

// authorityOf says what is wrong with a JWK of this one certificate: it is a signing
// certificate, whose key the JWK's members are (RFC 7517 §4.7).
func authorityOf(k map[string]json.RawMessage, x5c string) error {
	der, err := base64.StdEncoding.DecodeString(x5c)
	if err != nil {
		return fmt.Errorf("x5c of an X.509 authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("x5c of an X.509 authority: %w", err)
	}
	if !cert.BasicConstraintsValid || !cert.IsCA {
		return fmt.Errorf("the X.509 authority %q is no signing certificate: it does not say that cA is true (X509-SVID §4.1)", cert.Subject)
	}
	key, err := parseJWK(k)
	if err != nil {
		return err
	}
	public, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(key) {
		return fmt.Errorf("the JWK of the X.509 authority %q is of another key than the certificate in its x5c (RFC 7517 §4.7)", cert.Subject)
	}
	return nil
}

// parseJWK reads the public key of a JWK by its own members, without x5c.
func parseJWK(k map[string]json.RawMessage) (crypto.PublicKey, error) {
	bare := maps.Clone(k)
	delete(bare, "x5c")
	text, err := json.Marshal(bare)
	if err != nil {
		return nil, err
	}
	var key jose.JSONWebKey
	if err := key.UnmarshalJSON(text); err != nil {
		return nil, fmt.Errorf("a JWK: %w", err)
	}
	if !key.IsPublic() {
		return nil, errors.New("a JWK is no public key")
	}
	return key.Key, nil
}

// checkSequence fetches the document again: its sequence does not fall, and rises where
// the keys are others.
func checkSequence(ctx context.Context, r *report, s bundleServer) {
	config, err := s.tls()
	if err != nil {
		return
	}
	var last *document
	for i := range 2 {
		if i > 0 {
			time.Sleep(time.Second)
		}
		body, _, err := s.fetch(ctx, config)
		next := new(document)
		if err != nil || json.Unmarshal(body, next) != nil {
			return // checkBundleURL has said so
		}
		if last != nil {
			r.check("B2", endpoint, next.follows(last))
		}
		last = next
	}
}

// follows says what is wrong with the order of two documents. Sequences are compared as
// the whole numbers that they are, whatever their size.
func (d *document) follows(earlier *document) error {
	before, ok := new(big.Int).SetString(string(earlier.Sequence), 10)
	after, ok2 := new(big.Int).SetString(string(d.Sequence), 10)
	if !ok || !ok2 {
		return fmt.Errorf("spiffe_sequence is %s, and then %s", earlier.Sequence, d.Sequence)
	}
	same := reflect.DeepEqual(earlier.Keys, d.Keys)
	switch order := after.Cmp(before); {
	case order < 0:
		return fmt.Errorf("spiffe_sequence fell from %s to %s", before, after)
	case order == 0 && !same:
		return fmt.Errorf("the keys have changed, and spiffe_sequence is %s as before", after)
	}
	return nil
}
