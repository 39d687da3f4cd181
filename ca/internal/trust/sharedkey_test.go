// Keys in the trust bundles of two trust domains: which, whoever came first.

package trust

import (
	"crypto/x509"
	"fmt"
	"reflect"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/sdk/svid/forge"
)

func TestSharedKeys(t *testing.T) {
	a, b := forge.New(t, partner.Name()), forge.New(t, partner.Name())
	// Who copies a key can certify it anew, for any name, without holding it.
	copied := b.CrossSigned(a)
	both := goSPIFFE(t, a)
	for name, test := range map[string]struct {
		other string
		want  int
	}{
		"another's":               {goSPIFFE(t, b), 0},
		"the root":                {document(member(t, x509Key(a), nil)), 1},
		"the JWT key":             {document(member(t, jwtKey(a.JWTKey.Public(), "x"), nil)), 1},
		"both":                    {document(member(t, x509Key(a), nil), member(t, jwtKey(a.JWTKey.Public(), "x"), nil)), 2},
		"root as JWT key":         {document(member(t, jwtKey(a.Cert.PublicKey, "x"), nil)), 1},
		"one kid for two keys":    {document(member(t, jwtKey(b.JWTKey.Public(), a.KeyID), nil)), 0},
		"its key, certified anew": {pemOf("CERTIFICATE", copied.Raw), 0}, // of b's key, see below
		"nothing":                 {`{"keys":[]}`, 0},
	} {
		documents := map[spiffeid.TrustDomain]*Document{partner: federatedOf(t, both).Document, td: federatedOf(t, test.other).Document}
		shared := SharedKeys(documents)
		if len(shared) != test.want {
			t.Errorf("%s: %v; want %d", name, shared, test.want)
		}
		for _, k := range shared {
			if k.What == "" || fmt.Sprint(k.With(td)) != "[partner.test]" || fmt.Sprint(k.With(partner)) != "["+td.Name()+"]" {
				t.Errorf("%s: %+v with %s and %s", name, k, k.With(td), k.With(partner))
			}
		}
	}
	documents := map[spiffeid.TrustDomain]*Document{partner: federatedOf(t, goSPIFFE(t, b)).Document, td: {X509: []*x509.Certificate{copied}}}
	if shared := SharedKeys(documents); len(shared) != 1 {
		t.Errorf("a key certified by another: %v; want one", shared)
	}
}

// Whatever three trust domains hold: each key of several is named with exactly those that
// hold it, and asking twice gives the same.
func TestSharedKeysProperty(t *testing.T) {
	var pool []*forge.Authority
	for range 4 {
		pool = append(pool, forge.New(t, partner.Name()))
	}
	var names []spiffeid.TrustDomain
	for _, name := range []string{"a.test", "b.test", "c.test"} {
		names = append(names, spiffeid.RequireTrustDomainFromString(name))
	}
	rapid.Check(t, func(rt *rapid.T) {
		documents := make(map[spiffeid.TrustDomain]*Document)
		holders := make(map[int]string)
		for _, name := range names {
			d := &Document{}
			for i := range pool {
				if rapid.Bool().Draw(rt, "holds") {
					d.X509 = append(d.X509, pool[i].Cert)
					holders[i] += name.Name()
				}
			}
			documents[name] = d
		}
		want := make(map[string]int)
		for _, all := range holders {
			if len(all) > len("a.test") {
				want[all]++
			}
		}
		got := make(map[string]int)
		for _, k := range SharedKeys(documents) {
			text := ""
			for _, name := range k.TrustDomains {
				text += name.Name()
			}
			got[text]++
		}
		if !reflect.DeepEqual(got, want) || !reflect.DeepEqual(SharedKeys(documents), SharedKeys(documents)) {
			rt.Errorf("%v; want %v", got, want)
		}
	})
}
