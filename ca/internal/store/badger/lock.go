package badger

// One process per store. Badger's own lock is bypassed, because ours is held
// from before the store is inspected until after its head is closed; it is the
// same flock on the same folder.

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"merlon.dev/ca/internal/store"
)

// lockName is the file that names the process, as Badger's does.
const lockName = "LOCK"

// dirLock is a held lock.
type dirLock struct{ dir *os.File }

// lockDir takes the lock on dir, or says who has it.
func lockDir(dir string) (*dirLock, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = fmt.Errorf("%w%s", store.ErrInUse, lockHolder(dir))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &dirLock{f}, nil
}

// sign leaves our process number for others to read. A disk that is full does
// not matter here.
func (l *dirLock) sign() {
	_ = os.WriteFile(filepath.Join(l.dir.Name(), lockName), fmt.Appendf(nil, "%d\n", os.Getpid()), 0o600)
}

// release gives the lock up.
func (l *dirLock) release() error {
	_ = os.Remove(filepath.Join(l.dir.Name(), lockName))
	return l.dir.Close()
}

// lockHolder names the process that has signed; empty if none has.
func lockHolder(dir string) string {
	pid, err := os.ReadFile(filepath.Join(dir, lockName))
	if err != nil || len(pid) > 16 {
		return ""
	}
	return " (pid " + strings.TrimSpace(string(pid)) + ")"
}
