// Authorities as others judge certificates.

package upstream

import (
	"crypto/x509"
	"slices"
	"testing"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid/forge"
)

func TestZlintFindsNothingInAuthorities(t *testing.T) {
	stage.CheckZlint(t, profiles(t))
}

// The lint would see a flaw: an empty subject beside a SAN that is not critical.
func TestZlintFindsAPlantedFlaw(t *testing.T) {
	leaf := forge.New(t, "example.org").Leaf("/web", forge.RawURIs(false, "spiffe://example.org/web"))
	found := stage.Zlint(t, map[string]*x509.Certificate{"flawed": leaf.Chain[0]})["flawed"]
	if !slices.ContainsFunc(found, func(f stage.Finding) bool { return f.Lint == "e_ext_san_not_critical_without_subject" }) {
		t.Errorf("zlint found only %v", found)
	}
}
