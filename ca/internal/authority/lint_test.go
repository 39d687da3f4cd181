// Each lint rule sees the flaw that it is there for: a template that breaks one
// rule is signed by nobody.

package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func TestLintSeesEachFlaw(t *testing.T) {
	ca := forge.New(t, "example.org").Intermediate()
	a := &X509Authority{Chain: []*x509.Certificate{ca.Cert}, Root: ca.Root().Cert, Signer: ca.Key}
	if err := a.ready(); err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	req := LeafRequest{
		SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/web"), PublicKey: key.Public(),
		Serial: svid.Serial{Agent: 1, Revision: 2, Random: 3}, TTL: time.Hour, DNSNames: []string{"web"}, Now: time.Now(),
	}
	oidSKI, oidAKI := []int{2, 5, 29, 14}, []int{2, 5, 29, 35}
	otherID := &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/other"}
	seen := make(map[string]bool)
	tests := map[string]struct {
		spoil func(c *x509.Certificate)
		rule  string
	}{
		"nothing":                    {func(*x509.Certificate) {}, ""},
		"X1 no URI":                  {func(c *x509.Certificate) { c.URIs = nil }, "X1"},
		"X1 another ID":              {func(c *x509.Certificate) { c.URIs = []*url.URL{otherID} }, "X1"},
		"X1 two IDs":                 {func(c *x509.Certificate) { c.URIs = append(c.URIs, otherID) }, "X1"},
		"X1 DNS name more":           {func(c *x509.Certificate) { c.DNSNames = []string{"web", "db"} }, "X1"},
		"X1 address":                 {func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(1, 2, 3, 4)} }, "X1"},
		"X1 email":                   {func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b"} }, "X1"},
		"X5 subject":                 {func(c *x509.Certificate) { c.Subject.CommonName = "web" }, "X5"},
		"X5 organization":            {func(c *x509.Certificate) { c.Subject.Organization = []string{"x"} }, "X5"},
		"X5 SAN not critical":        {forge.RawURIs(false, "spiffe://example.org/web"), "X10"},
		"X8 CA":                      {func(c *x509.Certificate) { c.IsCA = true }, "X8"},
		"X8 no basicConstraints":     {func(c *x509.Certificate) { c.BasicConstraintsValid = false }, "X10"},
		"X10 keyUsage not critical":  {forge.Extension(forge.KeyUsage, false, []byte{3, 2, 7, 128}), "X10"},
		"X10 no keyUsage":            {func(c *x509.Certificate) { c.KeyUsage = 0 }, "X10"},
		"X11 keyCertSign":            {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, "X11"},
		"X11 keyEncipherment":        {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment }, "X11"},
		"X12 serverAuth alone":       {func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, "X12"},
		"X12 one more usage":         {func(c *x509.Certificate) { c.UnknownExtKeyUsage = append(c.UnknownExtKeyUsage, []int{1, 2, 3}) }, "X12"},
		"X12 none":                   {func(c *x509.Certificate) { c.ExtKeyUsage = nil }, "X10"},
		"X13 no subject key ID":      {forge.Extension(oidSKI, false, []byte{4, 0}), "X13"},
		"X13 other subject key ID":   {forge.Extension(oidSKI, false, []byte{4, 1, 1}), "X13"},
		"X13 other authority key ID": {forge.Extension(oidAKI, false, []byte{0x30, 3, 0x80, 1, 1}), "X13"},
		"X13 too long":               {func(c *x509.Certificate) { c.NotAfter = ca.Cert.NotAfter.Add(time.Second) }, "X13"},
		"X13 longer than meant":      {func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Second) }, "X13"},
		"X13 too early":              {func(c *x509.Certificate) { c.NotBefore = ca.Cert.NotBefore.Add(-time.Second) }, "X13"},
		"X13 unknown extension":      {forge.Extension([]int{1, 2, 3}, false, []byte{5, 0}), "X13"},
		"X13 name constraints":       {func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"x"} }, "X13"},
		"T44 other serial":           {func(c *x509.Certificate) { c.SerialNumber = big.NewInt(5) }, "T44"},
		"T44 serial of 160 bits":     {func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 159) }, "T44"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			want, _, err := a.values(req)
			if err != nil {
				t.Fatal(err)
			}
			spoilt := *templateOf(req, want, ca.Cert)
			spoilt.ExtraExtensions = []pkix.Extension{}
			tt.spoil(&spoilt)
			signer := &lintingSigner{Signer: a.Signer, lint: func(tbs []byte) error { return lintLeaf(tbs, req, want, ca.Cert) }}
			_, err = x509.CreateCertificate(rand.Reader, &spoilt, ca.Cert, req.PublicKey, signer)
			seen[checkLint(t, err, tt.rule)] = true
		})
	}
	want, _, err := a.values(req)
	if err != nil {
		t.Fatal(err)
	}
	sound := templateOf(req, want, ca.Cert)
	lint := func(tbs []byte) error { return lintLeaf(tbs, req, want, ca.Cert) }
	// The wrong key, and the wrong issuer.
	_, err = x509.CreateCertificate(rand.Reader, sound, ca.Cert, other.Public(), &lintingSigner{ca.Key, lint})
	seen[checkLint(t, err, "X13")] = true
	_, err = x509.CreateCertificate(rand.Reader, sound, ca.Root().Cert, req.PublicKey, &lintingSigner{ca.Root().Key, lint})
	checkLint(t, err, "X13")
	seen[checkLint(t, lintFor(ca, key.Public(), sound, want, req, issuerNamed(ca.Cert, "other")), "X13")] = true
	withKey := req
	withKey.PublicKey = ca.Key.Public()
	issuers, _, err := a.values(withKey)
	if err != nil {
		t.Fatal(err)
	}
	seen[checkLint(t, lintFor(ca, ca.Key.Public(), templateOf(withKey, issuers, ca.Cert), issuers, withKey, ca.Cert), "X13")] = true
	withRootID := req
	withRootID.SPIFFEID = ca.TrustDomain.ID()
	rootID := *sound
	rootID.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org"}}
	seen[checkLint(t, lintFor(ca, key.Public(), &rootID, want, withRootID, ca.Cert), "X3")] = true
	withRSA := *ca.Cert
	withRSA.PublicKey = &rsa.PublicKey{N: big.NewInt(35), E: 65537}
	seen[checkLint(t, lintFor(ca, key.Public(), sound, want, req, &withRSA), "X13")] = true
	for _, rule := range leafRules {
		if !seen[rule.reason] {
			t.Errorf("no case of this test breaks %s: %s", rule.rule, rule.reason)
		}
	}
	for _, tbs := range [][]byte{nil, {0x30, 0}, []byte("hello"), append([]byte{0x30, 0}, 0)} {
		checkLint(t, lint(tbs), "X13")
	}
}

