// Package durable puts files away so that a crash, also of the machine, leaves
// the old content or the new, and never a part.
package durable

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Unfinished begins the names of files that WriteFile has not renamed yet; no
// name that it is given may begin so.
const Unfinished = ".new-"

// WriteFile replaces name in dir in one step, mode 0600.
func WriteFile(dir, name string, content []byte) error {
	if err := writeFile(dir, name, content); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

func writeFile(dir, name string, content []byte) error {
	tmp, err := os.CreateTemp(dir, Unfinished+name+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // fails after the rename, as it should
	_, err = tmp.Write(content)
	if err == nil {
		err = tmp.Sync()
	}
	if err := errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), filepath.Join(dir, name)); err != nil {
		return err
	}
	return SyncDir(dir)
}

// RemoveUnfinished removes from dir what a crash left of WriteFile: it may hold
// a key.
func RemoveUnfinished(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), Unfinished) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("remove an unfinished file: %w", err)
			}
		}
	}
	return nil
}

// SyncDir makes the names in dir durable: what was made, renamed or removed.
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
