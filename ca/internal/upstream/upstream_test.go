// The CA's keys from first use on, seen by those who depend on them: our
// strict verifier, openssl, and an operator with loose file modes.

package upstream

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/svid"
)

func open(t testing.TB, cfg Config) *Keys {
	t.Helper()
	k, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func config(t testing.TB) Config {
	return Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Dir: filepath.Join(t.TempDir(), "keys")}
}

// issue makes an X509-SVID and gives its chain, leaf first.
func issue(t testing.TB, k *Keys, path string, dns ...string) [][]byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := svid.NewSerial(7, 42)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := k.X509().Issue(authority.LeafRequest{
		SPIFFEID:  spiffeid.RequireFromPath(k.cfg.TrustDomain, path),
		PublicKey: key.Public(), Serial: serial, TTL: time.Hour, DNSNames: dns, Now: time.Now(),
	})
	if err != nil {
		t.Fatal(err)
	}
	chain := [][]byte{leaf.DER}
	for _, c := range k.X509().Chain {
		chain = append(chain, c.Raw)
	}
	return chain
}

func verify(t testing.TB, k *Keys, chain [][]byte) (*svid.Peer, error) {
	t.Helper()
	bundle, err := k.TrustBundle()
	if err != nil {
		t.Fatal(err)
	}
	return svid.VerifyRawChain(chain, bundle.X509Bundle(), time.Now())
}

// SPIFFE treats no trust domain name specially (ID4), whatever name constraints
// can express.
func TestChainsVerifyInEveryTrustDomain(t *testing.T) {
	for _, name := range []string{
		"example.org", "localhost", "10.0.0.1", "-", "_", "a_b.test", "1.2", "x-.y",
		strings.Repeat("a", 255), strings.Repeat("abcdefg.", 20) + "test",
	} {
		t.Run(name[:min(len(name), 20)], func(t *testing.T) {
			cfg := config(t)
			cfg.TrustDomain = spiffeid.RequireTrustDomainFromString(name)
			k := open(t, cfg)
			peer, err := verify(t, k, issue(t, k, "/web", "web.internal", "localhost"))
			if err != nil {
				t.Fatal(err)
			}
			if want := "spiffe://" + name + "/web"; peer.ID.String() != want {
				t.Errorf("ID = %s; want %s", peer.ID, want)
			}
			want := []string{k.X509().ID(), hex.EncodeToString(k.X509().Root.SubjectKeyId)}
			if !slices.Equal(peer.AuthorityIDs, want) {
				t.Errorf("authorities = %v; want %v", peer.AuthorityIDs, want)
			}
		})
	}
}

// crypto/x509 does not parse a certificate with such a name, so no Go peer could
// ever be authenticated in it.
func TestTrustDomainsThatGoCannotReadAreRefused(t *testing.T) {
	for _, name := range []string{"a..b", ".", ".test", strings.Repeat("a", 250) + "..b"} {
		cfg := config(t)
		cfg.TrustDomain = spiffeid.RequireTrustDomainFromString(name)
		if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "empty label") {
			t.Errorf("Open for %q = %v", name, err)
		}
		if _, err := os.Stat(cfg.Dir); !os.IsNotExist(err) {
			t.Errorf("something was made for %q", name)
		}
	}
}

func TestOpensslStrictAcceptsTheChain(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	for _, td := range []string{"example.org", "10.0.0.1", "shop.test"} {
		cfg := config(t)
		cfg.TrustDomain = spiffeid.RequireTrustDomainFromString(td)
		k := open(t, cfg)
		dir := t.TempDir()
		chain := issue(t, k, "/ns/prod/web", "web.internal")
		root := writePEM(t, dir, "root.pem", k.X509().Root.Raw)
		intermediate := writePEM(t, dir, "intermediate.pem", chain[1])
		leaf := writePEM(t, dir, "leaf.pem", chain[0])
		for _, purpose := range []string{"sslserver", "sslclient"} {
			cmd := exec.CommandContext(t.Context(), openssl, "verify", "-x509_strict", "-purpose", purpose,
				"-CAfile", root, "-untrusted", intermediate, leaf)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s, %s: %v\n%s", td, purpose, err, out)
			}
		}
	}
}

