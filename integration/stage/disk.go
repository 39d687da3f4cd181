// A small disk, for tests that fill it.

package stage

import (
	"os"
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
