// A CA on a disk with less than its reserve.

package ca_test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"merlon.dev/ca"
)

// A fresh CA that has less than its reserve learns which setting that is.
func TestFreshCABelowTheReserveNamesTheSetting(t *testing.T) {
	dir, err := os.MkdirTemp("", "ca") //nolint:usetesting // t.TempDir's names are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=128m"); err != nil {
		t.Skipf("mounting a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	srv, err := ca.New(ca.Config{
		TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "a.sock"),
		Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", HealthAddress: "127.0.0.1:0",
	})
	if err != nil {
		t.Fatal(err)
	}
	err = srv.Run(t.Context())
	if hint := ca.Hint(err); !strings.Contains(hint, "disk_reserve_mib lower") {
		t.Errorf("the hint is %q", hint)
	}
	if err == nil || !strings.Contains(err.Error(), "disk_reserve_mib") {
		t.Errorf("it ends with %v", err)
	}
}
