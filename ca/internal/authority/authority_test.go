// What the authority signs, and what it never signs, judged by the verifier that
// every Merlon peer uses.

package authority_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/integration/measure"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func newAuthority(t testing.TB, td string) *authority.X509Authority {
	t.Helper()
	root := forge.New(t, td)
	return authorityOf(root.Intermediate())
}

func authorityOf(ca *forge.Authority) *authority.X509Authority {
	a := &authority.X509Authority{Root: ca.Root().Cert, Signer: ca.Key}
	for ; ca.Parent != nil; ca = ca.Parent {
		a.Chain = append(a.Chain, ca.Cert)
	}
	return a
}

var workloadKey = mustKey()

func mustKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

func request(changes ...func(*authority.LeafRequest)) authority.LeafRequest {
	req := authority.LeafRequest{
		SPIFFEID:  spiffeid.RequireFromString("spiffe://example.org/web"),
		PublicKey: workloadKey.Public(),
		Serial:    svid.Serial{Agent: 3, Revision: 17, Random: 99},
		TTL:       time.Hour,
		Now:       time.Now(),
	}
	for _, change := range changes {
		change(&req)
	}
	return req
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// verify: does a peer with the trust bundle accept the leaf?
func verify(ca *forge.Authority, a *authority.X509Authority, leaf *authority.Leaf, now time.Time) (*svid.Peer, error) {
	chain := [][]byte{leaf.DER}
	for _, c := range a.Chain {
		chain = append(chain, c.Raw)
	}
	return svid.VerifyRawChain(chain, ca.Bundle(), now)
}

var hostNames = rapid.SliceOfNDistinct(rapid.StringMatching(`[a-z][a-z0-9]{0,10}(\.[a-z][a-z0-9]{0,5}){0,3}`), 0, 4, rapid.ID[string])

// Every request that is signed gives an SVID which the strict verifier accepts,
// with exactly the names and the serial of the request, within its issuers' time.
func TestIssuedSVIDsHoldTheProfile(t *testing.T) {
	root := forge.New(t, "example.org")
	ends := map[time.Duration]*forge.Authority{}
	for _, d := range []time.Duration{time.Minute, time.Hour, 24 * time.Hour} {
		ends[d] = root.Intermediate(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(d) })
	}
	rapid.Check(t, func(rt *rapid.T) {
		issuer := ends[rapid.SampledFrom([]time.Duration{time.Minute, time.Hour, 24 * time.Hour}).Draw(rt, "issuer's life")]
		a := authorityOf(issuer)
		serial, err := svid.NewSerial(rapid.Uint64Range(0, svid.MaxAgent).Draw(rt, "agent"), rapid.Uint64Range(0, svid.MaxRevision).Draw(rt, "revision"))
		if err != nil {
			rt.Fatal(err)
		}
		req := request(func(r *authority.LeafRequest) {
			r.SPIFFEID = spiffeid.RequireFromPath(root.TrustDomain, rapid.StringMatching(`(/[a-zA-Z0-9_-]{1,20}){1,5}`).Draw(rt, "path"))
			r.Serial = serial
			r.TTL = time.Duration(rapid.IntRange(1, 48*3600).Draw(rt, "ttl")) * time.Second
			r.DNSNames = hostNames.Draw(rt, "names")
			r.CommonName = rapid.SampledFrom([]string{"", "postgres", "Ünï 1"}).Draw(rt, "cn")
		})
		leaf, err := a.Issue(req)
		if err != nil {
			rt.Fatal(err)
		}
		if leaf.NotAfter.After(a.NotAfter()) || leaf.NotBefore.Before(issuer.Cert.NotBefore) {
			rt.Fatalf("valid %s to %s, outside its issuer", leaf.NotBefore, leaf.NotAfter)
		}
		if want := req.Now.Add(req.TTL).Truncate(time.Second); !leaf.Cut && !leaf.NotAfter.Equal(want) || leaf.Cut && leaf.NotAfter.After(want) {
			rt.Fatalf("NotAfter = %s, cut %t; asked for %s", leaf.NotAfter, leaf.Cut, want)
		}
		peer, err := verify(root, a, leaf, req.Now)
		if err != nil {
			rt.Fatal(err)
		}
		if peer.ID != req.SPIFFEID || peer.Serial != req.Serial || len(peer.Leaf.URIs) != 1 || !slices.Equal(peer.Leaf.DNSNames, req.DNSNames) {
			rt.Fatalf("the certificate says %+v; asked for %+v", peer, req)
		}
	})
}

