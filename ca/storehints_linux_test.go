// What people are told to do next about a store.

package ca

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"merlon.dev/ca/internal/store/badger"
)

func wantHint(t *testing.T, what string, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(storeHint(err), text) {
		t.Errorf("%s: %v, hint %q; want one with %q", what, err, storeHint(err), text)
	}
}

func TestVerifySaysWhatToDoNext(t *testing.T) {
	cfg := haStore(t)
	_, err := VerifyStoreDir(filepath.Join(t.TempDir(), "nowhere"))
	wantHint(t, "a folder that is missing", err, "is the folder store in the CA's data_dir")
	_, err = VerifyStoreDir(cfg.DataDir)
	wantHint(t, "a folder that is no store", err, "is the folder store in the CA's data_dir")
	st, err := badger.Open(cfg.storeDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = VerifyStoreDir(cfg.storeDir())
	wantHint(t, "a store in use", err, "merlon store backup FILE")
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestVerifyOnAReadOnlyDiskSaysWhatToDoNext(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	cfg := haStore(t)
	for _, flags := range []uintptr{syscall.MS_BIND, syscall.MS_BIND | syscall.MS_REMOUNT | syscall.MS_RDONLY} {
		if err := syscall.Mount(cfg.storeDir(), cfg.storeDir(), "", flags, ""); err != nil {
			t.Skipf("mounting: %v", err)
		}
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(cfg.storeDir(), 0); err != nil {
			t.Error(err)
		}
	})
	_, err := VerifyStoreDir(cfg.storeDir())
	wantHint(t, "a disk that is mounted read-only", err, "mount the disk read-write")
}

func TestRestoreOfAnotherTrustDomainSaysWhatToDoNext(t *testing.T) {
	from := haStore(t)
	file := backupFile(t, from)
	to := from
	to.DataDir, to.TrustDomain = filepath.Join(t.TempDir(), "b"), "other.test"
	_, err := RestoreStore(t.Context(), to, file, RestoreOptions{AcceptLoss: true})
	wantHint(t, "a backup of another trust domain", err, "of this trust domain")
}

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
	srv, err := New(Config{
		TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "a.sock"),
		Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", HealthAddress: "127.0.0.1:0",
	})
	if err != nil {
		t.Fatal(err)
	}
	err = srv.Run(t.Context())
	wantHint(t, "a fresh CA below the reserve", err, "disk_reserve_mib lower")
	if err == nil || !strings.Contains(err.Error(), "disk_reserve_mib") {
		t.Errorf("it ends with %v", err)
	}
}

func TestCheckOwnerOfAFolderThatIsNotThere(t *testing.T) {
	if os.Geteuid() != 0 {
		if err := checkOwner("/not/there"); err != nil {
			t.Errorf("a new folder: %v; want that making it decides", err)
		}
		return
	}
	dir := t.TempDir()
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	wantHint(t, "root in the folder of another user", checkOwner(filepath.Join(dir, "new")), "sudo -u")
}
