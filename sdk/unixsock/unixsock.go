// Package unixsock is about Unix sockets that prove who is at the other end:
// it binds them without the usual traps (a directory that others can write, a
// pre-created socket or symlink) and gives gRPC both ends' kernel-attested
// credentials. CA, agent, SDK and sidecar use it for every local socket.
package unixsock

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"merlon.dev/sdk/durable"
)

// MaxPath is the longest socket path that Linux takes, in bytes (sun_path less
// its NUL).
const MaxPath = 107

// Access says who may reach a socket through its directory.
type Access int

// The two kinds of socket.
const (
	// Private sockets are for root and the process's own user: directory 0700,
	// socket 0600.
	Private Access = iota
	// Public sockets are for every user of the node: directory 0755, socket
	// 0777. Others can connect and cannot replace the socket.
	Public
	// Shared sockets are for some users, whom the server tells apart with
	// PeerFromContext: directory 0711, socket 0666. Others can connect, and it
	// is for the server to refuse them.
	Shared
)

// modes are the modes of a socket and of its directory, and the bits that the
// directory must not have.
var modes = [...]struct{ dir, socket, forbidden fs.FileMode }{
	Private: {0o700, 0o600, 0o077},
	Public:  {0o755, 0o777, 0o022},
	Shared:  {0o711, 0o666, 0o022},
}

// Listen binds a socket at path, making its directory when it is missing. A
// socket left behind by a dead process is replaced. Listen refuses a path
// longer than MaxPath, a directory that another user owns, can write or can
// replace by another, a symlink or any other file at path, and a socket on which
// somebody still listens.
func Listen(path string, access Access) (net.Listener, error) {
	if len(path) > MaxPath {
		return nil, fmt.Errorf("listen on %s: the path has %d bytes and a socket path at most %d; choose a shorter folder", path, len(path), MaxPath)
	}
	mode := modes[access]
	dir := filepath.Dir(path)
	if err := checkAbove(dir); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := makeDir(dir, access); err != nil {
		return nil, fmt.Errorf("make the socket's directory: %w", err)
	}
	if err := checkDir(dir, mode.forbidden); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	lis, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, mode.socket); err != nil {
		lis.Close()
		return nil, fmt.Errorf("set the mode of %s: %w", path, err)
	}
	return lis, nil
}

// Adopt judges a socket that somebody else opened at path for this process: its
// directory must be one in which Listen would have opened it.
func Adopt(lis *net.UnixListener, access Access) error {
	path := lis.Addr().String()
	if !filepath.IsAbs(path) {
		return fmt.Errorf("serve on %q: not the absolute path of a socket", path)
	}
	dir := filepath.Dir(path)
	if err := checkAbove(dir); err != nil {
		return fmt.Errorf("serve on %s: %w", path, err)
	}
	if err := checkDir(dir, modes[access].forbidden); err != nil {
		return fmt.Errorf("serve on %s: %w", path, err)
	}
	// Closing it must not take it away from who opened it.
	lis.SetUnlinkOnClose(false)
	return nil
}

// makeDir makes the directory if it is missing. One of ours that was private
// until now is opened to passage for a shared socket.
func makeDir(dir string, access Access) error {
	if err := durable.MakeDir(dir, modes[access].dir); err != nil {
		return err
	}
	fi, err := os.Lstat(dir)
	if err != nil || access != Shared || fi.Mode() != fs.ModeDir|modes[Private].dir {
		return err
	}
	if uid, ok := owner(fi); !ok || int(uid) != os.Geteuid() {
		return nil // checkDir judges it
	}
	return os.Chmod(dir, modes[Shared].dir)
}

// owner is the user to whom a file belongs.
func owner(fi fs.FileInfo) (uid uint32, ok bool) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return st.Uid, true
}

// checkDir refuses directories in which somebody else could replace the
// socket (SECURITY.md T49).
func checkDir(dir string, forbidden fs.FileMode) error {
	fi, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	has, ok := owner(fi)
	if !ok {
		return fmt.Errorf("cannot tell who owns %s", dir)
	}
	if uid := os.Geteuid(); int(has) != uid && has != 0 {
		return fmt.Errorf("directory %s belongs to uid %d, not to uid %d or root", dir, has, uid)
	}
	if fi.Mode().Perm()&forbidden != 0 {
		return fmt.Errorf("directory %s has mode %04o, which lets other users in: chmod it to %04o", dir, fi.Mode().Perm(), 0o777&^forbidden)
	}
	return nil
}

// checkAbove refuses a directory that another user could rename, and put his own
// in its place: each one above it must be root's or ours, and nobody else may
// write there, unless what is in it stays its owner's (/tmp).
func checkAbove(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	for dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		fi, err := os.Lstat(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue // made by us, below one that is there
		}
		if err != nil {
			return err
		}
		if fi.Mode().Type() == fs.ModeSymlink { // put there by who may write above it
			target, err := filepath.EvalSymlinks(dir)
			if err != nil {
				return err
			}
			if err := checkAbove(filepath.Join(target, "x")); err != nil {
				return err
			}
			continue
		}
		if err := othersWrite(dir, fi); err != nil {
			return err
		}
	}
	return nil
}

// othersWrite says that users other than root and ours can replace what is in a
// directory.
func othersWrite(dir string, fi fs.FileInfo) error {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("cannot tell who owns %s", dir)
	}
	if int(st.Uid) != os.Geteuid() && st.Uid != 0 {
		return fmt.Errorf("directory %s above it belongs to uid %d, not to uid %d or root: choose another folder", dir, st.Uid, os.Geteuid())
	}
	writable := fi.Mode().Perm() & 0o022
	if st.Gid == 0 || int(st.Gid) == os.Getegid() {
		writable &= 0o002
	}
	if writable != 0 && fi.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("directory %s above it has mode %04o, which lets other users replace what is in it: chmod o-w,g-w %[1]s", dir, fi.Mode().Perm())
	}
	return nil
}

// Passable says why users other than root and ours cannot come to the socket at
// path: a directory above it that they may not pass.
func Passable(path string) error {
	dir, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	for dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		fi, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if fi.Mode().Perm()&0o001 == 0 {
			return fmt.Errorf("directory %s has mode %04o, so other users do not come to %s: chmod o+x %[1]s", dir, fi.Mode().Perm(), path)
		}
	}
	return nil
}

// removeStale removes a socket on which nobody listens, and nothing else.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("a %s is in the way; remove it", fi.Mode().Type())
	}
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
		return errors.New("another process listens there already")
	}
	return os.Remove(path)
}

// DirOwner returns the uid that owns the directory of the socket at path,
// where nobody else can write in it: only that user (or root) can have put
// the socket there.
func DirOwner(path string) (uid uint32, ok bool) {
	fi, err := os.Stat(filepath.Dir(path))
	if err != nil || fi.Mode().Perm()&0o022 != 0 {
		return 0, false
	}
	return owner(fi)
}
