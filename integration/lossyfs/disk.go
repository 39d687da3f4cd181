// The disk: what a process sees of its files, what of that a loss of power leaves, and
// the loss. Nothing here knows FUSE.

package main

import (
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"
)

const pageBytes = 4096

type page [pageBytes]byte

// content is that of a file. Where it has no page there are zeroes.
type content struct {
	pages map[int64]*page
	size  int64
}

// inode is a file or a folder. Mode and owner are durable with its name; content and
// names are when they are synced.
type inode struct {
	number         uint64
	mode, uid, gid uint32
	links          int
	changed        time.Time

	now, synced content
	dirty       map[int64]bool // pages of now that are not in synced

	names, syncedNames map[string]*inode // of a folder
}

func (in *inode) isFolder() bool { return in.mode&syscall.S_IFMT == syscall.S_IFDIR }

// edit is one change of a folder: name is now to's, or nobody's.
type edit struct {
	folder *inode
	name   string
	to     *inode
}

// disk is the whole of it. Its methods but those of power (mu, off, cut, sync) are for
// who holds mu.
type disk struct {
	mu   sync.Mutex
	off  bool // there is no power: nothing is read or written
	root *inode
	last uint64
	// unsynced are operations on names, each some edits, in order.
	unsynced [][]edit
}

func newDisk() *disk {
	d := &disk{}
	d.root = d.newInode(syscall.S_IFDIR | 0o700)
	d.root.links = 1
	return d
}

func (d *disk) newInode(mode uint32) *inode {
	d.last++
	in := &inode{number: d.last, mode: mode, changed: time.Now()}
	if in.isFolder() {
		in.names, in.syncedNames = make(map[string]*inode), make(map[string]*inode)
		return in
	}
	in.now.pages, in.synced.pages, in.dirty = make(map[int64]*page), make(map[int64]*page), make(map[int64]bool)
	return in
}

// rename carries out one operation on names.
func (d *disk) rename(edits ...edit) {
	for _, e := range edits {
		if was := e.folder.names[e.name]; was != nil {
			was.links--
		}
		if e.to == nil {
			delete(e.folder.names, e.name)
		} else {
			e.folder.names[e.name] = e.to
			e.to.links++
		}
		e.folder.changed = time.Now()
	}
	d.unsynced = append(d.unsynced, edits)
}

// read fills b from at on, and returns how much there is.
func (in *inode) read(b []byte, at int64) int {
	n := int(max(0, min(int64(len(b)), in.now.size-at)))
	for done := 0; done < n; {
		i, off := (at+int64(done))/pageBytes, (at+int64(done))%pageBytes
		length := min(n-done, pageBytes-int(off))
		if p := in.now.pages[i]; p != nil {
			copy(b[done:done+length], p[off:])
		} else {
			clear(b[done : done+length])
		}
		done += length
	}
	return n
}

// own is a page of now that may be changed: what is synced keeps its own.
func (in *inode) own(i int64) *page {
	in.dirty[i] = true
	p := in.now.pages[i]
	switch {
	case p == nil:
		p = new(page)
	case p == in.synced.pages[i]:
		p = new(*p)
	}
	in.now.pages[i] = p
	return p
}

func (in *inode) write(b []byte, at int64) {
	in.changed = time.Now()
	in.now.size = max(in.now.size, at+int64(len(b)))
	for len(b) > 0 {
		off := at % pageBytes
		n := copy(in.own(at / pageBytes)[off:], b)
		b, at = b[n:], at+int64(n)
	}
}

func (in *inode) resize(size int64) {
	in.changed = time.Now()
	if size < in.now.size {
		for i := range in.now.pages {
			switch {
			case i*pageBytes >= size:
				delete(in.now.pages, i)
				in.dirty[i] = true
			case (i+1)*pageBytes > size:
				clear(in.own(i)[size-i*pageBytes:])
			}
		}
	}
	in.now.size = size
}

