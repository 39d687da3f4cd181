// A checkpoint says what its key signed, in one form only, and holds its log to
// what it said before.

package checkpoint_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"merlon.dev/sdk/checkpoint"
)

func newKey(t testing.TB) (checkpoint.Key, ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return checkpoint.Key{TrustDomain: "shop.test", Replica: "ca-1", Public: public}, private
}

// storage holds the hashes of a tree.
type storage []tlog.Hash

func (s storage) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	var out []tlog.Hash
	for _, i := range indexes {
		out = append(out, s[i])
	}
	return out, nil
}

// treeOf makes a tree with n leaves, of which those from other on differ.
func treeOf(t testing.TB, n, other int64) storage {
	t.Helper()
	var s storage
	for i := range n {
		hashes, err := tlog.StoredHashes(i, leaf(i, other), s)
		if err != nil {
			t.Fatal(err)
		}
		s = append(s, hashes...)
	}
	return s
}

func leaf(i, other int64) []byte {
	if i >= other {
		return fmt.Appendf(nil, "other %d", i)
	}
	return fmt.Appendf(nil, "leaf %d", i)
}

func at(t testing.TB, s storage, n int64) checkpoint.Checkpoint {
	t.Helper()
	root, err := tlog.TreeHash(n, s)
	if err != nil {
		t.Fatal(err)
	}
	return checkpoint.Checkpoint{Origin: "shop.test/log/ca-1/00000000", Size: n, Root: root}
}

func TestSignedCheckpointComesBack(t *testing.T) {
	key, private := newKey(t)
	signed, err := key.Sign(7, tlog.Hash{1, 2}, private)
	if err != nil {
		t.Fatal(err)
	}
	want := checkpoint.Checkpoint{Origin: key.Origin(), Size: 7, Root: tlog.Hash{1, 2}}
	if got, err := key.Open(signed); err != nil || got != want {
		t.Fatalf("Open = %+v, %v; want %+v", got, err, want)
	}
	if got, err := checkpoint.Unverified(signed); err != nil || got != want {
		t.Fatalf("Unverified = %+v, %v", got, err)
	}
	// Another implementation's verifier takes it.
	text, err := key.VerifierKey()
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := note.NewVerifier(text)
	if err != nil {
		t.Fatal(err)
	}
	n, err := note.Open(signed, note.VerifierList(verifier))
	if err != nil || !strings.HasPrefix(n.Text, key.Origin()+"\n7\n") {
		t.Fatalf("note = %+v, %v", n, err)
	}
}

func TestCheckpointOfOthersIsRefused(t *testing.T) {
	key, private := newKey(t)
	other, otherPrivate := newKey(t)
	signed, err := key.Sign(7, tlog.Hash{}, private)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Open(signed); err == nil {
		t.Error("a checkpoint of another key was taken")
	}
	if _, err := key.Open([]byte(strings.Replace(string(signed), "\n7\n", "\n8\n", 1))); err == nil {
		t.Error("a changed checkpoint was taken")
	}
	if _, err := (checkpoint.Key{}).Open(signed); err == nil {
		t.Error("the zero key took a checkpoint")
	}
	if _, err := key.Sign(7, tlog.Hash{}, otherPrivate); err == nil {
		t.Error("a signature by another key was given out")
	}
	if _, err := key.Open(append(signed, make([]byte, checkpoint.MaxBytes)...)); err == nil {
		t.Error("an endless checkpoint was read")
	}
	// The same key for another replica is another log.
	moved := key
	moved.Replica = "ca-2"
	if _, err := moved.Open(signed); err == nil {
		t.Error("a checkpoint of another replica was taken")
	}
}

func TestMalformedCheckpointsAreRefused(t *testing.T) {
	root := base64.StdEncoding.EncodeToString(make([]byte, 32))
	for name, text := range map[string]string{
		"no origin": "\n7\n" + root + "\n", "no root": "o\n7\n\n", "two lines": "o\n7\n", "extension": "o\n7\n" + root + "\nmore\n",
		"leading zero": "o\n07\n" + root + "\n", "negative": "o\n-1\n" + root + "\n", "plus": "o\n+7\n" + root + "\n",
		"endless tree": "o\n9223372036854775807\n" + root + "\n", "short root": "o\n7\nAAAA\n", "loose base64": "o\n7\n" + root[:43] + "B=\n",
		"no newline": "o\n7\n" + root,
	} {
		if got, err := checkpoint.Unverified([]byte(text + "\n— x AAAA\n")); err == nil {
			t.Errorf("%s: %+v was taken", name, got)
		}
	}
}

