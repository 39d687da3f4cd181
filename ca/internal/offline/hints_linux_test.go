// What people are told to do next about a store.

package offline

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"merlon.dev/ca/internal/opening"
	"merlon.dev/ca/internal/store/badger"
)

func wantHint(t *testing.T, what string, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(opening.Hint(err), text) {
		t.Errorf("%s: %v, hint %q; want one with %q", what, err, opening.Hint(err), text)
	}
}

func TestVerifySaysWhatToDoNext(t *testing.T) {
	cfg := haStore(t)
	_, err := VerifyStoreDir(filepath.Join(t.TempDir(), "nowhere"))
	wantHint(t, "a folder that is missing", err, "is the folder store in the CA's data_dir")
	_, err = VerifyStoreDir(cfg.DataDir)
	wantHint(t, "a folder that is no store", err, "is the folder store in the CA's data_dir")
	st, err := badger.Open(cfg.StoreDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = VerifyStoreDir(cfg.StoreDir())
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
		if err := syscall.Mount(cfg.StoreDir(), cfg.StoreDir(), "", flags, ""); err != nil {
			t.Skipf("mounting: %v", err)
		}
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(cfg.StoreDir(), 0); err != nil {
			t.Error(err)
		}
	})
	_, err := VerifyStoreDir(cfg.StoreDir())
	wantHint(t, "a disk that is mounted read-only", err, "mount the disk read-write")
}

func TestRestoreOfAnotherTrustDomainSaysWhatToDoNext(t *testing.T) {
	from := haStore(t)
	file := backupFile(t, from)
	to := from
	to.DataDir, to.TrustDomain = filepath.Join(t.TempDir(), "b"), "other.test"
	_, err := Restore(t.Context(), to, file, RestoreOptions{AcceptLoss: true})
	wantHint(t, "a backup of another trust domain", err, "of this trust domain")
}

func TestCheckOwnerOfAFolderThatIsNotThere(t *testing.T) {
	if os.Geteuid() != 0 {
		if err := opening.CheckOwner("/not/there"); err != nil {
			t.Errorf("a new folder: %v; want that making it decides", err)
		}
		return
	}
	dir := t.TempDir()
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	wantHint(t, "root in the folder of another user", opening.CheckOwner(filepath.Join(dir, "new")), "sudo -u")
}
