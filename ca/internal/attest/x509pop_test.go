// Certificates as evidence: which of them prove a node, what the node is called,
// and that nothing that was tampered with makes it another.

package attest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"merlon.dev/sdk/possession"
)

// site is a CA of somebody else's.
type site struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newSite(t testing.TB) *site {
	t.Helper()
	s := &site{key: newECDSA(t, elliptic.P256())}
	s.cert = s.issue(t, s.key, &x509.Certificate{
		Subject: pkix.Name{CommonName: "site"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return s
}

func newECDSA(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issue signs template for key; a site without a certificate signs its own.
func (s *site) issue(t testing.TB, key crypto.Signer, template *x509.Certificate) *x509.Certificate {
	t.Helper()
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent := s.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), s.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// below is an intermediate of s.
func (s *site) below(t testing.TB) *site {
	t.Helper()
	key := newECDSA(t, elliptic.P256())
	return &site{key: key, cert: s.issue(t, key, &x509.Certificate{
		Subject: pkix.Name{CommonName: "below"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})}
}

func nodeCert() *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: "rack1-7"}, DNSNames: []string{"rack1-7.dc.test"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func (s *site) attestor(name string) *POP {
	roots := x509.NewCertPool()
	roots.AddCert(s.cert)
	return &POP{TrustDomain: td, Roots: roots, Name: name}
}

var popStatement = []byte("what the connection says")

func signPOP(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	signature, err := possession.Sign(key, popStatement)
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

func raw(certs ...*x509.Certificate) (chain [][]byte) {
	for _, c := range certs {
		chain = append(chain, c.Raw)
	}
	return chain
}

func TestCertificateNamesItsNode(t *testing.T) {
	root := newSite(t)
	issuer := root.below(t)
	key := newECDSA(t, elliptic.P384())
	leaf := issuer.issue(t, key, nodeCert())
	for name, want := range map[string]string{
		popByKey:        "x509pop/" + hexSHA256(leaf.RawSubjectPublicKeyInfo),
		popByCommonName: "x509pop/cn/rack1-7",
		popByDNSName:    "x509pop/dns/rack1-7.dc.test",
	} {
		n, err := root.attestor(name).Prove(raw(leaf, issuer.cert), signPOP(t, key), popStatement, time.Now())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := n.ID.String(); got != "spiffe://shop.test/agent/"+want {
			t.Errorf("%s: the node is called %s; want …/%s", name, got, want)
		}
		var facts []string
		for _, sel := range n.Selectors {
			facts = append(facts, sel.String())
		}
		if wantFacts := []string{
			"x509pop:key-sha256:" + hexSHA256(leaf.RawSubjectPublicKeyInfo), "x509pop:subject-cn:rack1-7", "x509pop:dns:rack1-7.dc.test",
			"x509pop:ca-key-sha256:" + hexSHA256(issuer.cert.RawSubjectPublicKeyInfo), "x509pop:ca-key-sha256:" + hexSHA256(root.cert.RawSubjectPublicKeyInfo),
		}; !slices.Equal(facts, wantFacts) {
			t.Errorf("%s: selectors = %q; want %q", name, facts, wantFacts)
		}
	}
}

func TestCertificatesThatProveNothing(t *testing.T) {
	root, stranger := newSite(t), newSite(t)
	key := newECDSA(t, elliptic.P256())
	with := func(by *site, change func(*x509.Certificate)) [][]byte {
		template := nodeCert()
		change(template)
		return raw(by.issue(t, key, template))
	}
	good := with(root, func(*x509.Certificate) {})
	deep := root
	var long [][]byte
	for range maxPOPChain {
		deep = deep.below(t)
		long = append(raw(deep.cert), long...)
	}
	p224 := newECDSA(t, elliptic.P224())
	for name, tc := range map[string]struct {
		chain     [][]byte
		signature []byte
		by        string
		want      Reason
	}{
		"no certificate":   {nil, nil, "", Malformed},
		"no DER":           {[][]byte{{1, 2}}, nil, "", Malformed},
		"too long a chain": {append(raw(deep.issue(t, key, nodeCert())), long...), nil, "", Malformed},
		"too large":        {[][]byte{make([]byte, maxPOPBytes+1)}, nil, "", Malformed},
		"too large, and in order": {with(root, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 3, 6, 1, 4, 1, 99999, 1}, Value: make([]byte, maxPOPBytes)}}
		}), nil, "", Malformed},
		"a key that is not taken":   {raw(root.issue(t, p224, nodeCert())), nil, "", Malformed},
		"of a stranger":             {with(stranger, func(*x509.Certificate) {}), nil, "", Untrusted},
		"by a stranger's authority": {append(with(stranger, func(*x509.Certificate) {}), stranger.cert.Raw), nil, "", Untrusted},
		"self-signed":               {raw((&site{key: key}).issue(t, key, nodeCert())), nil, "", Untrusted},
		"expired": {with(root, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}), nil, "", Untrusted},
		"not valid yet": {with(root, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
		}), nil, "", Untrusted},
		"an authority":                {with(root, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), nil, "", NotAllowed},
		"no digital signature":        {with(root, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), nil, "", NotAllowed},
		"no key usage":                {with(root, func(c *x509.Certificate) { c.KeyUsage = 0 }), nil, "", NotAllowed},
		"for servers only":            {with(root, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), nil, "", Untrusted},
		"an issuer that is no CA":     {raw((&site{cert: root.issue(t, key, nodeCert()), key: key}).issue(t, key, nodeCert()), root.issue(t, key, nodeCert())), nil, "", Untrusted},
		"no signature":                {good, []byte{}, "", NotProved},
		"a signature of another's":    {good, signPOP(t, newECDSA(t, elliptic.P256())), "", NotProved},
		"a signature that is too big": {good, make([]byte, maxPOPSignature+1), "", Malformed},
		"a name that is no segment":   {with(root, func(c *x509.Certificate) { c.Subject.CommonName = "a/b" }), nil, popByCommonName, NotAllowed},
		"a name with a space":         {with(root, func(c *x509.Certificate) { c.Subject.CommonName = "a b" }), nil, popByCommonName, NotAllowed},
		"no name":                     {with(root, func(c *x509.Certificate) { c.Subject.CommonName = "" }), nil, popByCommonName, NotAllowed},
		"two DNS names":               {with(root, func(c *x509.Certificate) { c.DNSNames = []string{"a", "b"} }), nil, popByDNSName, NotAllowed},
		"a wildcard":                  {with(root, func(c *x509.Certificate) { c.DNSNames = []string{"*.dc.test"} }), nil, popByDNSName, NotAllowed},
	} {
		signature := tc.signature
		if signature == nil {
			signature = signPOP(t, key)
		}
		n, err := root.attestor(tc.by).Prove(tc.chain, signature, popStatement, time.Now())
		wantRefusal(t, name, n, err, tc.want)
	}
	if _, err := root.attestor("").Prove(good, signPOP(t, key), popStatement, time.Now()); err != nil {
		t.Errorf("the certificate that all of these were made from is refused: %v", err)
	}
	if n, err := root.attestor("").Prove(good, signPOP(t, key), []byte("of another connection"), time.Now()); err == nil {
		t.Errorf("a signature was replayed: %v", n)
	}
}

