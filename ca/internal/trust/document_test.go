// Trust bundle documents of others: what counts, what is ignored as the standard
// says, and what is refused whole.

package trust

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/svid/forge"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.test")

// member is a JWK as text, with members changed or, by nil, taken away.
func member(t testing.TB, key jose.JSONWebKey, changes map[string]any) string {
	t.Helper()
	raw, err := key.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	fields := map[string]any{}
	if err := json.Unmarshal(raw, &fields); err != nil {
		t.Fatal(err)
	}
	for name, value := range changes {
		if fields[name] = value; value == nil {
			delete(fields, name)
		}
	}
	out, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func x509Key(a *forge.Authority) jose.JSONWebKey {
	return jose.JSONWebKey{Key: a.Cert.PublicKey, Certificates: []*x509.Certificate{a.Cert}, Use: useX509}
}

func jwtKey(key crypto.PublicKey, kid string) jose.JSONWebKey {
	return jose.JSONWebKey{Key: key, KeyID: kid, Use: useJWT}
}

func document(keys ...string) string {
	return `{"spiffe_sequence":7,"keys":[` + strings.Join(keys, ",") + `]}`
}

func pemOf(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func b64(cert *x509.Certificate) string { return base64.StdEncoding.EncodeToString(cert.Raw) }

func development(c *x509.Certificate) {
	c.Subject.Organization = []string{authority.DevelopmentOrganization}
}

func TestDocumentIsWhatTheStandardSays(t *testing.T) {
	a, other := forge.New(t, partner.Name()), forge.New(t, partner.Name())
	root := member(t, x509Key(a), nil)
	jwt := member(t, jwtKey(a.JWTKey.Public(), "one"), nil)
	rsaKey := rsaPublic(t)
	for name, test := range map[string]struct {
		text        string
		x509, jwt   int
		sequence    uint64
		ignored     int
		mustNotHold *x509.Certificate
	}{
		"both kinds":               {text: document(root, jwt), x509: 1, jwt: 1, sequence: 7},
		"go-spiffe's":              {text: goSPIFFE(t, a), x509: 1, jwt: 1},
		"RSA and P-521":            {text: document(member(t, jwtKey(rsaKey, "r"), nil), member(t, jwtKey(p521(t), "p"), nil)), jwt: 2, sequence: 7},
		"least (B1)":               {text: `{"keys":[]}`},
		"null for none (B6)":       {text: `{"keys":null,"spiffe_sequence":7}`, sequence: 7},
		"largest sequence":         {text: `{"keys":[],"spiffe_sequence":18446744073709551614}`, sequence: math.MaxUint64 - 1},
		"unknown members (B1)":     {text: `{"keys":[],"spiffe_refresh_hint":300,"x":{"y":[1]}}`},
		"large sequence (B2)":      {text: `{"keys":[],"spiffe_sequence":9007199254740993}`, sequence: 1<<53 + 1},
		"same root twice":          {text: document(root, root), x509: 1, sequence: 7},
		"no use (B5)":              {text: document(member(t, x509Key(a), map[string]any{"use": nil})), sequence: 7, ignored: 1},
		"use in capitals (B5)":     {text: document(member(t, x509Key(a), map[string]any{"use": "X509-SVID"})), sequence: 7, ignored: 1},
		"another use":              {text: document(member(t, x509Key(a), map[string]any{"use": "wit-svid"})), sequence: 7, ignored: 1},
		"unknown kty (B5)":         {text: document(`{"kty":"AKP","use":"jwt-svid","kid":"k","pub":"AA"}`), sequence: 7, ignored: 1},
		"Ed25519 beside JWT key":   {text: document(member(t, jwtKey(edPublic(t), "k"), nil), jwt), jwt: 1, sequence: 7, ignored: 1},
		"secp256k1 beside JWT key": {text: document(jwt, `{"kty":"EC","crv":"secp256k1","use":"jwt-svid","kid":"k","x":"AA","y":"AA"}`), jwt: 1, sequence: 7, ignored: 1},
		"symmetric key":            {text: document(`{"kty":"oct","use":"jwt-svid","kid":"k","k":"c2VjcmV0"}`), sequence: 7, ignored: 1},
		"no x5c (X16)":             {text: document(member(t, x509Key(a), map[string]any{"x5c": nil})), sequence: 7, ignored: 1},
		"empty x5c (X16)":          {text: document(member(t, x509Key(a), map[string]any{"x5c": []string{}})), sequence: 7, ignored: 1},
		"only x5c[0] counts(X16)":  {text: document(member(t, x509Key(a), map[string]any{"x5c": []string{b64(a.Cert), b64(other.Cert)}})), x509: 1, sequence: 7, ignored: 1, mustNotHold: other.Cert},
		"rubbish in x5c[1] (X16)":  {text: document(member(t, x509Key(a), map[string]any{"x5c": []string{b64(a.Cert), "%"}})), x509: 1, sequence: 7, ignored: 1},
		"JWT key without kid":      {text: document(member(t, jwtKey(a.JWTKey.Public(), ""), nil)), sequence: 7, ignored: 1},
		"kid on an X.509 key":      {text: document(member(t, x509Key(a), map[string]any{"kid": "x"})), x509: 1, sequence: 7},
		"the rest counts":          {text: document(root, `{"use":"x"}`, jwt), x509: 1, jwt: 1, sequence: 7, ignored: 1},
		"PEM":                      {text: pemOf("CERTIFICATE", a.Cert.Raw), x509: 1},
		"PEM of several":           {text: "# the roots\n" + pemOf("CERTIFICATE", a.Cert.Raw) + "\nsubject=x\n" + pemOf("CERTIFICATE", other.Cert.Raw), x509: 2},
		"space around":             {text: "\n " + document(root) + "\n", x509: 1, sequence: 7},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := ParseDocument(partner, []byte(test.text))
			if err != nil {
				t.Fatalf("ParseDocument(%s) = %v; want no error", test.text, err)
			}
			if len(d.X509) != test.x509 || len(d.JWT) != test.jwt || d.Sequence != test.sequence || len(d.Ignored) != test.ignored {
				t.Errorf("ParseDocument(%s) = %d X.509, %d JWT keys, sequence %d, ignored %q; want %d, %d, %d and %d", test.text,
					len(d.X509), len(d.JWT), d.Sequence, d.Ignored, test.x509, test.jwt, test.sequence, test.ignored)
			}
			for _, cert := range d.X509 {
				if test.mustNotHold != nil && cert.Equal(test.mustNotHold) {
					t.Error("a certificate behind the first became trusted")
				}
			}
		})
	}
}

