package crashtest

// Builds of the child: as the sources are, and with one of them broken.

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// change breaks a source file: old, which must be in it once, becomes new.
type change struct{ file, old, new string }

// builds is the folder of built children, removed by TestMain.
var builds = sync.OnceValues(func() (string, error) { return os.MkdirTemp("", "crashtest") })

var plainBuild = sync.OnceValues(func() (string, error) { return build("plain") })

// plain is the child as it is, without the race detector, which has no business
// in a process that opens a hundred damaged stores.
func plain(t testing.TB) string {
	t.Helper()
	path, err := plainBuild()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// build compiles the child with changed sources.
func build(name string, changes ...change) (string, error) {
	dir, err := builds()
	if err != nil {
		return "", err
	}
	overlay := struct{ Replace map[string]string }{make(map[string]string)}
	for i, c := range changes {
		from, err := filepath.Abs(filepath.Join("..", c.file))
		if err != nil {
			return "", err
		}
		source := from
		if changed := overlay.Replace[from]; changed != "" {
			source = changed
		}
		text, err := os.ReadFile(source)
		if err != nil {
			return "", err
		}
		if n := strings.Count(string(text), c.old); n != 1 {
			return "", fmt.Errorf("%s: change %d of %q: the snippet is there %d times; it must follow the source:\n%s", c.file, i, name, n, c.old)
		}
		to := filepath.Join(dir, fmt.Sprintf("%s-%d.go", name, i))
		if err := os.WriteFile(to, []byte(strings.Replace(string(text), c.old, c.new, 1)), 0o600); err != nil {
			return "", err
		}
		overlay.Replace[from] = to
	}
	told, err := json.Marshal(overlay)
	if err != nil {
		return "", err
	}
	file, program := filepath.Join(dir, name+".json"), filepath.Join(dir, name)
	if err := os.WriteFile(file, told, 0o600); err != nil {
		return "", err
	}
	if out, err := exec.Command("go", "build", "-overlay", file, "-o", program, "./child").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %q: %w\n%s", name, err, out)
	}
	return program, nil
}
