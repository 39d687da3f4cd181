// Our verifier gives every verdict; where go-spiffe alone does not, it is named.

package jwtcase_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"merlon.dev/integration/conform/jwtcase"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// goSPIFFEAccepts: each of these go-spiffe v2.9.0 should refuse.
var goSPIFFEAccepts = []string{"J2/jku", "J2/x5u", "J5/sub-no-path"}

func TestVerdicts(t *testing.T) {
	ca, other := forge.New(t, "example.org"), forge.New(t, "other.test")
	bundle, seen := ca.Bundle(), make(map[string]bool)
	for _, c := range jwtcase.All(ca, other) {
		if seen[c.ID] || !strings.Contains(c.ID, "/") {
			t.Errorf("%s: twice, or malformed", c.ID)
		}
		seen[c.ID] = true
		_, err := svid.VerifyJWT(c.Token, bundle, []string{jwtcase.Audience}, time.Now())
		if (err == nil) != c.Accept {
			t.Errorf("%s: accepted = %t: %v", c.ID, err == nil, err)
		}
		_, err = jwtsvid.ParseAndValidate(c.Token, bundle, []string{jwtcase.Audience})
		if want := c.Accept || slices.Contains(goSPIFFEAccepts, c.ID); (err == nil) != want {
			t.Errorf("%s: go-spiffe alone: accepted = %t: %v", c.ID, err == nil, err)
		}
	}
	t.Logf("%d tokens", len(seen))
}