func TestOddDocumentIsRefusedWhole(t *testing.T) {
	a, other := forge.New(t, partner.Name()), forge.New(t, "other.test")
	root := member(t, x509Key(a), nil)
	x509With := func(change forge.Change) string { return member(t, x509Key(forge.New(t, partner.Name(), change)), nil) }
	private, err := jose.JSONWebKey{Key: a.JWTKey, KeyID: "p", Use: useJWT}.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	leaf := a.Leaf("/web").Chain[0]
	many := make([]string, maxKeysOfAKind+1)
	for i := range many {
		many[i] = member(t, jwtKey(a.JWTKey.Public(), fmt.Sprint(i)), nil)
	}
	loose := padded(t)
	for name, test := range map[string]struct{ text, want string }{
		"nothing":                  {" \n", "empty"},
		"too large":                {strings.Repeat(" ", MaxDocumentBytes+1), "at most"},
		"no JSON":                  {"{", "JWKS"},
		"text":                     {"<html>", "neither"},
		"more behind":              {document(root) + "{}", "JWKS"},
		"no keys":                  {`{}`, "keys"},
		"keys are an object":       {`{"keys":{}}`, "keys"},
		"keys are text":            {`{"keys":"[]"}`, "keys"},
		"the last sequence":        {`{"keys":[],"spiffe_sequence":18446744073709551615}`, "nothing could follow"},
		"keys in capitals":         {`{"KEYS":[]}`, "keys"},
		"keys twice (T23)":         {`{"keys":[],"keys":[]}`, "JWKS"},
		"member twice (T23)":       {document(strings.Replace(root, `{`, `{"use":"x509-svid",`, 1)), "keys[0]"},
		"negative sequence":        {`{"keys":[],"spiffe_sequence":-1}`, "JWKS"},
		"fraction for a sequence":  {`{"keys":[],"spiffe_sequence":1.5}`, "JWKS"},
		"text for a sequence":      {`{"keys":[],"spiffe_sequence":"7"}`, "JWKS"},
		"too large a sequence":     {`{"keys":[],"spiffe_sequence":18446744073709551616}`, "JWKS"},
		"a key that is none":       {document(`7`), "keys[0]"},
		"second key":               {document(root, `{"kty":"EC","use":"jwt-svid","kid":"k"}`), "keys[1]"},
		"private key":              {document(string(private)), "private"},
		"x5c is no base64":         {document(member(t, x509Key(a), map[string]any{"x5c": []string{"%"}})), "base64"},
		"x5c is no certificate":    {document(member(t, x509Key(a), map[string]any{"x5c": []string{"AAAA"}})), "parse"},
		"another key's x5c":        {document(member(t, x509Key(a), map[string]any{"x5c": []string{b64(forge.New(t, partner.Name()).Cert)}})), "another key"},
		"other trust domain (T21)": {document(member(t, x509Key(other), nil)), "other.test"},
		"path in the SAN (X6)":     {document(x509With(forge.URIs("spiffe://partner.test/ca"))), "X6"},
		"two SANs (X2)":            {document(x509With(forge.URIs("spiffe://partner.test", "spiffe://other.test"))), "X2"},
		"no authority (X8)":        {document(x509With(func(c *x509.Certificate) { c.IsCA = false })), "X8"},
		"no keyCertSign (X11)":     {document(x509With(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })), "X11"},
		"leaf":                     {document(member(t, jose.JSONWebKey{Key: leaf.PublicKey, Certificates: []*x509.Certificate{leaf}, Use: useX509}, nil)), "vouch"},
		"development root":         {document(x509With(development)), "development"},
		"one kid for two keys":     {document(member(t, jwtKey(a.JWTKey.Public(), "k"), nil), member(t, jwtKey(other.JWTKey.Public(), "k"), nil)), "called"},
		"long kid":                 {document(member(t, jwtKey(a.JWTKey.Public(), strings.Repeat("k", 257)), nil)), "kid"},
		"ANSI in a kid (T36)":      {document(member(t, jwtKey(a.JWTKey.Public(), "\x1b[31m"), nil)), "cannot be shown"},
		"weak RSA":                 {document(member(t, jwtKey(weakRSA(t), "k"), nil)), "1024"},
		"a curve of nothing":       {document(`{"kty":"EC","use":"jwt-svid","kid":"k","x":"AA","y":"AA"}`), "parse"},
		"x5c is not canonical":     {document(member(t, x509Key(loose), map[string]any{"x5c": []string{uncanonical(t, loose.Cert)}})), "base64"},
		"too many JWT keys":        {document(many...), "at most 64"},
		"too many keys":            {document(strings.Repeat(`{"use":"x"},`, maxKeysNamed) + `{}`), "at most 1024"},
		"PEM of a key":             {pemOf("PRIVATE KEY", []byte("x")), "PRIVATE KEY"},
		"PEM, then a key":          {pemOf("CERTIFICATE", a.Cert.Raw) + pemOf("EC PRIVATE KEY", []byte("x")), "PRIVATE KEY"},
		"PEM cut off":              {pemOf("CERTIFICATE", a.Cert.Raw) + pemOf("CERTIFICATE", a.Cert.Raw)[:60], "cut off"},
		"PEM of rubbish":           {pemOf("CERTIFICATE", []byte("x")), "parse"},
		"PEM of a leaf":            {pemOf("CERTIFICATE", leaf.Raw), "vouch"},
		"PEM of another":           {pemOf("CERTIFICATE", other.Cert.Raw), "other.test"},
		"PEM for development":      {pemOf("CERTIFICATE", forge.New(t, partner.Name(), development).Cert.Raw), "development"},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := ParseDocument(partner, []byte(test.text))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("ParseDocument = %+v, %v; want an error with %q", d, err, test.want)
			}
		})
	}
}