func TestForksAndRollbacksAreNoticed(t *testing.T) {
	honest, forked := treeOf(t, 100, 100), treeOf(t, 100, 60)
	proof := func(s storage, n, before int64) []tlog.Hash {
		p, err := tlog.ProveTree(n, before, s)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for name, test := range map[string]struct {
		now, before checkpoint.Checkpoint
		proof       []tlog.Hash
		fork        bool
	}{
		"grown":                        {at(t, honest, 100), at(t, honest, 70), proof(honest, 100, 70), false},
		"from nothing":                 {at(t, honest, 100), at(t, honest, 0), nil, false},
		"the same":                     {at(t, honest, 70), at(t, honest, 70), nil, false},
		"put back":                     {at(t, honest, 70), at(t, honest, 100), nil, true},
		"put back to nothing":          {at(t, honest, 0), at(t, honest, 100), nil, true},
		"other entries of one size":    {at(t, forked, 70), at(t, honest, 70), nil, true},
		"forked":                       {at(t, forked, 100), at(t, honest, 70), proof(forked, 100, 70), true},
		"forked with the honest proof": {at(t, forked, 100), at(t, honest, 70), proof(honest, 100, 70), true},
		"forked later":                 {at(t, forked, 100), at(t, honest, 50), proof(forked, 100, 50), false},
		"grown without proof":          {at(t, honest, 100), at(t, honest, 70), nil, true},
		"grown with a proof too long":  {at(t, honest, 100), at(t, honest, 70), append(proof(honest, 100, 70), tlog.Hash{}), true},
	} {
		if err := test.now.Follows(test.before, test.proof); errors.Is(err, checkpoint.ErrFork) != test.fork || !test.fork && err != nil {
			t.Errorf("%s: %v; want a fork: %v", name, err, test.fork)
		}
	}
	other := at(t, honest, 100)
	other.Origin = "shop.test/log/ca-1/11111111"
	if err := other.Follows(at(t, honest, 70), proof(honest, 100, 70)); err == nil || errors.Is(err, checkpoint.ErrFork) {
		t.Errorf("another log: %v; want an error that is no fork", err)
	}
}

func TestHolds(t *testing.T) {
	s := treeOf(t, 100, 100)
	c := at(t, s, 100)
	proof, err := tlog.ProveRecord(100, 42, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Holds(leaf(42, 100), 42, proof); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"another entry": c.Holds(leaf(43, 100), 42, proof), "another index": c.Holds(leaf(42, 100), 43, proof),
		"beyond the end": c.Holds(leaf(42, 100), 100, proof), "negative": c.Holds(leaf(42, 100), -1, proof), "no proof": c.Holds(leaf(42, 100), 42, nil),
	} {
		if err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

// issuer signs certificates for the tests.
type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (i *issuer) sign(t testing.TB, template *x509.Certificate, public any) *x509.Certificate {
	t.Helper()
	parent := template
	if i.cert != nil {
		parent = i.cert
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, i.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newRoot(t testing.TB, name string) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{key: key}
	i.cert = i.sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, key.Public())
	return i
}

func TestOnlyACertificateOfALogsKeyIsTaken(t *testing.T) {
	root, stranger := newRoot(t, "root"), newRoot(t, "stranger")
	key, _ := newKey(t)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := func(changes ...func(*x509.Certificate)) *x509.Certificate {
		c := &x509.Certificate{
			Subject:   pkix.Name{CommonName: "ca-1", OrganizationalUnit: []string{checkpoint.Unit}},
			NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute), BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		}
		for _, change := range changes {
			change(c)
		}
		return c
	}
	good := root.sign(t, template(), key.Public)
	got, err := checkpoint.VerifyChain([][]byte{good.Raw}, []*x509.Certificate{stranger.cert, root.cert}, "shop.test", time.Now())
	if err != nil || got.Origin() != key.Origin() {
		t.Fatalf("VerifyChain = %+v, %v; want %+v", got, err, key)
	}
	for name, chain := range map[string][][]byte{
		"of a stranger":    {stranger.sign(t, template(), key.Public).Raw},
		"for policy":       {root.sign(t, template(func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"policy"} }), key.Public).Raw},
		"without a unit":   {root.sign(t, template(func(c *x509.Certificate) { c.Subject.OrganizationalUnit = nil }), key.Public).Raw},
		"without a name":   {root.sign(t, template(func(c *x509.Certificate) { c.Subject.CommonName = "" }), key.Public).Raw},
		"with a SPIFFE ID": {root.sign(t, template(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "shop.test", Path: "/web"}} }), key.Public).Raw},
		"with a DNS name":  {root.sign(t, template(func(c *x509.Certificate) { c.DNSNames = []string{"a.test"} }), key.Public).Raw},
		"for TLS":          {root.sign(t, template(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), key.Public).Raw},
		"for TLS too":      {root.sign(t, template(func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) }), key.Public).Raw},
		"that signs":       {root.sign(t, template(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign }), key.Public).Raw},
		"of an ECDSA key":  {root.sign(t, template(), ec.Public()).Raw},
		"that ended":       {root.sign(t, template(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), key.Public).Raw},
		"none":             nil,
		"garbage":          {[]byte("x")},
		"too many":         {good.Raw, good.Raw, good.Raw, good.Raw, good.Raw, good.Raw, good.Raw, good.Raw, good.Raw},
	} {
		if got, err := checkpoint.VerifyChain(chain, []*x509.Certificate{root.cert}, "shop.test", time.Now()); err == nil {
			t.Errorf("%s: %+v was taken", name, got)
		}
	}
}

