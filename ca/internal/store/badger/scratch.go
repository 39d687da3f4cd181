package badger

// Scratch copies. Badger repairs what it opens: it cuts its log at the first
// record that it cannot read and deletes tables that its manifest does not
// name. So a store is first inspected in a copy, in a folder inside its own
// (another place may be another file system); one that is damaged stays as it
// was found. Tables, which are never changed, are linked.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	bdg "github.com/dgraph-io/badger/v4"
)

const scratchName = "checking"

const (
	tableExt = ".sst"
	memExt   = ".mem"
)

// withScratch opens a copy of Badger's files in dir and hands it to look. The
// caller holds the lock. Badger may panic over damaged files, which is an error
// here.
func withScratch(dir string, opts bdg.Options, look func(db *bdg.DB) error) (err error) {
	scratch := filepath.Join(dir, scratchName)
	if err := os.RemoveAll(scratch); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	if err := copyStore(dir, scratch); err != nil {
		return fmt.Errorf("copy to inspect: %w", err)
	}
	if err := dropUseless(scratch); err != nil {
		return err
	}
	if err := errors.Join(checkTables(scratch, opts), checkLogs(scratch)); err != nil {
		return &openError{err}
	}
	opts.Dir, opts.ValueDir = scratch, scratch
	// Without compaction no table is deleted: Badger empties what it deletes,
	// and a link would be emptied with it. Then nothing must wait for compaction:
	// Badger makes tables of its logs when it opens, and would stall for ever.
	opts.NumCompactors, opts.NumLevelZeroTablesStall = 0, math.MaxInt
	opts.SyncWrites = false
	db, err := openDB(opts)
	if err != nil {
		return &openError{err}
	}
	return errors.Join(look(db), db.Close())
}

// openError is what Badger said of files that it cannot open.
type openError struct{ err error }

func (e *openError) Error() string { return e.err.Error() }

// openDB opens Badger without its lock. A panic becomes an error; then Badger
// has left things open, and the process should end.
func openDB(opts bdg.Options) (db *bdg.DB, err error) {
	defer func() {
		if p := recover(); p != nil {
			first, _, _ := strings.Cut(fmt.Sprint(p), "\n")
			err = fmt.Errorf("open Badger: panic: %s", first)
		}
	}()
	return bdg.OpenManaged(opts.WithBypassLockGuard(true))
}

// copyStore copies Badger's files.
func copyStore(from, to string) error {
	files, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	if err := roomToCopy(from, files); err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	for _, file := range files {
		name := file.Name()
		if !file.Type().IsRegular() || name == lockName || name == headName || holdsNothing(name) {
			continue
		}
		target := filepath.Join(to, name)
		if strings.HasSuffix(name, tableExt) && os.Link(filepath.Join(from, name), target) == nil {
			continue
		}
		if err := copySparse(filepath.Join(from, name), target); err != nil {
			return err
		}
	}
	return nil
}

// roomToCopy makes sure that a copy, and the tables that Badger makes of its
// logs, do not fill the disk: writing to a mapped file there ends the process.
func roomToCopy(dir string, files []os.DirEntry) error {
	var need int64
	for _, file := range files {
		if strings.HasSuffix(file.Name(), tableExt) || holdsNothing(file.Name()) {
			continue
		}
		info, err := file.Info()
		switch {
		case err != nil || !info.Mode().IsRegular():
		case strings.HasSuffix(file.Name(), memExt): // more is allocated than written
			written, err := writtenBytes(filepath.Join(dir, file.Name()))
			if err != nil {
				return err
			}
			need += written
		default:
			need += allocated(info)
		}
	}
	need = 2*need + 1<<20
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		return err
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < need {
		return fmt.Errorf("%d bytes are free, it needs %d: make room on the disk", free, need)
	}
	return nil
}

// writtenBytes is what copySparse will write of a file.
func writtenBytes(path string) (n int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var buf [len(zeroes)]byte
	for {
		m, err := io.ReadFull(f, buf[:])
		if !bytes.Equal(buf[:m], zeroes[:m]) {
			n += int64(m)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return n, nil
		}
		if err != nil {
			return 0, err
		}
	}
}

// allocated is what a file takes on the disk.
func allocated(info os.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}

var zeroes [64 << 10]byte

// copySparse copies a file and leaves holes where it has only zeroes: Badger's
// logs are mapped at twice their size.
func copySparse(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	var (
		at  int64
		buf [len(zeroes)]byte
	)
	for {
		n, err := io.ReadFull(in, buf[:])
		if n > 0 && !bytes.Equal(buf[:n], zeroes[:n]) {
			if _, err := out.WriteAt(buf[:n], at); err != nil {
				return errors.Join(err, out.Close())
			}
		}
		at += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return errors.Join(out.Truncate(at), out.Close())
		}
		if err != nil {
			return errors.Join(err, out.Close())
		}
	}
}

// dropUseless removes what holds nothing of ours and may keep Badger from
// opening: logs of no bytes (Badger empties a log before it deletes it, and may
// have been killed in between), the value log, which stays empty, statistics
// over it, and the registry of encryption keys that we do not use.
func dropUseless(dir string) error {
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, file := range files {
		useless := holdsNothing(file.Name())
		if strings.HasSuffix(file.Name(), memExt) {
			info, err := file.Info()
			if err != nil {
				return err
			}
			useless = info.Size() == 0
		}
		if !useless {
			continue
		}
		if err := os.Remove(filepath.Join(dir, file.Name())); err != nil {
			return err
		}
	}
	return nil
}

func holdsNothing(name string) bool {
	return name == bdg.KeyRegistryFileName || name == "DISCARD" || strings.HasSuffix(name, ".vlog")
}
