// The bundle endpoint: the trust bundle by both profiles for go-spiffe and
// spiffe-conform, OpenID Connect discovery for a stock relying party, certificates from
// files and by ACME, and what TLS it speaks.

package federation_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
)

// endpoint is a CA with a bundle endpoint whose certificate is from files.
type endpoint struct {
	*stage.Domain
	files   stage.EtcdFiles
	address string
}

func (e endpoint) url(path string) string { return "https://" + e.address + path }

func withEndpoint(t *testing.T, settings ...string) endpoint {
	t.Helper()
	return withEndpointOf(t, "", settings...)
}

// withEndpointOf is withEndpoint with an issuer that has a path.
func withEndpointOf(t *testing.T, path string, settings ...string) endpoint {
	t.Helper()
	e := endpoint{files: stage.Certify(t, t.TempDir(), "127.0.0.1"), address: fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))}
	e.Domain = stage.Separate(t, append(settings,
		fmt.Sprintf("bundle_endpoint: {address: '%s', cert_file: '%s', key_file: '%s'}", e.address, e.files.Cert, e.files.Key),
		"jwt_issuer: "+e.url(path))...)
	return e
}

// go-spiffe fetches the trust bundle by https_web and by https_spiffe, and it is that
// of the command line.
func TestGoSPIFFEFetchesTheTrustBundle(t *testing.T) {
	t.Parallel()
	e := withEndpoint(t)
	td := spiffeid.RequireTrustDomainFromString(e.TrustDomain)
	shown, err := spiffebundle.Parse(td, []byte(e.Merlon("trust", "show", "-o", "jwks")))
	if err != nil {
		t.Fatal(err)
	}
	web, err := federation.FetchBundle(t.Context(), td, e.url("/v1/trust/bundle"), federation.WithWebPKIRoots(stage.Roots(t, e.files.CA)))
	if err != nil {
		t.Fatal(err)
	}
	ca := spiffeid.RequireFromString(e.ID("/ca"))
	spiffe, err := federation.FetchBundle(t.Context(), td, e.HTTPS+"/v1/trust/bundle", federation.WithSPIFFEAuth(shown, ca))
	if err != nil {
		t.Fatal(err)
	}
	if !web.Equal(shown) || !spiffe.Equal(shown) {
		t.Errorf("https_web gave %v, https_spiffe %v; want what the CA shows", web, spiffe)
	}
	other := spiffeid.RequireFromString(e.ID("/other"))
	if _, err := federation.FetchBundle(t.Context(), td, e.HTTPS+"/v1/trust/bundle", federation.WithSPIFFEAuth(shown, other)); err == nil {
		t.Error("https_spiffe works for another SPIFFE ID than the CA's (F-14)")
	}
}

// What spiffe-conform says of the endpoint, by each profile.
func TestBundleEndpointConforms(t *testing.T) {
	t.Parallel()
	e := withEndpoint(t)
	bin := stage.ConformBin(t)
	e.Merlon("entry", "create", "--spiffe-id", e.ID("/conform"), "--selector", "unix:path:"+bin, "--parent", e.AgentID())
	for profile, args := range map[string][]string{
		"https_web":    {"--bundle-url", e.url("/v1/trust/bundle"), "--bundle-ca", e.files.CA},
		"https_spiffe": {"--bundle-url", e.HTTPS + "/v1/trust/bundle", "--bundle-id", e.ID("/ca"), "--socket", e.WorkloadAPI},
	} {
		results, code := stage.Conform(t, bin, nil, args...)
		if code != 0 {
			t.Errorf("%s: exit code %d", profile, code)
		}
		for id, r := range results {
			if r.Status == "fail" {
				t.Errorf("%s: %s: %q", profile, id, r.Findings)
			}
		}
		for _, id := range []string{"B2", "B3", "B4", "B7", "F-6", "F-10", "F-11", "X15", "J11"} {
			if r := results[id]; r.Status != "pass" {
				t.Errorf("%s: %s: %s, %q", profile, id, r.Status, r.Findings)
			}
		}
	}
}

// A party built on a stock OpenID Connect library takes a JWT-SVID for an ID token, with
// ES256 and with RS256, and no token for another audience.
func TestAStockRelyingPartyTakesJWTSVIDs(t *testing.T) {
	t.Parallel()
	party := stage.Bin(t, stage.Build(t, "relyingparty", "integration/relyingparty", ""))
	for _, algorithm := range []string{"ES256", "RS256"} {
		t.Run(algorithm, func(t *testing.T) {
			e := withEndpoint(t, "jwt_algorithm: "+algorithm)
			e.Entry("/me")
			token := jwtSVID(t, e.Domain, "party")
			takes := func(audience string) (string, error) {
				cmd := exec.CommandContext(t.Context(), party, e.url(""), e.files.CA, audience)
				cmd.Stdin = strings.NewReader(token)
				out, err := cmd.Output()
				if err != nil {
					err = fmt.Errorf("%w: %s", err, stage.Stderr(err))
				}
				return strings.TrimSpace(string(out)), err
			}
			if subject, err := takes("party"); err != nil || subject != e.ID("/me") {
				t.Errorf("subject %q, %v; want %s", subject, err, e.ID("/me"))
			}
			if _, err := takes("somebody-else"); err == nil {
				t.Error("it takes the token for another audience")
			}
		})
	}
}

