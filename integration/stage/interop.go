// Programs of other projects that tests drive. `make interop` installs them
// outside the tree.

package stage

import (
	"os"
	"path/filepath"
	"testing"
)

// InteropDir is where `make interop` puts things.
func InteropDir(tb testing.TB) string {
	tb.Helper()
	if dir := os.Getenv("MERLON_INTEROP"); dir != "" {
		return dir
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		tb.Skipf("no place for programs of other projects: %v: set MERLON_INTEROP and run: make interop", err)
	}
	return filepath.Join(cache, "merlon", "interop")
}

// Interop is the one file there that pattern is for; the test is skipped without.
func Interop(tb testing.TB, what, pattern string) string {
	tb.Helper()
	found, err := filepath.Glob(filepath.Join(InteropDir(tb), pattern))
	if err != nil || len(found) != 1 {
		tb.Skipf("%s is not installed: make interop", what)
	}
	path, err := filepath.EvalSymlinks(found[0])
	if err != nil {
		tb.Fatal(err)
	}
	return path
}
