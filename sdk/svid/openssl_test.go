// What we accept, openssl accepts: another implementation of RFC 5280, by other
// people, in its strict mode. The other way round there are many differences, since
// openssl knows nothing of SPIFFE.

package svid_test

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"pgregory.net/rapid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// openssl judges chains by `openssl verify`.
type openssl struct{ path, dir string }

func findOpenSSL(t *testing.T) openssl {
	t.Helper()
	path, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed: apt-get install openssl")
	}
	return openssl{path, t.TempDir()}
}

// verify says why openssl refuses the chain, as a server's or as a client's.
func (o openssl) verify(t *testing.T, chain []*x509.Certificate, root *x509.Certificate, now time.Time) error {
	t.Helper()
	write := func(name string, certs ...*x509.Certificate) string {
		var text []byte
		for _, cert := range certs {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
		}
		path := filepath.Join(o.dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	options := []string{
		"-x509_strict", "-partial_chain", // as to SPIFFE, a root of the bundle need not be self-signed
		"-no-CApath", "-no-CAstore", "-attime", strconv.FormatInt(now.Unix(), 10),
		"-CAfile", write("root.pem", root),
	}
	if len(chain) > 1 {
		options = append(options, "-untrusted", write("untrusted.pem", chain[1:]...))
	}
	leaf := write("leaf.pem", chain[0])
	for _, purpose := range []string{"sslserver", "sslclient"} {
		args := slices.Concat([]string{"verify", "-purpose", purpose}, options, []string{leaf})
		if said, err := exec.CommandContext(t.Context(), o.path, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("openssl verify -purpose %s: %w: %s", purpose, err, said)
		}
	}
	return nil
}

var authorityKeyID = []int{2, 5, 29, 35}

func extension(oid []int, critical bool, value ...byte) forge.Change {
	return forge.Extension(oid, critical, value)
}

func none(*x509.Certificate) {}

// What an authority may do to any certificate, to those of authorities and to
// leaves; much of it is sound.
var (
	oddities = map[string]forge.Change{
		"as it should be":                none,
		"expired":                        expired,
		"not yet":                        notYet,
		"no keyUsage":                    noKeyUsage,
		"no basicConstraints":            noBasicConstraints,
		"unknown critical":               unknownCritical,
		"unknown":                        extension([]int{1, 2, 3, 4}, false, 5, 0),
		"any usage":                      anyUsage,
		"server only":                    serverOnly,
		"code signing":                   codeSigning,
		"no extended key usage":          func(c *x509.Certificate) { c.ExtKeyUsage = nil },
		"no subject":                     func(c *x509.Certificate) { c.Subject = pkix.Name{} },
		"no subject key ID":              noSubjectKeyID,
		"empty authority key ID":         extension(authorityKeyID, false, 0x30, 0),
		"another's authority key ID":     extension(authorityKeyID, false, 0x30, 3, 0x80, 1, 7),
		"certificate policies":           extension([]int{2, 5, 29, 32}, true, 0x30, 8, 0x30, 6, 6, 4, 0x55, 0x1d, 0x20, 0),
		"policy constraints":             extension([]int{2, 5, 29, 36}, true, 0x30, 3, 0x80, 1, 0),
		"inhibit any policy":             extension([]int{2, 5, 29, 54}, true, 2, 1, 0),
		"every key usage of authorities": usage(x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign),
		"key agreement and signatures":   usage(x509.KeyUsageDigitalSignature | x509.KeyUsageKeyAgreement),
		"keyUsage with trailing zeros":   extension(forge.KeyUsage, true, 3, 3, 0, 0x84, 0),
		"longer names":                   func(c *x509.Certificate) { c.DNSNames, c.EmailAddresses = []string{"web.test"}, []string{"a@web.test"} },
		"basicConstraints not critical":  extension(forge.BasicConstraints, false, 0x30, 0),
		"CA:TRUE and a path length":      extension(forge.BasicConstraints, true, 0x30, 6, 1, 1, 0xff, 2, 1, 0),
	}
	oddAuthorities = map[string]forge.Change{
		"CA:FALSE":              func(c *x509.Certificate) { c.IsCA, c.MaxPathLen, c.MaxPathLenZero = false, -1, false },
		"CA:TRUE not critical":  uncriticalCAIsTrue,
		"keyUsage not critical": uncriticalCertSign,
		"CRLs only":             usage(x509.KeyUsageCRLSign),
		"no path below": func(c *x509.Certificate) {
			if c.IsCA {
				c.MaxPathLen, c.MaxPathLenZero = 0, true
			}
		},
		"without URI":                forge.URIs(),
		"for its own trust domain":   func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} },
		"for another trust domain":   func(c *x509.Certificate) { c.PermittedURIDomains = []string{"other.org"} },
		"not for its trust domain":   func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"example.org"} },
		"for hosts below its domain": func(c *x509.Certificate) { c.PermittedURIDomains = []string{".example.org"} },
		"for DNS names":              func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"web.test"} },
		"not for DNS names":          func(c *x509.Certificate) { c.ExcludedDNSDomains = []string{"test"} },
	}
	oddLeaves = map[string]forge.Change{
		"CA:TRUE":               isCA,
		"keyUsage not critical": uncriticalKeyUsage,
		"SAN not critical":      forge.RawURIs(false, "spiffe://example.org/a"),
		"a name":                withName,
		"key agreement only":    usage(x509.KeyUsageKeyAgreement),
	}
)

