// Files that nobody else may read or replace: what is read back was put there by
// this user or root.

package durable

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// ReadGuarded reads a regular file of this user or root that has at most the given
// mode and size. The file that is checked is the one that is read.
func ReadGuarded(path string, mode fs.FileMode, size int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0) // nor wait for the writer of a pipe
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkInfo(path, info, 0, mode); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, size+1))
	if err != nil {
		return nil, err
	}
	if int64(len(text)) > size {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, size)
	}
	return text, nil
}

// CheckMode refuses what is not of type typ, has more than the given mode, or
// belongs to neither this user nor root.
func CheckMode(path string, typ, max fs.FileMode) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	return checkInfo(path, info, typ, max)
}

func checkInfo(path string, info fs.FileInfo, typ, max fs.FileMode) error {
	if info.Mode().Type() != typ {
		return fmt.Errorf("%s is not a %s", path, map[fs.FileMode]string{0: "regular file", fs.ModeDir: "folder"}[typ])
	}
	if extra := info.Mode().Perm() &^ max; extra != 0 {
		return fmt.Errorf("%s has mode %#o, so others may read or change it; run: chmod %#o %s", path, info.Mode().Perm(), max, path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() && st.Uid != 0 {
		return fmt.Errorf("%s belongs to user %d; run: chown %d %s", path, st.Uid, os.Geteuid(), path)
	}
	return nil
}