// Of all the bytes there are, one body is accepted for a request: whatever bit is
// another, and wherever one is missing or too much, nothing is signed.
func TestLintAcceptsOneEncodingOnly(t *testing.T) {
	ca := forge.New(t, "example.org").Intermediate()
	a := &X509Authority{Chain: []*x509.Certificate{ca.Cert}, Root: ca.Root().Cert, Signer: ca.Key}
	if err := a.ready(); err != nil {
		t.Fatal(err)
	}
	for _, cn := range []string{"", "postgres"} {
		req := LeafRequest{
			SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/web"), PublicKey: ecKey(t, elliptic.P256()).Public(),
			Serial: svid.Serial{Agent: 1, Revision: 2, Random: 3}, TTL: time.Hour, DNSNames: []string{"web", "db"}, CommonName: cn, Now: time.Now(),
		}
		want, _, err := a.values(req)
		if err != nil {
			t.Fatal(err)
		}
		tbs, err := a.form.encode(want)
		if err != nil {
			t.Fatal(err)
		}
		if err := lintLeaf(tbs, req, want, ca.Cert); err != nil {
			t.Fatal(err)
		}
		for i := range tbs {
			for bit := range 8 {
				other := bytes.Clone(tbs)
				other[i] ^= 1 << bit
				if lintLeaf(other, req, want, ca.Cert) == nil {
					t.Errorf("accepted with bit %d of octet %d flipped: %x", bit, i, other)
				}
			}
			if lintLeaf(slices.Delete(bytes.Clone(tbs), i, i+1), req, want, ca.Cert) == nil ||
				lintLeaf(slices.Insert(bytes.Clone(tbs), i, 0), req, want, ca.Cert) == nil {
				t.Errorf("accepted with an octet less or more at %d", i)
			}
		}
	}
}