// jwtSVID is one of this process's.
func jwtSVID(t *testing.T, d *stage.Domain, audience string) string {
	t.Helper()
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr(d.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	var token string
	stage.Eventually(t, "a JWT-SVID", func() error {
		svid, err := client.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: audience})
		if err == nil {
			token = svid.Marshal()
		}
		return err
	})
	return token
}

// The issuer stays while JWT keys are replaced: a stock relying party takes tokens of
// before and after, also where the issuer is a path on the endpoint's host.
func TestIssuerOutlivesItsKeys(t *testing.T) {
	t.Parallel()
	party := stage.Bin(t, stage.Build(t, "relyingparty", "integration/relyingparty", ""))
	e := withEndpointOf(t, "/tenants/shop")
	e.Entry("/me", "--jwt-ttl", "1h")
	issuer := e.url("/tenants/shop")
	takes := func(when, token string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), party, issuer, e.files.CA, "party")
		cmd.Stdin = strings.NewReader(token)
		out, err := cmd.Output()
		if subject := strings.TrimSpace(string(out)); err != nil || subject != e.ID("/me") {
			t.Errorf("%s: subject %q, %v: %s; want %s", when, subject, err, stage.Stderr(err), e.ID("/me"))
		}
	}
	first := jwtSVID(t, e.Domain, "party")
	takes("before", first)
	e.Merlon("authority", "prepare", "--kind", "jwt")
	var next stage.Authority
	stage.Eventually(t, "the new key is published", func() (err error) {
		next, err = stage.AuthorityIn(e.Domain, "jwt", "published")
		return err
	})
	takes("published", first)
	e.Merlon("authority", "activate", next.ID, "--force")
	var second string
	stage.Eventually(t, "a token of the new key", func() error {
		second = jwtSVID(t, e.Domain, "party")
		if keyOf(t, second) == keyOf(t, first) {
			return errors.New("it is of the old one")
		}
		return nil
	})
	takes("a token of the old key", first)
	takes("a token of the new key", second)
	for _, token := range []string{first, second} {
		if got := claimsOf(t, token)["iss"]; got != issuer {
			t.Errorf("iss is %v; want %s", got, issuer)
		}
	}
}

// keyOf is the kid of a token.
func keyOf(t *testing.T, token string) string {
	t.Helper()
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	return parsed.Headers[0].KeyID
}

func claimsOf(t *testing.T, token string) map[string]any {
	t.Helper()
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	var claims map[string]any
	if err == nil {
		err = parsed.UnsafeClaimsWithoutVerification(&claims)
	}
	if err != nil {
		t.Fatal(err)
	}
	return claims
}

// What is public says for how long it may be kept, and nothing else is there.
func TestBundleEndpointServesNothingElse(t *testing.T) {
	t.Parallel()
	e := withEndpoint(t)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: stage.Roots(t, e.files.CA)}}}
	defer client.CloseIdleConnections()
	for path, want := range map[string]int{
		"/v1/trust/bundle": 200, "/.well-known/openid-configuration": 200, "/keys": 200, "/": 404, "/v1/policy/bundles/grants": 404,
		"/v1/trust/bundle/": 404, "/v1/log/checkpoint": 404, "//keys": 404, "/%6beys": 404,
	} {
		res, err := client.Get(e.url(path))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode != want || err != nil {
			t.Errorf("%s: %s, %v; want %d", path, res.Status, err, want)
		}
		if want == 200 && (res.Header.Get("Cache-Control") != "public, max-age=300" || res.Header.Get("Content-Type") != "application/json" || !json.Valid(body)) {
			t.Errorf("%s: %v %s", path, res.Header, body)
		}
	}
	res, err := client.Post(e.url("/keys"), "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST /keys: %s", res.Status)
	}
}

