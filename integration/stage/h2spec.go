// h2spec: the rules of HTTP/2, asked of a server over the wire.

package stage

import (
	"os/exec"
	"strings"
	"sync"
	"testing"
)

var buildH2Spec = sync.OnceValues(func() (string, error) { return buildModule("h2spec") })

// H2Spec gives what the plaintext server at address fails of h2spec, a line each.
func H2Spec(tb testing.TB, address string) (failed []string) {
	tb.Helper()
	bin, err := buildH2Spec()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := exec.CommandContext(tb.Context(), bin, address).Output()
	if err != nil {
		tb.Fatalf("h2spec %s: %v\n%s", address, err, out)
	}
	for line := range strings.Lines(string(out)) {
		if test, ok := strings.CutPrefix(line, "FAILED "); ok {
			failed = append(failed, strings.TrimSpace(test))
		}
	}
	return failed
}