// A hint of more than a day says nothing.
func TestRefreshHints(t *testing.T) {
	for hint, want := range map[string]time.Duration{"0": 0, "1": time.Second, "86400": 24 * time.Hour, "86401": 0, "4294967296": 0, "-1": 0, "1.5": 0, `"60"`: 0, "null": 0} {
		d, err := ParseDocument(partner, []byte(`{"keys":[],"spiffe_refresh_hint":`+hint+`}`))
		if err != nil || d.RefreshHint != want {
			t.Errorf("%s: %+v, %v; want %s", hint, d, err, want)
		}
	}
}

// uncanonical is b64 with a bit behind the last byte.
func uncanonical(t testing.TB, cert *x509.Certificate) string {
	t.Helper()
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
	text := b64(cert)
	last := strings.IndexByte(text, '=') - 1
	if last < 0 {
		t.Fatal("it has no bits to spare")
	}
	changed := text[:last] + string(alphabet[strings.IndexByte(alphabet, text[last])+1]) + text[last+1:]
	if der, err := base64.StdEncoding.DecodeString(changed); err != nil || !bytes.Equal(der, cert.Raw) {
		t.Fatalf("it is not the same certificate: %v", err)
	}
	return changed
}

// padded is an authority whose certificate ends in the midst of a group of base64.
func padded(t testing.TB) *forge.Authority {
	for {
		if a := forge.New(t, partner.Name()); len(a.Cert.Raw)%3 != 0 {
			return a
		}
	}
}

