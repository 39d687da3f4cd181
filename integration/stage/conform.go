// spiffe-conform, the tool that puts the standards' requirements to any implementation.

package stage

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Requirement is what spiffe-conform prints of one.
type Requirement struct {
	ID, Level, Status string
	Findings, Remarks []string
	Checks            int
}

// ConformBin is the tool, where no other test's process has its path.
func ConformBin(tb testing.TB) string {
	tb.Helper()
	bin := filepath.Join(Dir(tb), "spiffe-conform")
	if err := os.Link(Bin(tb, Build(tb, "spiffe-conform", "integration/conform", "")), bin); err != nil {
		tb.Fatal(err)
	}
	return bin
}

// Conform runs the tool, and gives its requirements by their IDs, and its exit code.
func Conform(tb testing.TB, bin string, env []string, args ...string) (map[string]Requirement, int) {
	tb.Helper()
	cmd := exec.CommandContext(tb.Context(), bin, append([]string{"run", "-o", "json"}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var results []Requirement
	if jsonErr := json.Unmarshal(out, &results); jsonErr != nil {
		tb.Fatalf("spiffe-conform: %v, %v\n%s%s", err, jsonErr, out, stderr.String())
	}
	byID := make(map[string]Requirement)
	for _, r := range results {
		byID[r.ID] = r
	}
	return byID, cmd.ProcessState.ExitCode()
}
