// Builds of our programs with a source file changed (go build -overlay): broken on
// purpose, so that it can be seen whether a test would notice. The tree stays as it is.

package stage

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Change replaces Old, which must be there once, in File, a path in the repository.
type Change struct{ File, Old, New string }

// Changed compiles the program of package pkg (below merlon.dev) with changes, once
// for the whole test process, and returns the name under which Start finds it.
func Changed(tb testing.TB, name, pkg string, changes ...Change) string {
	tb.Helper()
	dir, err := binDir()
	if err != nil {
		tb.Fatal(err)
	}
	building.Lock()
	defer building.Unlock()
	bin := filepath.Join(dir, name)
	if exists(bin) {
		return name
	}
	root, err := repository()
	if err != nil {
		tb.Fatal(err)
	}
	overlay, err := writeOverlay(root, bin, changes)
	if err != nil {
		tb.Fatalf("build %s: %v", name, err)
	}
	cmd := exec.Command("go", "build", "-C", root, "-overlay", overlay, "-o", bin, "./"+pkg)
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return name
}

// Path is where a program is that Build or Changed has compiled.
func Path(tb testing.TB, name string) string {
	tb.Helper()
	dir, err := binDir()
	if err != nil {
		tb.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// writeOverlay writes the changed files beside path, and the file that names them.
func writeOverlay(root, path string, changes []Change) (string, error) {
	replace := make(map[string]string)
	for i, c := range changes {
		from := filepath.Join(root, c.File)
		source := from
		if changed := replace[from]; changed != "" {
			source = changed
		}
		text, err := os.ReadFile(source)
		if err != nil {
			return "", err
		}
		if n := strings.Count(string(text), c.Old); n != 1 {
			return "", fmt.Errorf("change %d: the snippet is %d times in %s; it must follow the source:\n%s", i, n, c.File, c.Old)
		}
		to := fmt.Sprintf("%s-%d.go", path, i)
		if err := os.WriteFile(to, []byte(strings.Replace(string(text), c.Old, c.New, 1)), 0o600); err != nil {
			return "", err
		}
		replace[from] = to
	}
	told, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	return path + ".json", os.WriteFile(path+".json", told, 0o600)
}
