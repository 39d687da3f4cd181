// Writing a backup: the file is there whole, or not at all.

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"merlon.dev/ca"
	"merlon.dev/sdk/durable"
)

// writeFile writes a backup beside path, reads it again, and gives it its name
// once it is on the disk. Without force it does not touch a file that exists.
func writeFile(path string, force bool, write func(*os.File) error) (ca.StoreReport, error) {
	exists := hintError{fmt.Errorf("%s exists", path), "choose another name, or replace it with --force"}
	if _, err := os.Lstat(path); err == nil && !force {
		return ca.StoreReport{}, exists
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return ca.StoreReport{}, fmt.Errorf("write the backup: %w", err)
	}
	defer os.Remove(f.Name()) // gone already where all went well
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return ca.StoreReport{}, err
	}
	// What is read back is what a restore will read.
	report, err := ca.VerifyBackup(f.Name())
	if err != nil {
		return report, err
	}
	if report.Problem != "" {
		return report, fmt.Errorf("what was written is damaged: %s", report.Problem)
	}
	report.Place = path
	if !force {
		err = os.Link(f.Name(), path) // fails if somebody was faster
	}
	if force || errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EPERM) { // a file system without links
		err = os.Rename(f.Name(), path)
	}
	if errors.Is(err, fs.ErrExist) {
		return report, exists
	}
	if err != nil {
		return report, fmt.Errorf("write the backup: %w", err)
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil {
		return report, fmt.Errorf("write the backup: %w", err)
	}
	return report, nil
}