func TestLeafIsBackdatedButNotBeforeItsIssuer(t *testing.T) {
	ca := forge.New(t, "example.org").Intermediate(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(-time.Hour) })
	req := request()
	leaf, err := authorityOf(ca).Issue(req)
	if err != nil {
		t.Fatal(err)
	}
	if want := req.Now.Add(-time.Minute).UTC().Truncate(time.Second); !leaf.NotBefore.Equal(want) {
		t.Errorf("NotBefore = %s; want %s", leaf.NotBefore, want)
	}
	fresh := forge.New(t, "example.org").Intermediate(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(-5 * time.Second) })
	if leaf, err = authorityOf(fresh).Issue(req); err != nil || leaf.NotBefore.Before(fresh.Cert.NotBefore) {
		t.Errorf("NotBefore = %v, %v; the issuer's is %s", leaf, err, fresh.Cert.NotBefore)
	}
}

func TestIssueCutsAtTheFirstEndOfTheChain(t *testing.T) {
	root := forge.New(t, "example.org", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(10 * time.Minute) })
	ca := root.Intermediate() // outlives its root
	leaf, err := authorityOf(ca).Issue(request())
	if err != nil {
		t.Fatal(err)
	}
	if !leaf.Cut || !leaf.NotAfter.Equal(root.Cert.NotAfter) {
		t.Errorf("NotAfter = %s, cut %t; the root ends at %s", leaf.NotAfter, leaf.Cut, root.Cert.NotAfter)
	}
	_, err = authorityOf(ca).Issue(request(func(r *authority.LeafRequest) { r.Now = r.Now.Add(11 * time.Minute) }))
	if err == nil || !strings.Contains(err.Error(), "issuing chain ended") {
		t.Errorf("Issue below an ended chain = %v", err)
	}
}

func TestIssueRefuses(t *testing.T) {
	a := newAuthority(t, "example.org")
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := func(s string) func(*authority.LeafRequest) {
		return func(r *authority.LeafRequest) { r.SPIFFEID = spiffeid.RequireFromString(s) }
	}
	dns := func(names ...string) func(*authority.LeafRequest) {
		return func(r *authority.LeafRequest) { r.DNSNames = names }
	}
	tests := map[string]struct {
		change func(*authority.LeafRequest)
		field  string
	}{
		"no ID":                       {func(r *authority.LeafRequest) { r.SPIFFEID = spiffeid.ID{} }, "spiffe_id"},
		"X3 the trust domain itself":  {id("spiffe://example.org"), "spiffe_id"},
		"B9 another trust domain":     {id("spiffe://example.com/web"), "spiffe_id"},
		"ID6 2049 bytes":              {id("spiffe://example.org/" + strings.Repeat("a", 2049-len("spiffe://example.org/"))), "spiffe_id"},
		"no key":                      {func(r *authority.LeafRequest) { r.PublicKey = nil }, "public_key"},
		"P-521":                       {func(r *authority.LeafRequest) { r.PublicKey = p521.Public() }, "public_key"},
		"zero serial":                 {func(r *authority.LeafRequest) { r.Serial = svid.Serial{} }, "serial"},
		"serial without randomness":   {func(r *authority.LeafRequest) { r.Serial.Random = 0 }, "serial"},
		"agent handle of 49 bits":     {func(r *authority.LeafRequest) { r.Serial.Agent = 1 << 48 }, "serial"},
		"revision of 40 bits":         {func(r *authority.LeafRequest) { r.Serial.Revision = 1 << 39 }, "serial"},
		"realm of 9 bits":             {func(r *authority.LeafRequest) { r.Serial.Realm = 1 << 8 }, "serial"},
		"no TTL":                      {func(r *authority.LeafRequest) { r.TTL = 0 }, "ttl"},
		"negative TTL":                {func(r *authority.LeafRequest) { r.TTL = -time.Hour }, "ttl"},
		"TTL of a year":               {func(r *authority.LeafRequest) { r.TTL = 365 * 24 * time.Hour }, "ttl"},
		"no time":                     {func(r *authority.LeafRequest) { r.Now = time.Time{} }, "now"},
		"wildcard":                    {dns("*.example.org"), "dns_names"},
		"empty name":                  {dns(""), "dns_names"},
		"address":                     {dns("10.0.0.1"), "dns_names"},
		"IPv6 address":                {dns("::1"), "dns_names"},
		"trailing dot":                {dns("web."), "dns_names"},
		"same name twice":             {dns("web", "WEB"), "dns_names"},
		"name with NUL":               {dns("web\x00.evil"), "dns_names"},
		"name with space":             {dns("a b"), "dns_names"},
		"long name":                   {dns(strings.Repeat("a.", 127) + "aa"), "dns_names"},
		"hyphen first":                {dns("-a"), "dns_names"},
		"common name too long":        {func(r *authority.LeafRequest) { r.CommonName = strings.Repeat("a", 65) }, "common_name"},
		"common name with a line end": {func(r *authority.LeafRequest) { r.CommonName = "a\nb" }, "common_name"},
		"common name not UTF-8":       {func(r *authority.LeafRequest) { r.CommonName = "\xff" }, "common_name"},
		"common name of spaces":       {func(r *authority.LeafRequest) { r.CommonName = " " }, "common_name"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			leaf, err := a.Issue(request(tt.change))
			e, ok := errors.AsType[*authority.InvalidError](err)
			if !ok || e.Field != tt.field || leaf != nil {
				t.Errorf("Issue = %v, %v; want a refusal for %s", leaf, err, tt.field)
			}
		})
	}
}

