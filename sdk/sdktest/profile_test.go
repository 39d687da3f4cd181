// What a test sees is what the CA issues: sdktest's own minter keeps to the
// profile of the CA's leaves.

package sdktest_test

import (
	"os"
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"

	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/svid/forge"
)

func TestSVIDsHaveTheProfileOfTheCA(t *testing.T) {
	golden, err := os.ReadFile("../../ca/internal/authority/testdata/leaf.golden")
	if err != nil {
		t.Fatal(err)
	}
	// Who issued and who is named are the test's own.
	names := regexp.MustCompile(`(?m)^issuer: .*$|spiffe://[^\]]*`)
	profile := func(dump string) string { return names.ReplaceAllString(dump, "(own)") }
	got := forge.Dump(sdktest.New(t).SVID("web").Certificates[0])
	if diff := cmp.Diff(profile(string(golden)), profile(got)); diff != "" {
		t.Errorf("profile of the SVIDs (-CA +sdktest):\n%s", diff)
	}
}
