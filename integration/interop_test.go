// Programs of other projects that tests drive. `make interop` installs them
// outside the tree.

package integration_test

import (
	"os"
	"path/filepath"
	"testing"
)

// interopDir is where `make interop` puts things.
func interopDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("MERLON_INTEROP"); dir != "" {
		return dir
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Skipf("no place for programs of other projects: %v: set MERLON_INTEROP and run: make interop", err)
	}
	return filepath.Join(cache, "merlon", "interop")
}

// interop is the one file there that pattern is for; the test is skipped without.
func interop(t *testing.T, what, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(interopDir(t), pattern))
	if err != nil || len(found) != 1 {
		t.Skipf("%s is not installed: make interop", what)
	}
	path, err := filepath.EvalSymlinks(found[0])
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// envoyBinary is Envoy's, not the script beside it that starts it: unix:path
// names what runs.
func envoyBinary(t *testing.T) string {
	t.Helper()
	return interop(t, "Envoy", "venv/lib/python3*/site-packages/envoy/_bin/envoy")
}
