// Leaves under an intermediate that is known get the answer that they would get if it
// were not: whatever leaf, intermediate and roots say, and whenever.

package svid_test

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"pgregory.net/rapid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// What a certificate above can say of those below it, and a leaf of itself. Each is
// sound by itself.
var (
	speaks = map[string]forge.Change{
		"nothing": func(*x509.Certificate) {},
		"the own domain": func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"example.org"}, true
		},
		"another domain": func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"other.org"}, true
		},
		"not the own domain": func(c *x509.Certificate) {
			c.ExcludedURIDomains, c.PermittedDNSDomainsCritical = []string{"example.org"}, true
		},
		"one DNS name": func(c *x509.Certificate) {
			c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = []string{"a.test"}, true
		},
		"one network": func(c *x509.Certificate) {
			c.ExcludedIPRanges = []*net.IPNet{{IP: net.IPv4(10, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)}}
		},
		"no path length":      func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true },
		"policies explicitly": explicit,
		"some policy":         func(c *x509.Certificate) { c.Policies = []x509.OID{policy} },
		"no ID":               func(c *x509.Certificate) { c.URIs = nil },
		"other usages":        func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} },
	}
	claims = map[string]forge.Change{
		"nothing":             func(*x509.Certificate) {},
		"a DNS name":          func(c *x509.Certificate) { c.DNSNames = []string{"a.test"} },
		"another DNS name":    func(c *x509.Certificate) { c.DNSNames = []string{"b.test"} },
		"an address":          func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 1, 2, 3)} },
		"policies explicitly": explicit,
		"some policy":         func(c *x509.Certificate) { c.Policies = []x509.OID{policy} },
		"this policy":         func(c *x509.Certificate) { explicit(c); c.Policies = []x509.OID{policy} },
		"another domain":      forge.URIs("spiffe://other.org/a"),
		"a signing key":       func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
	}
	policy, _ = x509.OIDFromInts([]uint64{1, 2, 3})
)

func explicit(c *x509.Certificate) {
	required, err := asn1.Marshal(struct {
		Explicit int `asn1:"tag:0"`
	}{0})
	if err != nil {
		panic(err)
	}
	forge.Extension(asn1.ObjectIdentifier{2, 5, 29, 36}, true, required)(c)
}

func TestKnownIssuerChangesNoAnswer(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	at := func(n int) time.Time { return now.Add(time.Duration(n) * time.Minute) }
	known, other := 0, forge.New(t, "other.org").Bundle().X509Bundle()
	rapid.Check(t, func(rt *rapid.T) {
		what := func(from map[string]forge.Change, label string) forge.Change {
			return from[rapid.SampledFrom(slices.Sorted(func(yield func(string) bool) {
				for name := range from {
					if !yield(name) {
						return
					}
				}
			})).Draw(rt, label)]
		}
		mostlyNothing := func(label string) forge.Change {
			if rapid.IntRange(0, 2).Draw(rt, label+" speaks") > 0 {
				return speaks["nothing"]
			}
			return what(speaks, label)
		}
		life := func(label string) forge.Change {
			from := rapid.IntRange(0, 2).Draw(rt, label+" from")
			return lives(at(from), at(from+rapid.IntRange(2, 9).Draw(rt, label+" lives")))
		}
		ca := forge.New(t, "example.org", life("root"), mostlyNothing("root"))
		bundle := ca.Bundle().X509Bundle()
		if rapid.Bool().Draw(rt, "two roots") {
			bundle.AddX509Authority(ca.Again(life("second root"), mostlyNothing("second root"), func(c *x509.Certificate) { c.SubjectKeyId = []byte("other") }))
		}
		issuer := ca.Intermediate(life("intermediate"), what(speaks, "intermediate"))
		switch rapid.IntRange(0, 9).Draw(rt, "in the bundle") {
		case 0:
			bundle.AddX509Authority(issuer.Cert)
		case 1, 2: // its key and name, and nobody above
			bundle.AddX509Authority(issuer.Again(life("its root"), what(speaks, "its root"), func(c *x509.Certificate) { c.SubjectKeyId = []byte("its own") }))
		}
		set := x509bundle.NewSet(bundle, other)
		trust := svid.NewTrust(set)
		for range 4 {
			when := at(rapid.IntRange(0, 8).Draw(rt, "when")).Add(time.Duration(rapid.IntRange(-1, 1).Draw(rt, "nearly")))
			leaf := issuer.Leaf("/a", lives(at(-1), at(rapid.IntRange(4, 12).Draw(rt, "leaf lives"))), what(claims, "leaf")).Chain
			switch rapid.IntRange(0, 9).Draw(rt, "damage") {
			case 0: // of another key with the same name
				impostor := ca.Intermediate(func(c *x509.Certificate) { c.Subject, c.SubjectKeyId = issuer.Cert.Subject, issuer.Cert.SubjectKeyId })
				leaf[0] = impostor.Leaf("/a").Chain[0]
			case 1:
				leaf = leaf[:1]
			case 2:
				leaf = append(leaf, ca.Cert)
			case 3, 4: // one more path
				leaf = append(leaf, issuer.Again(life("another intermediate"), what(speaks, "another intermediate"), func(c *x509.Certificate) { c.SubjectKeyId = []byte("another") }))
			}
			want, wantErr := svid.VerifyChain(leaf, set, when)
			known += trust.Issuers(ca.TrustDomain)
			got, err := trust.VerifyChain(leaf, when)
			if ruleOf(err) != ruleOf(wantErr) {
				rt.Fatalf("at %s: %v; VerifyChain says %v", when, err, wantErr)
			}
			if err == nil && (got.ID != want.ID || !got.NotAfter.Equal(want.NotAfter) || !slices.Equal(got.AuthorityIDs, want.AuthorityIDs)) {
				rt.Fatalf("at %s: %+v; VerifyChain says %+v", when, got, want)
			}
		}
	})
	if known == 0 {
		t.Error("no intermediate was ever known")
	}
}