func writePEM(t *testing.T, dir, name string, der []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestKeysSurviveReopening(t *testing.T) {
	cfg := config(t)
	first := open(t, cfg)
	second := open(t, cfg)
	if svid.KeyHash(first.X509().Root) != svid.KeyHash(second.X509().Root) {
		t.Error("the root changed")
	}
	if first.JWT().KeyID != second.JWT().KeyID {
		t.Error("the JWT key changed")
	}
	kid1, _ := first.Policy()
	kid2, _ := second.Policy()
	if kid1 != kid2 {
		t.Error("the policy key changed")
	}
	if first.X509().ID() != second.X509().ID() {
		t.Error("the intermediate changed")
	}
	if kid1 == first.JWT().KeyID {
		t.Error("one key has two uses (B9)")
	}
	if _, err := verify(t, second, issue(t, first, "/web")); err != nil {
		t.Error(err)
	}
}

// jwt_algorithm decides what is made, not what is there.
func TestJWTKeyIsOfTheAlgorithmItWasMadeFor(t *testing.T) {
	for _, test := range []struct{ first, later string }{{RS256, ES256}, {ES256, RS256}, {RS256, RS256}} {
		var log bytes.Buffer
		cfg := config(t)
		cfg.JWTAlgorithm, cfg.Logger = test.first, slog.New(slog.NewTextHandler(&log, nil))
		made := open(t, cfg)
		cfg.JWTAlgorithm = test.later
		again := open(t, cfg) // from the sealed file
		alg, err := authority.JWSAlgorithm(again.JWT().Signer.Public())
		if err != nil || alg != test.first || again.JWT().KeyID != made.JWT().KeyID {
			t.Errorf("made for %s, opened for %s: it signs %s, %v", test.first, test.later, alg, err)
		}
		next, err := again.PrepareJWT()
		if err != nil {
			t.Fatal(err)
		}
		if err := again.UseJWT(next.KeyID); err != nil {
			t.Fatal(err)
		}
		if alg, err := authority.JWSAlgorithm(again.JWT().Signer.Public()); err != nil || alg != test.later {
			t.Errorf("the next one, prepared for %s, signs %s, %v", test.later, alg, err)
		}
		if warned := strings.Contains(log.String(), "jwt_algorithm is for JWT keys"); warned != (test.first != test.later) {
			t.Errorf("made for %s, opened for %s: warned %t", test.first, test.later, warned)
		}
	}
	cfg := config(t)
	cfg.JWTAlgorithm = "HS256"
	if _, err := Open(t.Context(), cfg); err == nil {
		t.Error("HS256 was taken")
	}
}

func TestEndedRootIsSaid(t *testing.T) {
	cfg := config(t)
	cfg.RootTTL = time.Hour
	synctest.Test(t, func(t *testing.T) {
		open(t, cfg)
		time.Sleep(time.Hour + time.Second) // virtual
		if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "the root ended at") {
			t.Errorf("Open = %v", err)
		}
	})
}

