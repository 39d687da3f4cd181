// The kernel is told when a peer counts as gone.

package ca

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestAcceptedConnectionsEndWhenTheirPeersAreGone(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	dialed, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialed.Close()
	conn, err := noticing{lis}.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var limit int
	var errOption error
	if err := raw.Control(func(fd uintptr) {
		limit, errOption = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
	}); err != nil {
		t.Fatal(err)
	}
	if got := time.Duration(limit) * time.Millisecond; errOption != nil || got != goneAfter {
		t.Errorf("the kernel waits %v for acknowledgements, %v; want %v", got, errOption, goneAfter)
	}
}