func TestIncompleteAuthoritiesSignNothing(t *testing.T) {
	good := newAuthority(t, "example.org")
	nameless := forge.New(t, "example.org").Intermediate(forge.URIs())
	workload := forge.New(t, "example.org").Intermediate(forge.URIs("spiffe://example.org/web"))
	for name, a := range map[string]*authority.X509Authority{
		"nil": nil, "zero": {}, "no root": {Chain: good.Chain, Signer: good.Signer}, "no signer": {Chain: good.Chain, Root: good.Root},
		"no chain": {Root: good.Root, Signer: good.Signer}, "issuer names no trust domain": authorityOf(nameless), "X6 issuer names a workload": authorityOf(workload),
		"key of another": {Chain: good.Chain, Root: good.Root, Signer: workloadKey},
	} {
		if leaf, err := a.Issue(request()); err == nil {
			t.Errorf("%s: Issue = %+v", name, leaf)
		}
	}
}

// countingSigner says how often the key was used; with wrong set, it gives a
// signature of something else.
type countingSigner struct {
	crypto.Signer
	used  int
	wrong bool
}

func (s *countingSigner) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	s.used++
	if s.wrong {
		digest = bytes.Repeat([]byte{1}, len(digest))
	}
	return s.Signer.Sign(r, digest, opts)
}

// The key never touches what the profile forbids: here the subject key is the
// issuer's own, which no check of the request can see.
func TestLintComesBeforeTheKey(t *testing.T) {
	a := newAuthority(t, "example.org")
	signer := &countingSigner{Signer: a.Signer}
	a.Signer = signer
	_, err := a.Issue(request(func(r *authority.LeafRequest) { r.PublicKey = a.Chain[0].PublicKey }))
	if e, ok := errors.AsType[*authority.LintError](err); !ok || e.Rule != "X13" {
		t.Errorf("Issue = %v; want a lint error", err)
	}
	if signer.used != 0 {
		t.Errorf("the key was used %d times", signer.used)
	}
	if _, err := a.Issue(request()); err != nil || signer.used != 1 {
		t.Errorf("a sound request: %v, key used %d times", err, signer.used)
	}
}

// A faulty signature can betray the key: it never leaves.
func TestFaultySignaturesAreNotGivenOut(t *testing.T) {
	a := newAuthority(t, "example.org")
	a.Signer = &countingSigner{Signer: a.Signer, wrong: true}
	if leaf, err := a.Issue(request()); err == nil {
		t.Errorf("Issue = %+v", leaf)
	}
	j := &authority.JWTAuthority{TrustDomain: request().SPIFFEID.TrustDomain(), KeyID: "k", Signer: &countingSigner{Signer: mustKey(), wrong: true}}
	if token, _, err := j.Issue(jwtRequest()); err == nil {
		t.Errorf("Issue = %s", token)
	}
}

