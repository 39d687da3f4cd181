// What becomes trusted of a trust bundle that the CA sends.

package cache

import (
	"encoding/json"
	"testing"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

// X16: only the first certificate of an entry counts. Whether such a document
// is refused whole or read in part, the second is never trusted.
func TestX16OnlyTheFirstCertificateOfAnEntryCanBeTrusted(t *testing.T) {
	root, other := forge.New(t, td), forge.New(t, td)
	document, err := root.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	parse := func(change func(entry map[string]any)) (*Trust, error) {
		var jwks map[string]any
		if err := json.Unmarshal(document, &jwks); err != nil {
			t.Fatal(err)
		}
		for _, entry := range jwks["keys"].([]any) {
			if e := entry.(map[string]any); e["use"] == "x509-svid" {
				change(e)
			}
		}
		changed, err := json.Marshal(jwks)
		if err != nil {
			t.Fatal(err)
		}
		return ParseTrust(&capb.TrustBundle{TrustDomain: td, Sequence: 1, Jwks: changed}, td)
	}
	if _, err := parse(func(map[string]any) {}); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(map[string]any){
		"two certificates": func(e map[string]any) { e["x5c"] = append(e["x5c"].([]any), other.Cert.Raw) },
		"empty x5c":        func(e map[string]any) { e["x5c"] = []any{} },
		"no x5c":           func(e map[string]any) { delete(e, "x5c") },
		"another use":      func(e map[string]any) { e["use"] = "X509-SVID" },
	} {
		if trust, err := parse(change); err == nil && (len(trust.Bundle.X509Authorities()) != 1 || !trust.Bundle.HasX509Authority(root.Cert)) {
			t.Errorf("%s: %d authorities are trusted", name, len(trust.Bundle.X509Authorities()))
		}
	}
}
