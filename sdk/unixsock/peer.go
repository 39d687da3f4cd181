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
	pidfd  int // -1: the kernel has no SO_PEERPIDFD, or closed
	closed bool
}

// PeerOf asks the kernel who is at the other end of conn, a Unix socket.
// Close the result.
func PeerOf(conn net.Conn) (*Peer, error) {
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
		pidfd, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		switch {
		case err == nil:
			peer.pidfd, peer.pinned = pidfd, true
			unix.CloseOnExec(pidfd)
		case !errors.Is(err, unix.ENOPROTOOPT):
			// The kernel knows the option, and the process is gone already.
			inner = fmt.Errorf("pin the peer's process: %w", err)
		}
	})
	if err == nil {
		err = inner
	}
	if err != nil {
		return nil, fmt.Errorf("read the peer's credentials: %w", err)
	}
	return peer, nil
}

// Pinned says whether the peer is held by a pidfd, so that its PID cannot
// come to mean another process unnoticed.
func (p *Peer) Pinned() bool { return p.pinned }

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
