// Where backups are written, and what is never replaced by one.

package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/store/snapshot"
)

// writeBackup writes a backup of an empty store.
func writeBackup(t *testing.T) func(*os.File) error {
	t.Helper()
	st, err := badger.Open(t.TempDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return func(f *os.File) error {
		_, err := snapshot.Write(t.Context(), f, st, "badger", time.Now())
		return err
	}
}

func TestOnlyARegularFileIsReplaced(t *testing.T) {
	write := writeBackup(t)
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		syscall.Mkfifo(in("pipe"), 0o600), os.Mkdir(in("folder"), 0o700), os.WriteFile(in("old"), []byte("old"), 0o600),
		os.Symlink("old", in("link")), os.Symlink("pipe", in("link-to-pipe")), os.Symlink("nowhere", in("dangling")),
	); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		in("pipe"): "no regular file", in("folder"): "no regular file", in("link-to-pipe"): "no regular file",
		in("dangling"): "through a link", "/dev/null": "no regular file", "-": "goes to a file",
	} {
		before, _ := os.Lstat(name)
		_, err := writeFile(name, true, write)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", name, err, want)
		}
		if after, _ := os.Lstat(name); before != nil && (after == nil || after.Mode() != before.Mode()) {
			t.Errorf("%s was %v and is %v", name, before, after)
		}
	}
	if _, err := writeFile(in("link"), false, write); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("a link without --force: %v", err)
	}
	if _, err := writeFile(in("link"), true, write); err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(in("link")); err != nil || to != "old" {
		t.Errorf("the link leads to %q, %v; want it as it was", to, err)
	}
	if b, err := os.ReadFile(in("old")); err != nil || len(b) < 10 {
		t.Errorf("the file behind the link: %q, %v", b, err)
	}
}

// A client that is killed leaves a hidden file; the next one clears it away, but
// not that of one that still writes.
func TestUnfinishedBackupsAreRemoved(t *testing.T) {
	write := writeBackup(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "last.backup")
	left := filepath.Join(dir, ".last.backup"+unfinished+"1")
	if err := os.WriteFile(left, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	var other string
	_, err := writeFile(path, false, func(f *os.File) error {
		other = f.Name()
		if _, err := writeFile(path, false, write); err != nil { // meanwhile
			t.Error(err)
		}
		if _, err := os.Stat(other); err != nil {
			t.Errorf("the file of another that still writes: %v", err)
		}
		return write(f)
	})
	if err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("the slower of two: %v", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 || files[0].Name() != "last.backup" {
		t.Errorf("left: %v, %v; want the backup alone", files, err)
	}
}
