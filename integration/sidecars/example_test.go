// The example of nginx, curl and two sidecars, as its README runs it.

package sidecars_test

import (
	"os/exec"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
)

func TestSidecarExampleRuns(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("nginx"); err != nil {
		t.Skip("needs nginx: apt-get install nginx-light")
	}
	cmd := exec.CommandContext(t.Context(), stage.Bin(t, stage.Build(t, "example-sidecar", "examples/sidecar", "")))
	cmd.Dir = "../.."
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Everything was seen.") {
		t.Errorf("%v\n%s", err, out)
	}
}