func TestTooManyRootsAreRefused(t *testing.T) {
	var roots []string
	for range maxKeysOfAKind + 1 {
		roots = append(roots, pemOf("CERTIFICATE", forge.New(t, partner.Name()).Cert.Raw))
	}
	if _, err := ParseDocument(partner, []byte(strings.Join(roots[1:], ""))); err != nil {
		t.Errorf("%d roots: %v", len(roots)-1, err)
	}
	if _, err := ParseDocument(partner, []byte(strings.Join(roots, ""))); err == nil {
		t.Errorf("%d roots were taken", len(roots))
	}
}

// A root without any SPIFFE ID, as companies have them, is taken for the trust
// domain that the administrator names.
func TestRootThatNamesNoTrustDomain(t *testing.T) {
	a := forge.New(t, partner.Name(), func(c *x509.Certificate) { c.URIs = []*url.URL{} })
	if d, err := ParseDocument(partner, []byte(pemOf("CERTIFICATE", a.Cert.Raw))); err != nil || len(d.X509) != 1 {
		t.Errorf("ParseDocument = %+v, %v; want the root", d, err)
	}
}

// What is handed on says what was taken in, in one form, to our reader and to
// go-spiffe.
func TestEncodedDocumentIsTheSame(t *testing.T) {
	a, b := forge.New(t, partner.Name()), forge.New(t, partner.Name())
	pool := []jose.JSONWebKey{
		x509Key(a), x509Key(b), jwtKey(a.JWTKey.Public(), "a"), jwtKey(b.JWTKey.Public(), "b"), jwtKey(rsaPublic(t), "c"), jwtKey(p521(t), "d"),
	}
	rapid.Check(t, func(rt *rapid.T) {
		var keys []string
		for _, i := range rapid.SliceOfDistinct(rapid.IntRange(0, len(pool)-1), rapid.ID[int]).Draw(rt, "keys") {
			keys = append(keys, member(t, pool[i], nil))
		}
		text := fmt.Sprintf(`{"spiffe_sequence":%d,"keys":[%s]}`, rapid.Uint64Max(math.MaxUint64-1).Draw(rt, "sequence"), strings.Join(keys, ","))
		d, err := ParseDocument(partner, []byte(text))
		if err != nil {
			rt.Fatal(err)
		}
		once, err := d.encode()
		if err != nil {
			rt.Fatal(err)
		}
		again, err := ParseDocument(partner, once)
		if err != nil {
			rt.Fatalf("ParseDocument(%s) = %v", once, err)
		}
		twice, err := again.encode()
		if err != nil || !bytes.Equal(once, twice) || again.Sequence != d.Sequence || len(again.X509)+len(again.JWT) != len(keys) {
			rt.Fatalf("%s became %s, %v", once, twice, err)
		}
		theirs, err := spiffebundle.Parse(partner, once)
		if err != nil || len(theirs.X509Authorities()) != len(d.X509) || len(theirs.JWTAuthorities()) != len(d.JWT) {
			rt.Fatalf("go-spiffe reads %s as %v, %v", once, theirs, err)
		}
	})
}

func FuzzParseDocument(f *testing.F) {
	a := forge.New(f, partner.Name())
	f.Add([]byte(document(member(f, x509Key(a), nil), member(f, jwtKey(a.JWTKey.Public(), "k"), nil))))
	f.Add([]byte(pemOf("CERTIFICATE", a.Cert.Raw)))
	f.Add([]byte(`{"keys":[{"kty":"RSA","use":"jwt-svid","kid":"k","n":"AQAB","e":"AQAB"}]}`))
	f.Add([]byte(strings.Repeat("[", 1000)))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := ParseDocument(partner, text)
		if err != nil {
			return
		}
		if len(d.X509) > maxKeysOfAKind || len(d.JWT) > maxKeysOfAKind {
			t.Fatalf("%d X.509, %d JWT keys", len(d.X509), len(d.JWT))
		}
		once, err := d.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseDocument(partner, once); err != nil {
			t.Fatalf("ParseDocument(%q) was taken and becomes %s: %v", text, once, err)
		}
	})
}

func goSPIFFE(t testing.TB, a *forge.Authority) string {
	t.Helper()
	b, err := a.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func rsaPublic(t testing.TB) crypto.PublicKey {
	t.Helper()
	return forge.NewRSAKey(t, 2048, 65537).Public()
}

func weakRSA(testing.TB) crypto.PublicKey {
	n := new(big.Int).Lsh(big.NewInt(1), 1023)
	return &rsa.PublicKey{N: n.Add(n, big.NewInt(1)), E: 65537}
}

func p521(t testing.TB) crypto.PublicKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key.Public()
}

func edPublic(t testing.TB) crypto.PublicKey {
	t.Helper()
	key, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
