// A small disk, for tests that fill it.

package stage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// SmallDisk mounts a tmpfs with the given options, such as "size=64m", until
// the test ends. It skips the test where that is not allowed.
func SmallDisk(tb testing.TB, options string) (dir string) {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("mounting a small disk needs root")
	}
	dir = tb.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, options); err != nil {
		tb.Skipf("mounting a small disk: %v", err)
	}
	tb.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			tb.Error(err)
		}
	})
	return dir
}

// FillDisk takes all space, and returns what gives it back.
func FillDisk(tb testing.TB, disk string) (empty func()) {
	tb.Helper()
	path := filepath.Join(disk, "filler")
	f, err := os.Create(path)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	for chunk := make([]byte, 64<<10); len(chunk) >= 4096; {
		if _, err := f.Write(chunk); err != nil {
			chunk = chunk[:len(chunk)/2]
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			tb.Fatal(err)
		}
	}
}

// TakeInodes makes files until no more can be made, and returns what removes
// them.
func TakeInodes(tb testing.TB, disk string) (empty func()) {
	tb.Helper()
	dir := filepath.Join(disk, "files")
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	for i := 0; ; i++ {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
		if errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			tb.Fatal(err)
		}
		f.Close()
	}
	return func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Fatal(err)
		}
	}
}