// TestHashOutlivesTheSignature: two signatures of one certificate are one SVID.
func TestHashOutlivesTheSignature(t *testing.T) {
	root := newRoot(t, "root")
	template := &x509.Certificate{NotBefore: time.Unix(1, 0), NotAfter: time.Unix(2, 0), SerialNumber: big.NewInt(5)}
	hashes := map[string]bool{}
	for range 2 {
		der, err := x509.CreateCertificate(rand.Reader, template, root.cert, root.key.Public(), root.key)
		if err != nil {
			t.Fatal(err)
		}
		hash, err := checkpoint.CertificateHash(der)
		if err != nil {
			t.Fatal(err)
		}
		hashes[hash] = true
	}
	if len(hashes) != 1 {
		t.Errorf("two signatures give %d hashes", len(hashes))
	}
	one, err := checkpoint.TokenHash("a.b.c")
	other, otherErr := checkpoint.TokenHash("a.b.d")
	if one != other || errors.Join(err, otherErr) != nil {
		t.Errorf("hashes of two signatures: %s, %s", one, other)
	}
	for _, bad := range []string{"", "a", "a.b", "a.b.c.d"} {
		if _, err := checkpoint.TokenHash(bad); err == nil {
			t.Errorf("%q was taken for a token", bad)
		}
	}
	if _, err := checkpoint.CertificateHash([]byte{0x30, 0x80}); err == nil {
		t.Error("garbage was taken for a certificate")
	}
}

func FuzzUnverified(f *testing.F) {
	key, private := newKey(f)
	signed, err := key.Sign(7, tlog.Hash{}, private)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(signed)
	f.Add([]byte("o\n1\n\n\n"))
	f.Fuzz(func(t *testing.T, signed []byte) {
		c, err := checkpoint.Unverified(signed)
		if err == nil {
			want := fmt.Sprintf("%s\n%d\n%s\n\n", c.Origin, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]))
			if !strings.HasPrefix(string(signed), want) || c.Size < 0 || c.Origin == "" {
				t.Fatalf("%q is taken for %+v", signed, c)
			}
		}
		if _, err := key.Open(signed); err == nil && c.Origin != key.Origin() {
			t.Fatalf("%q is taken for one of the key", signed)
		}
	})
}

func FuzzCertificateHash(f *testing.F) {
	f.Add(newRoot(f, "root").cert.Raw)
	f.Fuzz(func(t *testing.T, der []byte) {
		cert, err := x509.ParseCertificate(der)
		hash, hashErr := checkpoint.CertificateHash(der)
		if err != nil {
			return
		}
		if want := fmt.Sprintf("%x", sum(cert.RawTBSCertificate)); hashErr != nil || hash != want {
			t.Fatalf("CertificateHash = %s, %v; want %s", hash, hashErr, want)
		}
	})
}

func sum(b []byte) [sha256.Size]byte { return sha256.Sum256(b) }
