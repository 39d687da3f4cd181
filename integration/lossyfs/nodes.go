// The disk as the kernel sees it. The kernel writes through, and what a process wrote
// to a mapping comes with its msync, as WRITE and then FSYNC. It also comes when the
// kernel likes: that makes nothing durable.

package main

import (
	"context"
	"maps"
	"slices"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// node is an inode of a mount.
type node struct {
	fs.Inode
	disk *disk
	in   *inode
}

var _ interface {
	fs.NodeLookuper
	fs.NodeGetattrer
	fs.NodeSetattrer
	fs.NodeReaddirer
	fs.NodeCreater
	fs.NodeMkdirer
	fs.NodeUnlinker
	fs.NodeRmdirer
	fs.NodeRenamer
	fs.NodeLinker
	fs.NodeOpener
	fs.NodeReader
	fs.NodeWriter
	fs.NodeFsyncer
	fs.NodeAllocater
	fs.NodeStatfser
} = (*node)(nil)

// enter is for every operation: without power there is none.
func (n *node) enter() (leave func(), errno syscall.Errno) {
	n.disk.mu.Lock()
	if n.disk.off {
		n.disk.mu.Unlock()
		return nil, syscall.EIO
	}
	return n.disk.mu.Unlock, 0
}

func (in *inode) attr(out *fuse.Attr) {
	out.Ino, out.Mode, out.Nlink = in.number, in.mode, uint32(in.links)
	out.Owner = fuse.Owner{Uid: in.uid, Gid: in.gid}
	out.Size, out.Blksize = uint64(in.now.size), pageBytes
	out.Blocks = uint64(len(in.now.pages)) * (pageBytes / 512)
	if in.isFolder() {
		out.Size, out.Nlink = pageBytes, 2
	}
	out.SetTimes(&in.changed, &in.changed, &in.changed)
}

// child is the node of an inode below n.
func (n *node) child(ctx context.Context, in *inode, out *fuse.EntryOut) *fs.Inode {
	in.attr(&out.Attr)
	return n.NewInode(ctx, &node{disk: n.disk, in: in}, fs.StableAttr{Mode: in.mode & syscall.S_IFMT, Ino: in.number})
}

func (n *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	leave, errno := n.enter()
	if errno != 0 {
		return nil, errno
	}
	defer leave()
	in := n.in.names[name]
	if in == nil {
		return nil, syscall.ENOENT
	}
	return n.child(ctx, in, out), 0
}

func (n *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	leave, errno := n.enter()
	if errno != 0 {
		return errno
	}
	defer leave()
	n.in.attr(&out.Attr)
	return 0
}

func (n *node) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	leave, errno := n.enter()
	if errno != 0 {
		return errno
	}
	defer leave()
	if mode, ok := in.GetMode(); ok {
		n.in.mode = n.in.mode&syscall.S_IFMT | mode&^uint32(syscall.S_IFMT)
	}
	if uid, ok := in.GetUID(); ok {
		n.in.uid = uid
	}
	if gid, ok := in.GetGID(); ok {
		n.in.gid = gid
	}
	if size, ok := in.GetSize(); ok {
		n.in.resize(int64(size))
	}
	if mtime, ok := in.GetMTime(); ok {
		n.in.changed = mtime
	}
	n.in.attr(&out.Attr)
	return 0
}

func (n *node) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	leave, errno := n.enter()
	if errno != 0 {
		return nil, errno
	}
	defer leave()
	var entries []fuse.DirEntry
	for _, name := range slices.Sorted(maps.Keys(n.in.names)) {
		in := n.in.names[name]
		entries = append(entries, fuse.DirEntry{Name: name, Mode: in.mode & syscall.S_IFMT, Ino: in.number})
	}
	return fs.NewListDirStream(entries), 0
}

// make adds a new inode.
func (n *node) make(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	leave, errno := n.enter()
	if errno != 0 {
		return nil, errno
	}
	defer leave()
	if n.in.names[name] != nil {
		return nil, syscall.EEXIST
	}
	in := n.disk.newInode(mode)
	if caller, ok := fuse.FromContext(ctx); ok {
		in.uid, in.gid = caller.Uid, caller.Gid
	}
	n.disk.rename(edit{n.in, name, in})
	return n.child(ctx, in, out), 0
}