// sync makes the content of a file durable, or the names in a folder: those of no
// other, and the content of none of its files.
func (d *disk) sync(in *inode) {
	if in.isFolder() {
		in.syncedNames = maps.Clone(in.names)
		d.unsynced = without(d.unsynced, in)
		return
	}
	for i := range in.dirty {
		in.keep(i)
	}
	in.synced.size = in.now.size
	clear(in.dirty)
}

// without are the operations that are left when a folder is synced.
func without(operations [][]edit, folder *inode) (left [][]edit) {
	for _, edits := range operations {
		edits = slices.DeleteFunc(edits, func(e edit) bool { return e.folder == folder })
		if len(edits) > 0 {
			left = append(left, edits)
		}
	}
	return left
}

// keep makes one page durable.
func (in *inode) keep(i int64) {
	if p := in.now.pages[i]; p != nil {
		in.synced.pages[i] = p
	} else {
		delete(in.synced.pages, i)
	}
}

// syncAll makes everything durable, as sync(8).
func (d *disk) syncAll() {
	for _, in := range d.inodes(func(in *inode) map[string]*inode { return in.names }) {
		d.sync(in)
	}
}

// inodes are those that can be reached by names, each once.
func (d *disk) inodes(names func(*inode) map[string]*inode) (all []*inode) {
	seen := map[*inode]bool{d.root: true}
	all = append(all, d.root)
	for i := 0; i < len(all); i++ {
		folder := names(all[i])
		for _, name := range slices.Sorted(maps.Keys(folder)) {
			if in := folder[name]; !seen[in] {
				seen[in] = true
				all = append(all, in)
			}
		}
	}
	return all
}

// lost says what a loss of power took.
type lost struct{ operations, pages, files int }

// cut takes the power, and what was not synced with it. With some, a part of that
// stays: of the operations on names the first few, as a journal has them; of pages
// and sizes of files any.
func (d *disk) cut(some *rand.Rand) (l lost) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.off = true
	l.operations = len(d.unsynced)
	if some != nil {
		kept := some.IntN(len(d.unsynced) + 1)
		for _, edits := range d.unsynced[:kept] {
			for _, e := range edits {
				e.folder.syncedNames[e.name] = e.to
				if e.to == nil {
					delete(e.folder.syncedNames, e.name)
				}
			}
		}
		l.operations -= kept
	}
	d.unsynced = nil
	all := d.inodes(func(in *inode) map[string]*inode { return in.syncedNames })
	for _, in := range all {
		in.links = 0
	}
	d.root.links = 1
	for _, in := range all {
		if n := in.lose(some); n > 0 {
			l.pages, l.files = l.pages+n, l.files+1
		}
		for _, to := range in.names {
			to.links++
		}
	}
	return l
}

// lose turns an inode into what is left of it, and says how many pages are lost.
func (in *inode) lose(some *rand.Rand) (pages int) {
	if in.isFolder() {
		in.names = maps.Clone(in.syncedNames)
		return 0
	}
	pages = len(in.dirty)
	if some != nil {
		for _, i := range slices.Sorted(maps.Keys(in.dirty)) {
			if some.IntN(2) == 0 {
				in.keep(i)
				pages--
			}
		}
		if some.IntN(2) == 0 {
			in.synced.size = in.now.size
		}
	}
	in.now = content{maps.Clone(in.synced.pages), in.synced.size}
	clear(in.dirty)
	in.trim()
	return pages
}

// trim drops what was kept of pages beyond the end, and makes the rest durable.
func (in *inode) trim() {
	for i := range in.now.pages {
		switch end := in.now.size - i*pageBytes; {
		case end <= 0:
			delete(in.now.pages, i)
		case end < pageBytes:
			clear(in.own(i)[end:])
		}
	}
	in.synced = content{maps.Clone(in.now.pages), in.now.size}
	clear(in.dirty)
}

// on gives the power back.
func (d *disk) on() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.off = false
}