func TestEveryAcceptedKeyKindIsIssuedFor(t *testing.T) {
	root := forge.New(t, "example.org")
	a := authorityOf(root.Intermediate())
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{workloadKey, p384, rsa2048} {
		leaf, err := a.Issue(request(func(r *authority.LeafRequest) { r.PublicKey = key.Public() }))
		if err != nil {
			t.Fatalf("%T: %v", key, err)
		}
		if _, err := verify(root, a, leaf, time.Now()); err != nil {
			t.Errorf("%T: %v", key, err)
		}
	}
}

func jwtRequest(changes ...func(*authority.JWTRequest)) authority.JWTRequest {
	req := authority.JWTRequest{
		SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/web"), Audience: []string{"aud"},
		Serial: svid.Serial{Agent: 3, Revision: 17, Random: 99}, TTL: 5 * time.Minute, Now: time.Now(),
	}
	for _, change := range changes {
		change(&req)
	}
	return req
}

func jwtAuthority(ca *forge.Authority) *authority.JWTAuthority {
	return &authority.JWTAuthority{TrustDomain: ca.TrustDomain, KeyID: ca.KeyID, Signer: ca.JWTKey}
}

// J2, J13: headers alg, kid, typ and no others; aud is an array.
func TestJWTHasExactlyItsHeadersAndClaims(t *testing.T) {
	ca := forge.New(t, "example.org")
	req := jwtRequest(func(r *authority.JWTRequest) { r.Now = time.Unix(1_800_000_000, 5) })
	token, exp, err := jwtAuthority(ca).Issue(req)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(token, ".")
	for i, want := range []string{
		fmt.Sprintf(`{"alg":"ES256","kid":%q,"typ":"JWT"}`, ca.KeyID),
		fmt.Sprintf(`{"aud":["aud"],"exp":1800000300,"iat":1800000000,"jti":%q,"sub":"spiffe://example.org/web"}`, req.Serial),
	} {
		if got, _ := base64.RawURLEncoding.DecodeString(parts[i]); string(got) != want {
			t.Errorf("part %d = %s; want %s", i, got, want)
		}
	}
	if exp.Unix() != 1800000300 {
		t.Errorf("exp = %s", exp)
	}
}

// RS256, for clouds that need it: the key decides.
func TestJWTsOfAnRSAKeyAreRS256(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority.JWTAuthority{TrustDomain: jwtRequest().SPIFFEID.TrustDomain(), KeyID: "rsa-1", Signer: key}
	req := jwtRequest()
	token, _, err := a.Issue(req)
	if err != nil {
		t.Fatal(err)
	}
	head, _, _ := strings.Cut(token, ".")
	if got, _ := base64.RawURLEncoding.DecodeString(head); string(got) != `{"alg":"RS256","kid":"rsa-1","typ":"JWT"}` {
		t.Errorf("header = %s", got)
	}
	bundle := spiffebundle.New(a.TrustDomain)
	if err := bundle.AddJWTAuthority(a.KeyID, key.Public()); err != nil {
		t.Fatal(err)
	}
	published, err := bundle.Marshal() // as validators get it
	if err != nil {
		t.Fatal(err)
	}
	if bundle, err = spiffebundle.Parse(a.TrustDomain, published); err != nil {
		t.Fatal(err)
	}
	got, err := svid.VerifyJWT(token, bundle, req.Audience, req.Now)
	if err != nil || got.ID != req.SPIFFEID || got.Serial != req.Serial {
		t.Errorf("VerifyJWT = %+v, %v", got, err)
	}
	if _, err := jwtsvid.ParseAndValidate(token, bundle, req.Audience); err != nil {
		t.Errorf("go-spiffe refuses it: %v", err)
	}
}