// A certificate by ACME, from a real ACME server, which validates the endpoint itself;
// after a restart the one at hand is used, and no other is asked for.
func TestCertificateByACME(t *testing.T) {
	t.Parallel()
	pebble := stage.Bin(t, stage.Build(t, "pebble", "integration/pebble", ""))
	own := stage.Certify(t, t.TempDir(), "127.0.0.1")
	acme, port := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), stage.FreePort(t)
	cmd := exec.CommandContext(t.Context(), pebble, acme, own.Cert, own.Key, fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), strconv.Itoa(port))
	var issued, log stage.Buffer
	cmd.Stdout, cmd.Stderr = &issued, &log
	if _, err := cmd.StdinPipe(); err != nil { // it ends with us
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("log of pebble:\n%s", log.String())
		}
	})
	stage.Eventually(t, "pebble serves", func() error {
		conn, err := tls.Dial("tcp", acme, &tls.Config{RootCAs: stage.Roots(t, own.CA)})
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(issued.String())) {
		t.Fatalf("no root in %q", issued.String())
	}

	d := stage.CAAlone(t, "", nil, fmt.Sprintf(`bundle_endpoint:
  address: 127.0.0.1:%d
  acme:
    directory: https://%s/dir
    ca_file: %s
    domains: [trust.shop.test]
    email: ops@shop.test
    accept_terms: true`, port, acme, own.CA))
	certificate := func(name string) (*x509.Certificate, error) {
		dialer := &tls.Dialer{Config: &tls.Config{RootCAs: roots, ServerName: name}}
		conn, err := dialer.DialContext(t.Context(), "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		return conn.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
	}
	var first *x509.Certificate
	stage.Eventually(t, "a certificate by ACME", func() (err error) {
		first, err = certificate("trust.shop.test")
		return err
	})
	if _, err := certificate("other.shop.test"); err == nil {
		t.Error("a certificate for a name that is not configured")
	}
	d.CA.Restart()
	var again *x509.Certificate
	stage.Eventually(t, "the CA is back", func() (err error) {
		again, err = certificate("trust.shop.test")
		return err
	})
	if !again.Equal(first) {
		t.Error("another certificate after a restart")
	}
	// What is kept is sealed.
	kept, err := filepath.Glob(filepath.Join(d.CAData(), "acme", "*"))
	if err != nil || len(kept) < 2 {
		t.Fatalf("%d files in acme, %v; want account and certificate", len(kept), err)
	}
	for _, file := range kept {
		text, err := os.ReadFile(file)
		if err != nil || bytes.Contains(text, []byte("PRIVATE KEY")) || bytes.Contains(text, []byte("CERTIFICATE")) {
			t.Errorf("%s lies open: %v", file, err)
		}
	}
}

// testssl.sh finds nothing of severity MEDIUM or worse in protocols, ciphers, key
// exchange and known attacks.
func TestTestsslFindsNothing(t *testing.T) {
	if os.Getenv("MERLON_TESTSSL") == "" {
		t.Skip("takes half a minute: make posture")
	}
	script, err := exec.LookPath("testssl")
	if err != nil {
		t.Fatal("testssl.sh is not installed: apt-get install testssl.sh")
	}
	e := withEndpoint(t)
	report := filepath.Join(t.TempDir(), "testssl.json")
	out, err := exec.CommandContext(t.Context(), script, "--quiet", "--color", "0", "--warnings", "off", "--ip", "127.0.0.1", "--fast",
		"--protocols", "--std", "--fs", "--server-preference", "--vulnerable", "--add-ca", e.files.CA, "--jsonfile", report, e.address).CombinedOutput()
	text, readErr := os.ReadFile(report)
	if readErr != nil {
		t.Fatalf("%v, %v\n%s", err, readErr, out)
	}
	var findings []struct{ ID, Severity, Finding string }
	if err := json.Unmarshal(text, &findings); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if len(findings) < 20 {
		t.Errorf("only %d findings:\n%s", len(findings), out)
	}
	for _, f := range findings {
		switch f.Severity {
		case "MEDIUM", "HIGH", "CRITICAL", "FATAL": // WARN is what this machine could not try
			t.Errorf("%s: %s: %s", f.ID, f.Severity, f.Finding)
		}
	}
}

// Bad certificates do not start, with a reason; the CA says what is wrong with the
// settings.
func TestBundleEndpointSettingsThatMakeNoSense(t *testing.T) {
	files := stage.Certify(t, t.TempDir(), "client") // no server's
	for settings, want := range map[string]string{
		"bundle_endpoint: {address: '127.0.0.1:0'}": "cert_file",
		fmt.Sprintf("bundle_endpoint: {address: '127.0.0.1:0', cert_file: '%s', key_file: '%s'}", files.Cert, files.Key):                "names no host",
		"bundle_endpoint: {address: '127.0.0.1:0', acme: {directory: 'https://a.test/dir', domains: [a.test]}}":                         "accept_terms",
		"bundle_endpoint: {address: '127.0.0.1:0', acme: {directory: 'http://a.test/dir', domains: [a.test], accept_terms: true}}":      "https://",
		"bundle_endpoint: {address: '127.0.0.1:0', acme: {directory: 'https://a.test/dir', domains: ['*.a.test'], accept_terms: true}}": "wildcards",
		"jwt_issuer: https://a.test":     "bundle_endpoint",
		"bundle_endpoint: {addresss: x}": "address",
	} {
		config := filepath.Join(t.TempDir(), "ca.yaml")
		text := "trust_domain: shop.test\ndata_dir: " + filepath.Join(t.TempDir(), "data") + "\naddress: 127.0.0.1:0\nhttps_address: 127.0.0.1:0\nhealth_address: 127.0.0.1:0\nadmin_socket: " + filepath.Join(stage.Dir(t), "admin.sock") + "\n" + settings + "\n"
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, stderr, err := stage.Run(t.Context(), t, nil, "merlon-ca", "-config", config)
		if err == nil || !strings.Contains(stderr, want) {
			t.Errorf("%s: %v, %s; want an error that says %q", settings, err, stderr, want)
		}
	}
}
