// A file is replaced whole, and what a crash left of one is removed.

package durable_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"merlon.dev/sdk/durable"
)

func TestWriteFileReplacesWhole(t *testing.T) {
	dir := t.TempDir()
	for _, content := range []string{"first", "second"} {
		if err := durable.WriteFile(dir, "x", []byte(content)); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(dir, "x"))
		if err != nil || string(got) != content {
			t.Errorf("content = %q, %v; want %q", got, err, content)
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Fatalf("%d files are left, %v; want 1", len(files), err)
	}
	if info, err := files[0].Info(); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode = %v, %v; want 0600", info.Mode(), err)
	}
	if err := durable.WriteFile(filepath.Join(dir, "nowhere"), "x", nil); err == nil {
		t.Error("a file was written into a folder that is not there")
	}
}

func TestUnfinishedFilesAreRemoved(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{durable.Unfinished + "x-1", "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("key"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := durable.RemoveUnfinished(dir); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 || files[0].Name() != "x" {
		t.Errorf("left = %v, %v; want x alone", files, err)
	}
}

func TestMakeDirDoesNotShutOthersOutOfWhatIsAbove(t *testing.T) {
	before := syscall.Umask(0o077)
	defer syscall.Umask(before)
	top := t.TempDir()
	for dir, mode := range map[string]os.FileMode{"a/b/private": 0o700, "a/c/public": 0o755} {
		if err := durable.MakeDir(filepath.Join(top, dir), mode); err != nil {
			t.Fatal(err)
		}
	}
	for dir, want := range map[string]os.FileMode{"a": 0o755, "a/b": 0o755, "a/c": 0o755, "a/b/private": 0o700, "a/c/public": 0o755} {
		info, err := os.Stat(filepath.Join(top, dir))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("mode of %s = %04o; want %04o", dir, got, want)
		}
	}
	// What is there stays as it is.
	if err := durable.MakeDir(filepath.Join(top, "a/b/private"), 0o755); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(top, "a/b/private")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("a folder that was there = %v, %v; want it as it was", info.Mode(), err)
	}
	if err := os.WriteFile(filepath.Join(top, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"file", "file/below"} {
		if err := durable.MakeDir(filepath.Join(top, path), 0o700); err == nil {
			t.Errorf("%s is taken for a folder", path)
		}
	}
}