func TestIssuedJWTsAreAccepted(t *testing.T) {
	ca := forge.New(t, "example.org")
	rapid.Check(t, func(rt *rapid.T) {
		req := jwtRequest(func(r *authority.JWTRequest) {
			r.Audience = rapid.SliceOfN(rapid.StringMatching(`[a-zA-Z0-9:/.<>&" é]{1,30}`), 1, 8).Draw(rt, "audience")
			r.TTL = time.Duration(rapid.IntRange(1, 3600).Draw(rt, "ttl")) * time.Second
		})
		token, exp, err := jwtAuthority(ca).Issue(req)
		if err != nil {
			rt.Fatal(err)
		}
		got, err := svid.VerifyJWT(token, ca.Bundle(), req.Audience[:1], req.Now)
		if err != nil {
			rt.Fatal(err)
		}
		if got.ID != req.SPIFFEID || !got.OurSerial || got.Serial != req.Serial || !slices.Equal(got.Audience, req.Audience) || !got.Expiry.Equal(exp) {
			rt.Fatalf("read as %+v; issued for %+v until %s", got, req, exp)
		}
		if _, err := jwtsvid.ParseAndValidate(token, ca.Bundle(), req.Audience); err != nil {
			rt.Fatalf("go-spiffe refuses it: %v", err)
		}
	})
}

func TestJWTIssueRefuses(t *testing.T) {
	a := jwtAuthority(forge.New(t, "example.org"))
	long := strings.Repeat("a", svid.MaxJWTBytes)
	tests := map[string]struct {
		change func(*authority.JWTRequest)
		field  string
	}{
		"no audience":          {func(r *authority.JWTRequest) { r.Audience = nil }, "audience"},
		"empty audience":       {func(r *authority.JWTRequest) { r.Audience = []string{"a", ""} }, "audience"},
		"nine audiences":       {func(r *authority.JWTRequest) { r.Audience = slices.Repeat([]string{"a"}, 9) }, "audience"},
		"audience not UTF-8":   {func(r *authority.JWTRequest) { r.Audience = []string{"\xff"} }, "audience"},
		"audience of 16 KiB":   {func(r *authority.JWTRequest) { r.Audience = []string{long} }, "audience"},
		"root path":            {func(r *authority.JWTRequest) { r.SPIFFEID = a.TrustDomain.ID() }, "spiffe_id"},
		"another trust domain": {func(r *authority.JWTRequest) { r.SPIFFEID = spiffeid.RequireFromString("spiffe://x/y") }, "spiffe_id"},
		"zero serial":          {func(r *authority.JWTRequest) { r.Serial = svid.Serial{} }, "serial"},
		"no TTL":               {func(r *authority.JWTRequest) { r.TTL = 0 }, "ttl"},
		"no time":              {func(r *authority.JWTRequest) { r.Now = time.Time{} }, "now"},
	}
	for name, tt := range tests {
		token, _, err := a.Issue(jwtRequest(tt.change))
		if e, ok := errors.AsType[*authority.InvalidError](err); !ok || e.Field != tt.field || token != "" {
			t.Errorf("%s: Issue = %q, %v; want a refusal for %s", name, token, err, tt.field)
		}
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, a := range map[string]*authority.JWTAuthority{
		"nil": nil, "zero": {}, "no key ID": {TrustDomain: a.TrustDomain, Signer: a.Signer},
		"RSA of 1024 bits": {TrustDomain: a.TrustDomain, KeyID: "k", Signer: forge.NewRSAKey(t, 1024, 65537)},
		"no trust domain":  {KeyID: "k", Signer: a.Signer}, "P-384": {TrustDomain: a.TrustDomain, KeyID: "k", Signer: p384},
	} {
		if token, _, err := a.Issue(jwtRequest()); err == nil {
			t.Errorf("%s: Issue = %s", name, token)
		}
	}
}

func BenchmarkIssue(b *testing.B) {
	a, req := newAuthority(b, "example.org"), request()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.Issue(req); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkIssueJWT has as many bare ES256 signatures beside it, in turn.
func BenchmarkIssueJWT(b *testing.B) {
	a, req := jwtAuthority(forge.New(b, "example.org")), jwtRequest()
	key, message := mustKey(), make([]byte, 300)
	const count = 100
	b.ReportAllocs()
	measure.Interleaved(b, count, measure.Variant{Name: "raw", Run: func() error {
		digest := sha256.Sum256(message)
		_, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		return err
	}}, measure.Variant{Name: "authority", Run: func() error {
		_, _, err := a.Issue(req)
		return err
	}})
}