func joined(a, b map[string]forge.Change) map[string]forge.Change {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

// judged compares the two verdicts, ours also by a Trust, and says whether we accept.
func judged(t *testing.T, o openssl, chain []*x509.Certificate, ca *forge.Authority) (accepted bool, err error) {
	t.Helper()
	now, bundle := time.Now(), ca.Bundle().X509Bundle()
	_, ours := svid.VerifyChain(chain, bundle, now)
	_, trusts := svid.NewTrust(x509bundle.NewSet(bundle)).VerifyChain(chain, now)
	switch {
	case (ours == nil) != (trusts == nil):
		return false, fmt.Errorf("VerifyChain says %v; a Trust %v", ours, trusts)
	case ours != nil:
		return false, nil
	}
	return true, o.verify(t, chain, ca.Root().Cert, now)
}

// Each oddity alone, in the leaf, in the intermediate and in the root.
func TestOpenSSLAcceptsWhatWeAccept(t *testing.T) {
	o := findOpenSSL(t)
	authorities, leaves := joined(oddities, oddAuthorities), joined(oddities, oddLeaves)
	accepted := make(map[string]int)
	check := func(where, name string, ca *forge.Authority, leaf *forge.SVID) {
		ok, err := judged(t, o, leaf.Chain, ca)
		if err != nil {
			t.Errorf("%s, %s: we accept it: %v", where, name, err)
		}
		if ok {
			accepted[where]++
		}
	}
	for name, odd := range leaves {
		ca := forge.New(t, "example.org").Intermediate()
		check("leaf", name, ca, ca.Leaf("/a", odd))
	}
	for name, odd := range authorities {
		ca := forge.New(t, "example.org").Intermediate(odd)
		check("intermediate", name, ca, ca.Leaf("/a", withName))
		ca = forge.New(t, "example.org", odd)
		check("root", name, ca, ca.Leaf("/a", withName))
	}
	t.Logf("accepted by both: %v", accepted)
	for _, where := range []string{"leaf", "intermediate", "root"} {
		if accepted[where] < 3 {
			t.Errorf("of the odd ones in the %s %d are accepted: the comparison says little", where, accepted[where])
		}
	}
}

// Several oddities at once, at any depth.
func TestOpenSSLAcceptsWhatWeAcceptOfMany(t *testing.T) {
	o := findOpenSSL(t)
	draw := func(rt *rapid.T, label string, from map[string]forge.Change) forge.Change {
		names := rapid.SliceOfNDistinct(rapid.SampledFrom(slices.Sorted(maps.Keys(from))), 0, 2, rapid.ID[string]).Draw(rt, label)
		return func(c *x509.Certificate) {
			for _, name := range names {
				from[name](c)
			}
		}
	}
	authorities, leaves := joined(oddities, oddAuthorities), joined(oddities, oddLeaves)
	rapid.Check(t, func(rt *rapid.T) {
		ca := forge.New(t, "example.org", draw(rt, "root", authorities))
		for range rapid.IntRange(0, 2).Draw(rt, "intermediates") {
			ca = ca.Intermediate(draw(rt, "intermediate", authorities))
		}
		if _, err := judged(t, o, ca.Leaf("/a", draw(rt, "leaf", leaves)).Chain, ca); err != nil {
			rt.Fatal(err)
		}
	})
}

// Any bytes of a leaf, signed as they are.
func TestOpenSSLAcceptsWhatWeAcceptOfBytes(t *testing.T) {
	o, ca := findOpenSSL(t), forge.New(t, "example.org")
	leaf := ca.Leaf("/a", withName).Chain[0]
	tbs := leaf.RawTBSCertificate
	// Each extension left out: it becomes one that nobody knows.
	for _, ext := range leaf.Extensions {
		id, err := asn1.Marshal(ext.Id)
		if err != nil {
			t.Fatal(err)
		}
		unknown := slices.Clone(id)
		unknown[len(unknown)-1] = 0x7f
		der := ca.SignTBS(bytes.Replace(tbs, id, unknown, 1))
		lacking, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := judged(t, o, []*x509.Certificate{lacking}, ca); err != nil {
			t.Errorf("without extension %s: %v", ext.Id, err)
		}
	}
	random := rand.New(rand.NewPCG(7, 7)) // the same bytes each time; the fuzz test is for others
	for range 300 {
		altered := slices.Clone(tbs)
		for range 1 + random.IntN(2) {
			altered[random.IntN(len(tbs))] = byte(random.Uint32())
		}
		der := ca.SignTBS(altered)
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			continue
		}
		if _, err := judged(t, o, []*x509.Certificate{leaf}, ca); err != nil {
			t.Errorf("%x: %v", der, err)
		}
	}
}