func wantRefusal(t testing.TB, what string, n *Node, err error, want Reason) {
	t.Helper()
	e, ok := errors.AsType[*RefusedError](err)
	switch {
	case n != nil || !ok:
		t.Errorf("%s: proved %v, error %v; want a refusal", what, n, err)
	case e.Reason != want:
		t.Errorf("%s: refused as %s (%v); want %s", what, e.Reason, err, want)
	case len(e.Detail) < 20 || strings.ContainsAny(e.Error(), "\n\x00"):
		t.Errorf("%s: the refusal says %q", what, e)
	}
}

// Whoever changes a byte of good evidence is refused, or proves the same node.
func TestTamperedCertificateIsNoOtherNode(t *testing.T) {
	root := newSite(t)
	issuer := root.below(t)
	key := newECDSA(t, elliptic.P256())
	chain := raw(issuer.issue(t, key, nodeCert()), issuer.cert)
	signature := signPOP(t, key)
	p := root.attestor("")
	want, err := p.Prove(chain, signature, popStatement, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		bad := [][]byte{slices.Clone(chain[0]), slices.Clone(chain[1]), slices.Clone(signature)}
		part := bad[rapid.IntRange(0, 2).Draw(t, "part")]
		part[rapid.IntRange(0, len(part)-1).Draw(t, "at")] ^= byte(rapid.IntRange(1, 255).Draw(t, "bits"))
		if got, err := p.Prove(bad[:2], bad[2], popStatement, time.Now()); err == nil && got.ID != want.ID {
			t.Fatalf("it proves %s; the certificate was that of %s", got.ID, want.ID)
		}
	})
}

func FuzzX509POP(f *testing.F) {
	root := newSite(f)
	key := newECDSA(f, elliptic.P256())
	leaf := root.issue(f, key, nodeCert())
	f.Add(leaf.Raw, root.cert.Raw, signPOP(f, key))
	f.Add([]byte{}, []byte{0x30}, []byte{})
	p := root.attestor("")
	want, err := p.Prove(raw(leaf), signPOP(f, key), popStatement, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, first, second, signature []byte) {
		n, err := p.Prove([][]byte{first, second}, signature, popStatement, time.Now())
		if (n == nil) == (err == nil) {
			t.Fatalf("proved %v, error %v", n, err)
		}
		if err == nil && n.ID != want.ID {
			t.Fatalf("%s was proved without the key of its certificate", n.ID)
		}
	})
}
