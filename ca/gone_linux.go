package ca

import (
	"net"

	"golang.org/x/sys/unix"
)

// endWhenGone limits how long what was sent may stay without an acknowledgement. Where
// the kernel has no such limit (MPTCP) gRPC's pings notice, later.
func endWhenGone(conn *net.TCPConn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return // it is closed
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(goneAfter.Milliseconds()))
	})
}
