package decisionlog

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// A full disk keeps whole lines, loses none that it said it has, and is written to
// again when there is space.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small disk needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("mounting a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	ballast, path := filepath.Join(dir, "ballast"), filepath.Join(dir, "d.jsonl")
	if err := os.WriteFile(ballast, make([]byte, 128<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	f := open(t, FileOptions{Path: path, MaxBytes: 1 << 20})
	line, said := []byte(strings.Repeat("x", 999)), 0
	batch := [][]byte{line, line, line}
	for {
		n, _, err := f.Write(t.Context(), batch)
		said += n
		if err != nil {
			break
		}
	}
	whole := func() {
		t.Helper()
		data, err := os.ReadFile(path)
		if err != nil || len(data) != 1000*said || bytes.Count(data, []byte("\n")) != said {
			t.Errorf("the file has %d bytes, %v; %d lines of 1000 were taken", len(data), err, said)
		}
	}
	whole()
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	n, _, err := f.Write(t.Context(), batch)
	if err != nil || n != 3 {
		t.Errorf("with space again: %d, %v", n, err)
	}
	said += n
	whole()
}
