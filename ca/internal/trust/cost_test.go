// What documents cost whoever judges them that were made to cost much.

package trust

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"merlon.dev/sdk/svid/forge"
)

// Whatever a document of the largest size is made of, judging it takes less than a hundred
// times its size.
func TestCostOfHostileDocuments(t *testing.T) {
	a := forge.New(t, partner.Name())
	deep := func(open, shut string) string {
		n := (MaxDocumentBytes - 200) / (len(open) + len(shut))
		return strings.Repeat(open, n) + strings.Repeat(shut, n)
	}
	fill := func(key string) string {
		n := min(MaxDocumentBytes/(len(key)+1)-1, maxKeysNamed)
		return document(strings.TrimSuffix(strings.Repeat(key+",", n), ","))
	}
	for name, text := range map[string]string{
		"deep arrays":          `{"keys":[],"x":` + deep("[", "]") + `}`,
		"deep objects":         `{"keys":[],"x":` + strings.Replace(deep(`{"a":`, "}"), "{\"a\":}", `{"a":1}`, 1) + `}`,
		"deep private part":    `{"keys":[{"kty":"EC","use":"jwt-svid","kid":"k","d":` + deep("[", "]") + `}]}`,
		"deep member of a key": `{"keys":[{"kty":"EC","use":"jwt-svid","kid":"k","z":` + deep("[", "]") + `}]}`,
		"deep key":             `{"keys":` + deep("[", "]") + `}`,
		"many roots":           fill(member(t, x509Key(a), nil)),
		"many JWT keys":        fill(member(t, jwtKey(a.JWTKey.Public(), "k"), nil)),
		"huge RSA":             document(fmt.Sprintf(`{"kty":"RSA","use":"jwt-svid","kid":"k","n":"%s","e":"AQAB"}`, strings.Repeat("_", MaxDocumentBytes-200))),
		"huge exponent":        document(fmt.Sprintf(`{"kty":"RSA","use":"jwt-svid","kid":"k","n":"_w","e":"%s"}`, strings.Repeat("_", MaxDocumentBytes-200))),
		"a huge number":        `{"keys":[],"spiffe_sequence":1e` + strings.Repeat("9", MaxDocumentBytes-100) + `}`,
		"a huge hint":          `{"keys":[],"spiffe_refresh_hint":` + strings.Repeat("9", MaxDocumentBytes-100) + `}`,
		"many members":         `{"keys":[]` + many(20000) + `}`,
		"many in a key":        `{"keys":[{"kty":"EC","use":"jwt-svid","kid":"k"` + many(18000) + `}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			if len(text) > MaxDocumentBytes || len(text) < MaxDocumentBytes/2 {
				t.Fatalf("the document has %d bytes", len(text))
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			at := time.Now()
			_, err := ParseDocument(partner, []byte(text))
			took := time.Since(at)
			runtime.ReadMemStats(&after)
			used := after.TotalAlloc - before.TotalAlloc + (after.StackSys - before.StackSys)
			t.Logf("%v, %d KiB: %.60v", took, used>>10, err)
			if used > 96*MaxDocumentBytes {
				t.Errorf("%d bytes took %d of memory", len(text), used)
			}
		})
	}
}

func many(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `,"m%05d":0`, i)
	}
	return b.String()
}
