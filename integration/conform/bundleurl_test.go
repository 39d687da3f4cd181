// Trust bundles that an endpoint may publish, and what is found in them.

package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid/forge"
)

// published is a trust bundle of one authority, whose keys change has changed: first that
// of X.509.
func published(t *testing.T, sequence string, change func(x509, jwt map[string]any)) []byte {
	t.Helper()
	l := &relation{rogue: &rogue{td: spiffeid.RequireTrustDomainFromString("a.test")}, names: make(map[string]string)}
	keys := newRing(l, "a.test", "root").keysOf("root")
	change(keys[0], keys[1])
	return encodeJSON(map[string]any{"spiffe_sequence": json.RawMessage(sequence), "spiffe_refresh_hint": 10, "keys": keys})
}

func TestPublishedBundles(t *testing.T) {
	other := forge.New(t, "a.test")
	for name, tt := range map[string]struct {
		sequence string
		change   func(x509, jwt map[string]any)
		id, what string // the finding, if any
	}{
		"sound": {"1", func(_, _ map[string]any) {}, "", ""},
		"the certificate of another key": {"1", func(x509, _ map[string]any) {
			x509["x5c"] = []string{encodeCert(other)}
		}, "X15", "another key"},
		"a leaf as an authority": {"1", func(x509, _ map[string]any) {
			x509["x5c"] = []string{encodeCert(&forge.Authority{Cert: other.Leaf("/a").Chain[0]})}
		}, "X15", "no signing certificate"},
		"no certificate in x5c":    {"1", func(x509, _ map[string]any) { x509["x5c"] = []string{"AAAA"} }, "X15", "x5c"},
		"an authority without key": {"1", func(x509, _ map[string]any) { delete(x509, "x") }, "X15", "a JWK"},
		"a JWT key without y":      {"1", func(_, jwt map[string]any) { delete(jwt, "y") }, "J11", "a JWK"},
		"a JWT key off its curve":  {"1", func(_, jwt map[string]any) { jwt["x"] = jwt["y"] }, "J11", "a JWK"},
		"a fraction":               {"1.5", func(_, _ map[string]any) {}, "B2", "1.5"},
	} {
		r := newReport()
		if err := checkDocument(r, published(t, tt.sequence, tt.change)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, row := range checklist {
			res := r.of(row.ID)
			if said := strings.Join(res.Findings, "\n"); (said != "") != (row.ID == tt.id) || row.ID == tt.id && !strings.Contains(said, tt.what) {
				t.Errorf("%s: %s: %q; want %q of %q", name, row.ID, said, tt.what, tt.id)
			}
		}
	}
}

// A sequence that does not fit 64 bits is remarked.
func TestSequenceBeyond64Bits(t *testing.T) {
	for sequence, want := range map[string]int{"18446744073709551615": 0, "18446744073709551616": 1} {
		r := newReport()
		if err := checkDocument(r, published(t, sequence, func(_, _ map[string]any) {})); err != nil {
			t.Fatal(err)
		}
		if got := r.of("B2").Remarks; len(got) != want {
			t.Errorf("%s: %q; want %d remarks", sequence, got, want)
		}
	}
}