// Whatever bytes come, what is accepted is what would have been written.
func FuzzLint(f *testing.F) {
	ca := forge.New(f, "example.org").Intermediate()
	a := &X509Authority{Chain: []*x509.Certificate{ca.Cert}, Root: ca.Root().Cert, Signer: ca.Key}
	if err := a.ready(); err != nil {
		f.Fatal(err)
	}
	req := LeafRequest{
		SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/web"), PublicKey: ecKey(f, elliptic.P256()).Public(),
		Serial: svid.Serial{Agent: 1, Revision: 2, Random: 3}, TTL: time.Hour, DNSNames: []string{"web"}, Now: time.Now(),
	}
	want, _, err := a.values(req)
	if err != nil {
		f.Fatal(err)
	}
	sound, err := a.form.encode(want)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sound)
	f.Add(ca.Cert.RawTBSCertificate)
	f.Fuzz(func(t *testing.T, tbs []byte) {
		if lintLeaf(tbs, req, want, ca.Cert) == nil && !bytes.Equal(tbs, sound) {
			t.Errorf("accepted for %x:\n%x", sound, tbs)
		}
	})
}

// lintingSigner hands what it should sign to the lint: it is a
// crypto.MessageSigner, to whom crypto/x509 gives the message.
type lintingSigner struct {
	crypto.Signer
	lint func(tbs []byte) error
}

func (s *lintingSigner) SignMessage(rand io.Reader, tbs []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := s.lint(tbs); err != nil {
		return nil, err
	}
	return crypto.SignMessage(s.Signer, rand, tbs, opts)
}

// templateOf is the profile of a leaf as crypto/x509 takes it.
func templateOf(req LeafRequest, v leafValues, issuer *x509.Certificate) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          v.serial.Big(),
		Subject:               pkix.Name{CommonName: v.commonName},
		NotBefore:             v.notBefore,
		NotAfter:              v.notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          v.key.id,
		AuthorityKeyId:        issuer.SubjectKeyId,
		DNSNames:              v.dnsNames,
		URIs:                  []*url.URL{req.SPIFFEID.URL()},
	}
}

// lintFor has a certificate made from template for pub below ca, and linted against
// another request or issuer.
func lintFor(ca *forge.Authority, pub crypto.PublicKey, template *x509.Certificate, want leafValues, req LeafRequest, issuer *x509.Certificate) error {
	lint := func(tbs []byte) error { return lintLeaf(tbs, req, want, issuer) }
	_, err := x509.CreateCertificate(rand.Reader, template, ca.Cert, pub, &lintingSigner{ca.Key, lint})
	return err
}

// issuerNamed is the issuer under another name.
func issuerNamed(issuer *x509.Certificate, name string) *x509.Certificate {
	renamed := *issuer
	renamed.RawSubject = []byte(name)
	return &renamed
}

// checkLint gives the reason of the refusal.
func checkLint(t *testing.T, err error, rule string) (reason string) {
	t.Helper()
	e, ok := errors.AsType[*LintError](err)
	switch {
	case rule == "" && err != nil:
		t.Errorf("a sound certificate: %v", err)
	case rule != "" && (!ok || e.Rule != rule):
		t.Errorf("lint = %v; want rule %s", err, rule)
	case ok:
		return e.Reason
	}
	return ""
}