// What an upstream returns is compared with what it was asked for.
func TestUpstreamCertificatesAreChecked(t *testing.T) {
	k := open(t, config(t))
	want := k.X509().Chain[0]
	for name, spoil := range map[string]func(c *x509.Certificate){
		"leaf":             func(c *x509.Certificate) { c.IsCA = false },
		"usage":            func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature },
		"path length":      func(c *x509.Certificate) { c.MaxPathLen = 1 },
		"no name":          func(c *x509.Certificate) { c.URIs = nil },
		"two names":        func(c *x509.Certificate) { c.URIs = slices.Repeat(c.URIs, 2) },
		"other name":       func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "evil.org"}} },
		"name constraints": func(c *x509.Certificate) { c.PermittedURIDomains = nil },
		"longer life":      func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Second) },
		"no key ID":        func(c *x509.Certificate) { c.SubjectKeyId = nil },
	} {
		got := *want
		spoil(&got)
		if checkAuthority(&got, want) == nil {
			t.Errorf("%s: not noticed", name)
		}
	}
	if checkAuthority(nil, want) == nil || checkAuthority(want, want) != nil {
		t.Error("nothing, or the right certificate, is judged wrongly")
	}
}

func TestDevelopmentRootSaysSo(t *testing.T) {
	cfg := config(t)
	cfg.Development = true
	k := open(t, cfg)
	if got := k.X509().Root.Subject.Organization; !slices.Equal(got, []string{"Merlon development root - do not trust"}) {
		t.Errorf("organization = %q", got)
	}
	cfg.Development = false
	if _, err := Open(t.Context(), cfg); err == nil {
		t.Error("a development root opens as a real one")
	}
}

func TestTrustBundleHoldsRootAndJWTKey(t *testing.T) {
	k := open(t, config(t))
	bundle, err := k.TrustBundle()
	if err != nil {
		t.Fatal(err)
	}
	if roots := bundle.X509Authorities(); len(roots) != 1 || !roots[0].Equal(k.X509().Root) {
		t.Errorf("roots = %v", roots)
	}
	if _, ok := bundle.FindJWTAuthority(k.JWT().KeyID); !ok || len(bundle.JWTAuthorities()) != 1 {
		t.Errorf("JWT keys = %v", bundle.JWTAuthorities())
	}
	if _, has := bundle.SequenceNumber(); has {
		t.Error("the bundle has a sequence number, which is not ours to give")
	}
}

// X15: the entry of a root has its use, no kid and one certificate.
func TestX15RootsInTheTrustBundle(t *testing.T) {
	k := open(t, config(t))
	bundle, err := k.TrustBundle()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := bundle.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var jwks struct{ Keys []map[string]any }
	if err := json.Unmarshal(raw, &jwks); err != nil {
		t.Fatal(err)
	}
	roots := slices.DeleteFunc(jwks.Keys, func(key map[string]any) bool { return key["use"] != "x509-svid" })
	want := []any{base64.StdEncoding.EncodeToString(k.X509().Root.Raw)}
	if len(roots) != 1 || roots[0]["kid"] != nil || !reflect.DeepEqual(roots[0]["x5c"], any(want)) {
		t.Errorf("%s", raw)
	}
}

func TestAuthoritiesHaveTheirProfile(t *testing.T) {
	k := open(t, config(t))
	root, intermediate := k.X509().Root, k.X509().Chain[0]
	if key, ok := root.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P384() {
		t.Error("the root is not P-384")
	}
	if key, ok := intermediate.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		t.Error("the intermediate is not P-256")
	}
	if root.MaxPathLen != 1 || intermediate.MaxPathLen != 0 || !intermediate.MaxPathLenZero {
		t.Errorf("path lengths %d, %d; want 1, 0", root.MaxPathLen, intermediate.MaxPathLen)
	}
	if !slices.Equal(intermediate.PermittedURIDomains, []string{"example.org"}) || !intermediate.PermittedDNSDomainsCritical {
		t.Errorf("name constraint %v critical=%t", intermediate.PermittedURIDomains, intermediate.PermittedDNSDomainsCritical)
	}
	for _, c := range []*x509.Certificate{root, intermediate} {
		if c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://example.org" {
			t.Errorf("%s: usage %v, URIs %v", c.Subject, c.KeyUsage, c.URIs)
		}
		if d := time.Until(c.NotBefore); d > -55*time.Second {
			t.Errorf("%s: valid only from %s", c.Subject, c.NotBefore)
		}
	}
}
