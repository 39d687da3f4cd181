// Trust bundles of other trust domains: what takes whose place.

package trust

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid/forge"
)

func federatedOf(t testing.TB, text string) *Federated {
	t.Helper()
	b, err := NewFederated(td, partner, []byte(text), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestNobodySaysTheKeysOfTheOwnTrustDomain(t *testing.T) {
	own := forge.New(t, td.Name())
	if b, err := NewFederated(td, td, []byte(goSPIFFE(t, own)), time.Now()); err == nil || !strings.Contains(err.Error(), "own") {
		t.Errorf("NewFederated = %+v, %v; want a refusal (T22)", b, err)
	}
}

// B6: what holds no key that can be used is a trust bundle, by which nobody is trusted.
func TestBundleWithoutAUsableKeyIsTaken(t *testing.T) {
	for name, text := range map[string]string{
		"empty":            `{"keys":[],"spiffe_sequence":9}`,
		"as go-spiffe has": `{"keys":null,"spiffe_sequence":9}`,
		"unknown uses":     `{"keys":[{"kty":"EC","use":"sig"},{"kty":"AKP","use":"x509-svid"}],"spiffe_sequence":9}`,
	} {
		b := federatedOf(t, text)
		if !b.Empty() || b.CheckFollows(federatedOf(t, goSPIFFE(t, forge.New(t, partner.Name())))) != nil {
			t.Errorf("%s: %+v; want it empty, and to follow", name, b)
		}
	}
	if federatedOf(t, document(goKeys(t))).Empty() {
		t.Error("one with keys is empty")
	}
}

// A document whose roots have all ended is an old one, unless its number says otherwise.
func TestDocumentWhoseRootsHaveEnded(t *testing.T) {
	a := forge.New(t, partner.Name())
	end := a.Cert.NotAfter
	longer := forge.New(t, partner.Name(), func(c *x509.Certificate) { c.NotAfter = end.Add(time.Hour) })
	held := federatedOf(t, document(goKeys(t))) // sequence number 7
	numbered := func(sequence int) string {
		return fmt.Sprintf(`{"spiffe_sequence":%d,"keys":[%s]}`, sequence, member(t, x509Key(a), nil))
	}
	for name, test := range map[string]struct {
		text string
		held *Federated
		now  time.Time
		good bool
	}{
		"now":                {goSPIFFE(t, a), nil, time.Now(), true},
		"when it has ended":  {goSPIFFE(t, a), nil, end.Add(time.Second), false},
		"at its last second": {goSPIFFE(t, a), nil, end, true},
		"one of two ended":   {pemOf("CERTIFICATE", a.Cert.Raw) + pemOf("CERTIFICATE", longer.Cert.Raw), nil, end.Add(time.Second), true},
		"numbered later":     {numbered(8), held, end.Add(time.Second), true},
		"numbered earlier":   {numbered(6), held, end.Add(time.Second), false},
		"not numbered":       {goSPIFFE(t, a), federatedOf(t, goSPIFFE(t, longer)), end.Add(time.Second), false},
	} {
		b, err := NewFederated(td, partner, []byte(test.text), test.now)
		if err == nil {
			err = b.CheckFollows(test.held)
		}
		if (err == nil) != test.good {
			t.Errorf("%s: %v; want it taken = %t", name, err, test.good)
		}
		if order, _ := errors.AsType[*OrderError](err); err != nil && (order == nil || order.Kind != Ended) {
			t.Errorf("%s: %#v; want it said that it has ended", name, err)
		}
	}
}

func TestSequenceOfAnotherTrustDomainNeverFalls(t *testing.T) {
	one, two := goKeys(t), goKeys(t)
	at := func(sequence int, keys string) string {
		return fmt.Sprintf(`{"spiffe_sequence":%d,"keys":[%s]}`, sequence, keys)
	}
	none := func(keys string) string { return `{"keys":[` + keys + `]}` }
	for name, test := range map[string]struct {
		held, next string
		good       bool
		kind       string
	}{
		"first":                         {"", at(1, one), true, ""},
		"later":                         {at(1, one), at(2, two), true, ""},
		"later, the same":               {at(1, one), at(2, one), true, ""},
		"again":                         {at(2, one), at(2, one), true, ""},
		"older (F-4, T23)":              {at(5, one), at(4, two), false, Older},
		"older, the same":               {at(5, one), at(4, one), false, Older},
		"one number for two (B2)":       {at(5, one), at(5, two), false, SameSequence},
		"no number after one":           {at(5, one), none(two), false, NoSequence},
		"no number, the same keys":      {at(5, one), none(one), false, NoSequence},
		"a number after none":           {none(one), at(1, two), true, ""},
		"neither has one":               {none(one), none(two), true, ""},
		"emptied, later":                {at(5, one), at(6, ""), true, ""},
		"emptied by an older one (T23)": {at(5, one), at(4, ""), false, Older},
	} {
		var held *Federated
		if test.held != "" {
			held = federatedOf(t, test.held)
		}
		err := federatedOf(t, test.next).CheckFollows(held)
		if (err == nil) != test.good {
			t.Errorf("%s: %v; want it taken = %t", name, err, test.good)
		}
		if order, _ := errors.AsType[*OrderError](err); err != nil && (order == nil || order.Kind != test.kind) {
			t.Errorf("%s: %#v; want an *OrderError %s", name, err, test.kind)
		}
	}
}

// Whatever comes, the numbers that are taken without force do not fall.
func TestTakenSequencesRise(t *testing.T) {
	keys := []string{goKeys(t), goKeys(t), ""}
	rapid.Check(t, func(rt *rapid.T) {
		var held *Federated
		for range rapid.IntRange(1, 12).Draw(rt, "n") {
			next := federatedOf(t, fmt.Sprintf(`{"spiffe_sequence":%d,"keys":[%s]}`, rapid.IntRange(0, 4).Draw(rt, "sequence"), rapid.SampledFrom(keys).Draw(rt, "keys")))
			if next.CheckFollows(held) != nil {
				continue
			}
			if held != nil && (next.Sequence < held.Sequence || next.Sequence == held.Sequence && next.Sequence != 0 && next.Digest() != held.Digest()) {
				rt.Fatalf("%d took the place of %d", next.Sequence, held.Sequence)
			}
			held = next
		}
	})
}

func goKeys(t testing.TB) string {
	t.Helper()
	a := forge.New(t, partner.Name())
	return member(t, x509Key(a), nil) + "," + member(t, jwtKey(a.JWTKey.Public(), a.KeyID), nil)
}

func TestFederatedSurvivesTheStore(t *testing.T) {
	b := federatedOf(t, goSPIFFE(t, forge.New(t, partner.Name())))
	op, err := b.Put()
	if err != nil {
		t.Fatal(err)
	}
	kv := store.KV{Key: op.Key, Value: op.Value, ModRevision: 9}
	got, err := DecodeFederated(kv)
	if err != nil || got.TrustDomain != partner || got.Digest() != b.Digest() || len(got.X509) != 1 || len(got.JWT) != 1 || !got.SetAt.Equal(b.SetAt) || got.Revision != 9 {
		t.Fatalf("DecodeFederated = %+v, %v; want %+v", got, err, b)
	}
	for name, bad := range map[string]store.KV{
		"another's place": {Key: FederatedPrefix + "other.test", Value: op.Value},
		"newer version":   {Key: op.Key, Value: []byte(strings.Replace(string(op.Value), `"v":1`, `"v":2`, 1))},
		"no trust domain": {Key: FederatedPrefix, Value: []byte(strings.Replace(string(op.Value), `"partner.test"`, `""`, 1))},
		"damaged keys":    {Key: op.Key, Value: []byte(strings.Replace(string(op.Value), `"x5c":["`, `"x5c":["A`, 1))},
		"rubbish":         {Key: op.Key, Value: []byte("{")},
	} {
		if got, err := DecodeFederated(bad); err == nil {
			t.Errorf("%s: DecodeFederated = %+v; want an error", name, got)
		}
	}
}

// What is taken can be read again: certificates in PEM become longer as JWKS.
func TestDocumentThatGrowsBeyondTheLimitIsRefused(t *testing.T) {
	grown := func(n int) string {
		var text strings.Builder
		for range n {
			text.WriteString(pemOf("CERTIFICATE", forge.New(t, partner.Name(), func(c *x509.Certificate) {
				c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: []int{1, 3, 6, 1, 4, 1, 99999, 1}, Value: make([]byte, 2478)})
			}).Cert.Raw))
		}
		return text.String()
	}
	most := grown(64)
	if len(most) > MaxDocumentBytes {
		t.Fatalf("the PEM itself has %d bytes", len(most))
	}
	if b, err := NewFederated(td, partner, []byte(most), time.Now()); err == nil {
		t.Errorf("%d bytes of PEM were taken as %d of JWKS", len(most), len(b.JWKS))
	}
	if _, err := NewFederated(td, partner, []byte(grown(32)), time.Now()); err != nil {
		t.Errorf("half of it: %v", err)
	}
}

// A trust domain can look like an address or have no dots (ID4).
func TestTrustDomainsThatLookOdd(t *testing.T) {
	for _, name := range []string{"10.0.0.1", "-", "_", "localhost"} {
		other := spiffeid.RequireTrustDomainFromString(name)
		b, err := NewFederated(td, other, []byte(goSPIFFE(t, forge.New(t, name))), time.Now())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		op, err := b.Put()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := DecodeFederated(store.KV{Key: op.Key, Value: op.Value}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
