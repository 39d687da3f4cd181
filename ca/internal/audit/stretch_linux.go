package audit

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// allocateAhead gives the file blocks beyond its end, and leaves its size.
func allocateAhead(file *os.File, end, length int64) error {
	for {
		err := unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_KEEP_SIZE, end, length)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// freeOn is how many bytes we may use on the disk of dir.
func freeOn(dir string) (uint64, error) {
	var st unix.Statfs_t
	for {
		err := unix.Statfs(dir, &st)
		if err == nil {
			return st.Bavail * uint64(st.Frsize), nil
		}
		if !errors.Is(err, unix.EINTR) {
			return 0, err
		}
	}
}
