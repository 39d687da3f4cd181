// The process at the other end of a Unix socket, by SO_PEERCRED and, from
// Linux 6.5, SO_PEERPIDFD, which names the process itself and not only a
// number that can be reused.

package unixsock

import (
	"errors"
	"fmt"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// Peer is the process that connected to a Unix socket (or, seen from a client,
// that listens on it), as the kernel recorded it at connect time. Its methods
// are safe for concurrent use.
type Peer struct {
	UID, GID uint32
	PID      int32

	pinned bool
	hangup func() error // ends the connection; nil outside of gRPC
	mu     sync.Mutex
	pidfd  int // if pinned and not closed
	closed bool

	once  sync.Once
	first any
}

// PeerOf asks the kernel who is at the other end of conn, a Unix socket.
// Close the result.
func PeerOf(conn net.Conn) (*Peer, error) { return peerOf(conn, unix.SO_PEERPIDFD) }

// Exact says whether this kernel names processes at sockets (Linux 6.5). Before,
// a process that ends between connecting and being accepted, and whose number
// another gets meanwhile, is taken for the other.
func Exact() bool {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	pidfd, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return false
	}
	unix.Close(pidfd)
	return true
}

// peerOf is PeerOf with the number of the socket option that gives a pidfd.
func peerOf(conn net.Conn, option int) (*Peer, error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("ask for the peer of a %T: not a Unix socket", conn)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return nil, err
	}
	peer := &Peer{pidfd: -1}
	var inner error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); inner != nil {
			return
		}
		peer.UID, peer.GID, peer.PID = cred.Uid, cred.Gid, cred.Pid
		inner = peer.pin(int(fd), option)
	})
	if err == nil {
		err = inner
	}
	if err != nil {
		return nil, fmt.Errorf("read the peer's credentials: %w", err)
	}
	return peer, nil
}

// pin holds the process by a pidfd: that of the process which connected, where
// the kernel gives it, or else of the one that has its number now.
func (p *Peer) pin(fd, option int) (err error) {
	p.pidfd, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, option)
	if errors.Is(err, unix.ENOPROTOOPT) && p.PID > 0 {
		p.pidfd, err = unix.PidfdOpen(int(p.PID), 0)
	}
	switch {
	case err == nil:
		p.pinned = true
		unix.CloseOnExec(p.pidfd)
		return nil
	case errors.Is(err, unix.ENOPROTOOPT), errors.Is(err, unix.ENOSYS): // Linux before 5.3
		return nil
	default: // it is gone already
		return fmt.Errorf("pin the peer's process: %w", err)
	}
}

// Pinned says whether the peer is held by a pidfd, so that its PID cannot
// come to mean another process unnoticed.
func (p *Peer) Pinned() bool { return p.pinned }

// First returns what look returned the first time that First was called, so that
// a connection remembers what its process was.
func (p *Peer) First(look func() any) any {
	p.once.Do(func() { p.first = look() })
	return p.first
}

// Alive says whether the process still runs and the Peer is open. Without a
// pidfd it only says that some process has that PID.
func (p *Peer) Alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	if !p.pinned {
		err := unix.Kill(int(p.PID), 0)
		return err == nil || errors.Is(err, unix.EPERM)
	}
	// A pidfd becomes readable when its process ends.
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n == 0
	}
}

// Hangup ends the gRPC connection that the process made, and all calls on it.
func (p *Peer) Hangup() {
	if p.hangup != nil {
		_ = p.hangup()
	}
}

// Close releases the pidfd. Closing twice is harmless.
func (p *Peer) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed && p.pinned {
		unix.Close(p.pidfd)
	}
	p.closed, p.pidfd = true, -1
}
