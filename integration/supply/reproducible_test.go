package main

import (
	"bytes"
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// `make reproducible` only: what `make build` makes of the same source in two folders,
// once with what is compiled already and once with nothing, is the same to the byte.
func TestTwoBuildsAreIdentical(t *testing.T) {
	if os.Getenv("MERLON_REPRODUCIBLE") == "" {
		t.Skip("make reproducible")
	}
	first, second := copyOfSource(t, "a"), copyOfSource(t, "another/folder/b")
	build(t, first)
	build(t, second, "GOCACHE="+t.TempDir())
	binaries, err := filepath.Glob(filepath.Join(first, "bin", "*"))
	if err != nil || len(binaries) != 4 {
		t.Fatalf("%q, %v; want four binaries", binaries, err)
	}
	for _, path := range binaries {
		name := filepath.Base(path)
		one, other := read(t, path), read(t, filepath.Join(second, "bin", name))
		if !bytes.Equal(one, other) {
			t.Errorf("%s: two builds differ", name)
		}
		for _, dir := range []string{first, second} {
			if bytes.Contains(one, []byte(dir)) || bytes.Contains(other, []byte(dir)) {
				t.Errorf("%s names the folder that it was built in", name)
			}
		}
		t.Logf("%s: %d bytes, SHA-256 %x", name, len(one), sha256.Sum256(one))
	}
}

// copyOfSource copies what git knows, without its history, to a folder of that name.
func copyOfSource(t *testing.T, name string) string {
	t.Helper()
	from, err := root()
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), name)
	cmd := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	cmd.Dir = from
	files, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for file := range strings.SplitSeq(strings.TrimSuffix(string(files), "\x00"), "\x00") {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(to, file)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(to, file), read(t, filepath.Join(from, file)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return to
}

func build(t *testing.T, dir string, env ...string) {
	t.Helper()
	cmd := exec.Command("make", "build")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make build: %v\n%s", err, out)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}
