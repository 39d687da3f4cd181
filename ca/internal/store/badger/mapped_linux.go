package badger

// Blocks before mappings. Badger makes a file, gives it its size, maps it and
// copies into the mapping, all in one function and in goroutines of its own;
// it knows no option to allocate, and a page without a block is a SIGBUS that
// nobody can recover from. Between the size and the copy lies one call that
// can be reached: the function through which golang.org/x/sys/unix maps files.
// Here it is told to allocate first, for the folders of our stores only.
//
// That variable is not part of the interface of its package. If it goes, this
// does not link; if its shape changes, TestBadgerMapsThroughTheGuard fails.

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	_ "unsafe" // for go:linkname

	bdg "github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"

	"merlon.dev/sdk/durable"
)

//go:linkname mapper golang.org/x/sys/unix.mapper
var mapper *struct {
	sync.Mutex
	_      map[*byte][]byte
	mmap   func(addr, length uintptr, prot, flags, fd int, offset int64) (uintptr, error)
	munmap func(addr uintptr, length uintptr) error
}

var (
	// guards are the guards of the open stores, by folder.
	guards sync.Map
	// guarded counts the mappings that have passed one, for a test.
	guarded atomic.Int64
)

// Before anything runs that could map a file.
func init() { //nolint:gochecknoinits // a race otherwise
	direct := mapper.mmap
	mapper.mmap = func(addr, length uintptr, prot, flags, fd int, offset int64) (uintptr, error) {
		if flags&unix.MAP_SHARED != 0 && prot&unix.PROT_WRITE != 0 && fd >= 0 {
			if err := beforeMapping(fd, offset, int64(length)); err != nil {
				return 0, err
			}
		}
		return direct(addr, length, prot, flags, fd, offset)
	}
}

// watch makes mappings in the guard's folder pass it.
func (g *guard) watch() { guards.Store(g.dir, g) }

func (g *guard) unwatch() { guards.CompareAndDelete(g.dir, g) }

// beforeMapping allocates what is about to be mapped to be written to.
func beforeMapping(fd int, offset, length int64) error {
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return nil //nolint:nilerr // no /proc: see Open
	}
	dir := filepath.Dir(path)
	if inside := filepath.Base(dir); inside == scratchName || inside == partialName {
		dir = filepath.Dir(dir)
	}
	g, ours := guards.Load(dir)
	if !ours {
		return nil
	}
	guarded.Add(1)
	return g.(*guard).mapping(fd, path, offset, length)
}

func (g *guard) mapping(fd int, path string, offset, length int64) error {
	switch filepath.Ext(path) {
	case tableExt:
		dir, made := filepath.Dir(path), blocksOf(fd) == 0
		g.await(filepath.Base(path), func() error {
			err := errors.Join(allocateFD(fd, offset, length, 0), allocateAfter(filepath.Join(dir, bdg.ManifestFilename), manifestRoom))
			if made {
				err = errors.Join(err, durable.SyncDir(dir))
			}
			return err
		})
		return nil
	case ".vlog": // only its header is ever written: see badgerOptions
		length = min(length, vlogHeaderRoom)
	}
	return allocateFD(fd, offset, length, 0)
}

const (
	vlogHeaderRoom = 64 << 10
	// manifestRoom is for what Badger appends for a table: half a line in it,
	// and all that comes after is lost with the next start.
	manifestRoom = 64 << 10

	keepSize = unix.FALLOC_FL_KEEP_SIZE
)

// allocateFD gives a file its blocks. One that has them, and a file system
// that cannot, are no errors.
func allocateFD(fd int, offset, length int64, mode uint32) error {
	if mode == 0 && blocksOf(fd)*512 >= offset+length {
		return nil
	}
	for {
		err := unix.Fallocate(fd, mode, offset, length)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, errors.ErrUnsupported):
			return nil
		}
		return err
	}
}

// blocksOf is how many blocks a file has: 0 for one that was just made.
func blocksOf(fd int) int64 {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0
	}
	return st.Blocks
}

func allocate(file *os.File, offset, length int64, mode uint32) error {
	return allocateFD(int(file.Fd()), offset, length, mode)
}

// allocateAfter gives a file blocks beyond its end.
func allocateAfter(path string, length int64) error {
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err == nil {
		err = allocate(file, info.Size(), length, keepSize)
	}
	return errors.Join(err, file.Close())
}

// spaceOf asks the file system of dir.
func spaceOf(dir string) (diskSpace, error) {
	var st unix.Statfs_t
	for {
		err := unix.Statfs(dir, &st)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return diskSpace{}, err
		}
		break
	}
	return diskSpace{
		free:   st.Bavail * uint64(st.Frsize),
		inodes: st.Ffree, inodeMax: st.Files, readOnly: st.Flags&unix.ST_RDONLY != 0,
	}, nil
}
