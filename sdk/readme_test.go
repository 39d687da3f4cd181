// The changes that README.md asks of a service: what they start from and what they
// end at compile, and they are as few as it says.

package sdk_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestThreeLinesChange(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(readme), "```diff\n")[1:]
	if len(blocks) != 2 {
		t.Fatalf("README.md has %d diffs; want one for HTTP and one for gRPC", len(blocks))
	}
	for _, block := range blocks {
		diff, _, _ := strings.Cut(block, "```")
		var before, after strings.Builder
		changed := 0
		for line := range strings.Lines(diff) {
			text := line[min(1, len(line)-1):]
			if line[0] != '+' {
				before.WriteString(text)
			}
			if line[0] != '-' {
				after.WriteString(text)
			}
			if line[0] == '+' && !boilerplate(strings.TrimSpace(text)) {
				changed++
			}
		}
		if changed == 0 || changed > 3 {
			t.Errorf("%d lines change; want at most 3:\n%s", changed, diff)
		}
		compiles(t, before.String())
		compiles(t, after.String())
	}
}

// boilerplate are imports and the if of an error.
func boilerplate(line string) bool {
	return line == "" || strings.HasPrefix(line, `"`) || line == "if err != nil {" || line == "log.Fatal(err)" || line == "}"
}

func compiles(t *testing.T, program string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(file, []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "go", "vet", file).CombinedOutput(); err != nil {
		t.Errorf("go vet: %v\n%s\n%s", err, out, program)
	}
}
