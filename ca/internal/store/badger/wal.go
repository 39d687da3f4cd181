package badger

// The next write-ahead log of Badger. Badger makes NNNNN.mem sparse and writes
// to its mapping, in the middle of a commit and while no read can run. So the
// file is made before, with its blocks but of size 0, which to Badger is a new
// one: it gives it its size, and finds the blocks there.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"merlon.dev/sdk/durable"
)

const (
	memTableBytes = 16 << 20
	walBytes      = 2 * memTableBytes // what Badger maps
)

// nextWAL is the file that Badger will turn to when the log in use is full.
type nextWAL struct {
	file   *os.File
	number int
}

func walPath(dir string, number int) string {
	return filepath.Join(dir, fmt.Sprintf("%05d%s", number, memExt))
}

// stock makes the next log unless it is there. Only the committer calls it,
// before each batch: one more look at an open file.
func (g *guard) stock() error {
	if g.next == nil {
		last, err := lastWAL(g.dir)
		if err != nil {
			return fmt.Errorf("look for the log of the store: %v", err)
		}
		return g.prepare(last + 1)
	}
	info, err := g.next.file.Stat()
	if err != nil {
		return fmt.Errorf("look at the next log of the store: %v", err)
	}
	if info.Size() == 0 {
		return nil
	}
	number := g.next.number + 1
	if err := g.drop(); err != nil {
		return err
	}
	return g.prepare(number)
}

// prepare makes the log with the given number, and its blocks.
func (g *guard) prepare(number int) error {
	path := walPath(g.dir, number)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return shortf("make the next log of the store: %v", err)
	}
	if err := allocate(file, 0, walBytes, keepSize); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return errors.Join(shortf("the disk of %s has no %s for the next log of the store (%v): free some space there, then writes go on by themselves",
			g.dir, mebibytes(walBytes), err), file.Close(), os.Remove(path))
	}
	if err := durable.SyncDir(g.dir); err != nil { // Badger does not
		return errors.Join(fmt.Errorf("sync %s: %v", g.dir, err), file.Close(), os.Remove(path))
	}
	g.next = &nextWAL{file: file, number: number}
	return nil
}

// drop forgets the next log, which may be Badger's by now.
func (g *guard) drop() error {
	if g.next == nil {
		return nil
	}
	file := g.next.file
	g.next = nil
	return file.Close()
}

// remove takes the next log away again, once Badger is closed. Badger may have
// turned to it with the last batch, emptied it as it closed, and removed it.
func (g *guard) remove() error {
	if g.next == nil {
		return nil
	}
	path := g.next.file.Name()
	info, err := g.next.file.Stat()
	if err = errors.Join(err, g.drop()); err != nil || info.Size() > 0 {
		return err
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// walsOf returns the sizes of the logs in a folder, by number.
func walsOf(folder *os.File) map[int]int64 {
	sizes := make(map[int]int64)
	names, _ := folder.Readdirnames(-1)
	for _, name := range names {
		number, err := strconv.Atoi(strings.TrimSuffix(name, memExt))
		if err != nil || !strings.HasSuffix(name, memExt) {
			continue
		}
		if info, err := os.Stat(filepath.Join(folder.Name(), name)); err == nil {
			sizes[number] = info.Size()
		}
	}
	return sizes
}

// lastWAL is the number of the log in use.
func lastWAL(dir string) (last int, err error) {
	folder, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer folder.Close()
	for number, size := range walsOf(folder) {
		if size > 0 {
			last = max(last, number)
		}
	}
	return last, nil
}