func (n *node) Create(ctx context.Context, name string, _, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	child, errno := n.make(ctx, name, syscall.S_IFREG|mode&^uint32(syscall.S_IFMT), out)
	return child, nil, fuse.FOPEN_KEEP_CACHE, errno
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return n.make(ctx, name, syscall.S_IFDIR|mode&^uint32(syscall.S_IFMT), out)
}

func (n *node) Unlink(_ context.Context, name string) syscall.Errno {
	leave, errno := n.enter()
	if errno != 0 {
		return errno
	}
	defer leave()
	if n.in.names[name] == nil {
		return syscall.ENOENT
	}
	n.disk.rename(edit{n.in, name, nil})
	return 0
}

func (n *node) Rmdir(_ context.Context, name string) syscall.Errno {
	leave, errno := n.enter()
	if errno != 0 {
		return errno
	}
	defer leave()
	switch in := n.in.names[name]; {
	case in == nil:
		return syscall.ENOENT
	case len(in.names) > 0:
		return syscall.ENOTEMPTY
	}
	n.disk.rename(edit{n.in, name, nil})
	return 0
}

func (n *node) Rename(_ context.Context, name string, to fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	leave, errno := n.enter()
	if errno != 0 {
		return errno
	}
	defer leave()
	folder := to.(*node).in
	in, there := n.in.names[name], folder.names[newName]
	switch {
	case flags != 0:
		return syscall.EINVAL
	case in == nil:
		return syscall.ENOENT
	case there == in:
		return 0
	case there != nil && len(there.names) > 0:
		return syscall.ENOTEMPTY
	}
	n.disk.rename(edit{folder, newName, in}, edit{n.in, name, nil})
	return 0
}

func (n *node) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	leave, errno := n.enter()
	if errno != 0 {
		return nil, errno
	}
	defer leave()
	if n.in.names[name] != nil {
		return nil, syscall.EEXIST
	}
	in := target.(*node).in
	n.disk.rename(edit{n.in, name, in})
	return n.child(ctx, in, out), 0
}

func (n *node) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	leave, errno := n.enter()
	if errno != 0 {
		return nil, 0, errno
	}
	defer leave()
	if flags&syscall.O_TRUNC != 0 {
		n.in.resize(0)
	}
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *node) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	leave, errno := n.enter()
	if errno != 0 {
		return nil, errno
	}
	defer leave()
	return fuse.ReadResultData(dest[:n.in.read(dest, off)]), 0
}

func (n *node) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	leave, errno := n.enter()
	if errno != 0 {
		return 0, errno
	}
	defer leave()
	n.in.write(data, off)
	return uint32(len(data)), 0
}

// Fsync is fsync, fdatasync and msync, and what the kernel does after a write to a
// file that is open with O_SYNC.
func (n *node) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	leave, errno := n.enter()
	if errno != 0 {
		return errno
	}
	defer leave()
	n.disk.sync(n.in)
	return 0
}

// Allocate knows no blocks: there are always enough.
func (n *node) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	leave, errno := n.enter()
	if errno != 0 {
		return errno
	}
	defer leave()
	const keepSize = 1
	switch {
	case mode&^keepSize != 0:
		return syscall.EOPNOTSUPP
	case mode == 0:
		n.in.resize(max(n.in.now.size, int64(off+size)))
	}
	return 0
}

func (n *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	const blocks = 16 << 30 / pageBytes
	*out = fuse.StatfsOut{Blocks: blocks, Bfree: blocks, Bavail: blocks, Files: 1 << 20, Ffree: 1 << 20, Bsize: pageBytes, Frsize: pageBytes, NameLen: 255}
	return 0
}

// mount puts the disk at path. What the kernel keeps of a mount is right as long as it
// lives: nobody else changes the disk.
func (d *disk) mount(path string) (*fuse.Server, error) {
	const forever = time.Hour
	keep := forever
	server, err := fs.Mount(path, &node{disk: d, in: d.root}, &fs.Options{
		EntryTimeout: &keep, AttrTimeout: &keep,
		RootStableAttr: &fs.StableAttr{Ino: d.root.number},
		MountOptions: fuse.MountOptions{
			FsName: "lossyfs", Name: "lossyfs", DirectMountStrict: true,
			ExplicitDataCacheControl: true, DisableXAttrs: true, MaxWrite: 1 << 20, MaxReadAhead: 1 << 20,
		},
	})
	return server, err
}
