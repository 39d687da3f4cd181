// Writing a backup: the file is there whole, or not at all. Only a regular file
// is ever replaced: what somebody names by mistake may be a disk.

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"merlon.dev/ca/internal/offline"
	"merlon.dev/sdk/durable"
)

// unfinished stands in the names of files that are being written.
const unfinished = ".unfinished-"

// target is the file that path names, through links, if it may be written.
func target(path string, force bool) (string, error) {
	if path == "-" {
		return "", usageError{"a backup goes to a file, which is read again before it counts", "merlon store backup /backup/last.backup"}
	}
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return path, nil
	}
	if err != nil {
		return "", fmt.Errorf("write the backup: %w", err)
	}
	if fi.Mode()&fs.ModeSymlink != 0 {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			fi, err = os.Lstat(path)
		}
		if err != nil {
			return "", hintError{fmt.Errorf("write the backup through a link: %w", err), "name the file itself"}
		}
	}
	if !fi.Mode().IsRegular() {
		return "", hintError{fmt.Errorf("%s is no regular file (%s), and is not replaced", path, fi.Mode()), "name a file, such as /backup/last.backup"}
	}
	if !force {
		return "", errExists(path)
	}
	return path, nil
}

func errExists(path string) error {
	return hintError{fmt.Errorf("%s exists", path), "choose another name, or replace it with --force"}
}

// removeUnfinished removes what commands that were killed have left of path. One
// that still writes holds a lock.
func removeUnfinished(path string) {
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+unfinished+"*"))
	for _, name := range left {
		if f, err := os.Open(name); err == nil {
			if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
				os.Remove(name)
			}
			f.Close()
		}
	}
}

// writeFile writes a backup beside the file that path names, reads it again, and
// gives it its name once it is on the disk. Without force it does not touch a
// file that exists.
func writeFile(path string, force bool, write func(*os.File) error) (offline.StoreReport, error) {
	to, err := target(path, force)
	if err != nil {
		return offline.StoreReport{}, err
	}
	removeUnfinished(to)
	if err := checkFolder(filepath.Dir(to), "make it, or name a file in a folder that is there"); err != nil {
		return offline.StoreReport{}, err
	}
	f, err := os.CreateTemp(filepath.Dir(to), "."+filepath.Base(to)+unfinished+"*") // mode 0600
	if err != nil {
		return offline.StoreReport{}, fmt.Errorf("write the backup: %w", err)
	}
	defer f.Close()           // with its lock
	defer os.Remove(f.Name()) // gone already where all went well
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return offline.StoreReport{}, fmt.Errorf("write the backup: lock it: %w", err)
	}
	if err = write(f); err == nil {
		err = f.Sync()
	}
	if err != nil {
		return offline.StoreReport{}, err
	}
	// What is read back is what a restore will read.
	report, err := offline.VerifyBackup(f.Name())
	if err != nil {
		return report, err
	}
	if report.Problem != "" {
		return report, fmt.Errorf("what was written is damaged: %s", report.Problem)
	}
	report.Place = path
	return report, name(f.Name(), to, force)
}

// name gives a file that is whole its name, durably.
func name(file, to string, force bool) error {
	var err error
	if !force {
		err = os.Link(file, to) // fails if somebody was faster
	}
	if force || errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EPERM) { // a file system without links
		err = os.Rename(file, to)
	}
	if errors.Is(err, fs.ErrExist) {
		return errExists(to)
	}
	if err == nil {
		err = durable.SyncDir(filepath.Dir(to))
	}
	if err != nil {
		return fmt.Errorf("write the backup: %w", err)
	}
	return nil
}