// ruleOf is what a chain is refused by, and empty for one that is not.
func ruleOf(err error) string {
	if e, ok := errors.AsType[*svid.Error](err); ok {
		return e.Rule
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

func TestWhichIssuersAreRemembered(t *testing.T) {
	for name, tt := range map[string]struct {
		root, issuer forge.Change
		want         int
	}{
		"plain":                                  {speaks["nothing"], speaks["nothing"], 1},
		"limited to the own domain, as the CA's": {speaks["nothing"], speaks["the own domain"], 1},
		"under a root that limits names":         {speaks["the own domain"], speaks["nothing"], 0},
		"with policies":                          {speaks["nothing"], func(c *x509.Certificate) { explicit(c); speaks["some policy"](c) }, 0},
		"under a root that wants explicit ones":  {explicit, speaks["some policy"], 0},
	} {
		ca := forge.New(t, "example.org", tt.root)
		issuer, trust := ca.Intermediate(tt.issuer), trustIn(ca)
		first, err := trust.VerifyChain(issuer.Leaf("/a", speaks["some policy"]).Chain, time.Now())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := trust.Issuers(ca.TrustDomain); got != tt.want {
			t.Errorf("%s: %d are remembered; want %d", name, got, tt.want)
		}
		second, err := trust.VerifyChain(issuer.Leaf("/b", speaks["some policy"]).Chain, time.Now())
		if err != nil || !slices.Equal(second.AuthorityIDs, first.AuthorityIDs) {
			t.Errorf("%s: the second leaf: %+v, %v", name, second, err)
		}
		if trust.Forget(); trust.Issuers(ca.TrustDomain) != 0 {
			t.Errorf("%s: Forget leaves it", name)
		}
	}
}

// A root with the intermediate's name and key is another path, also where the first leaf
// has none to it.
func TestRootOfTheIssuersNameIsAnotherPath(t *testing.T) {
	ca := forge.New(t, "example.org")
	issuer, bundle := ca.Intermediate(), ca.Bundle().X509Bundle()
	bundle.AddX509Authority(issuer.Again(speaks["one network"], func(c *x509.Certificate) { c.SubjectKeyId = []byte("its own") }))
	trust := svid.NewTrust(x509bundle.NewSet(bundle))
	for _, claim := range []string{"an address", "nothing"} {
		want := map[string]int{"an address": 2, "nothing": 3}[claim]
		peer, err := trust.VerifyChain(issuer.Leaf("/a", claims[claim]).Chain, time.Now())
		if err != nil || len(peer.AuthorityIDs) != want {
			t.Errorf("a leaf that claims %s: %+v, %v; want %d authorities", claim, peer, err, want)
		}
	}
	if n := trust.Issuers(ca.TrustDomain); n != 0 {
		t.Errorf("%d intermediates are remembered", n)
	}
}

// Whoever makes intermediates, and there may be such who should not, fills no memory.
func TestRememberedIssuersAreBounded(t *testing.T) {
	ca := forge.New(t, "example.org")
	trust := trustIn(ca)
	for range 100 {
		if _, err := trust.VerifyChain(ca.Intermediate().Leaf("/a").Chain, time.Now()); err != nil {
			t.Fatal(err)
		}
		if n := trust.Issuers(ca.TrustDomain); n > 64 {
			t.Fatalf("%d intermediates are remembered", n)
		}
	}
}

// What is known is one certificate, for as long as it lives and by these roots: not its
// name, its key or where it stood.
func TestKnownIssuerVouchesForNoOther(t *testing.T) {
	ca, stranger := forge.New(t, "example.org"), forge.New(t, "example.org")
	issuer := ca.Intermediate(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Hour) })
	trust := trustIn(ca)
	know := func() {
		t.Helper()
		if _, err := trust.VerifyChain(issuer.Leaf("/a").Chain, time.Now()); err != nil || trust.Issuers(ca.TrustDomain) != 1 {
			t.Fatalf("%v; %d are known, want 1", err, trust.Issuers(ca.TrustDomain))
		}
	}
	damaged := slices.Clone(issuer.Cert.Raw)
	damaged[len(damaged)-1] ^= 1 // of the signature
	unsigned, err := x509.ParseCertificate(damaged)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		above *x509.Certificate
		when  time.Time
	}{
		"the same once it has ended":             {issuer.Cert, issuer.Cert.NotAfter.Add(time.Second)},
		"the same before it begins":              {issuer.Cert, issuer.Cert.NotBefore.Add(-time.Second)},
		"its key and name, signed by a stranger": {issuer.CrossSigned(stranger), time.Now()},
		"its key and name, ended":                {issuer.Again(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), time.Now()},
		"its key and name, no authority":         {issuer.Again(func(c *x509.Certificate) { c.IsCA = false }), time.Now()},
		"its bytes with another signature":       {unsigned, time.Now()},
	} {
		know()
		leaf := issuer.Leaf("/b", lives(time.Now().Add(-24*time.Hour), time.Now().Add(24*time.Hour)))
		if _, err := trust.VerifyChain([]*x509.Certificate{leaf.Chain[0], tt.above}, tt.when); ruleOf(err) == "" {
			t.Errorf("%s: the leaf below it is let in", name)
		}
		trust.Forget()
	}
	// The same under other trust.
	know()
	_, err = trustIn(stranger).VerifyChain(issuer.Leaf("/c").Chain, time.Now())
	checkRule(t, err, "X13")
}
