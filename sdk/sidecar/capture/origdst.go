// Where a captured connection was meant to go: the kernel keeps it.

package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST, which are one number at two
// levels (linux/netfilter_ipv4.h, linux/netfilter_ipv6/ip6_tables.h).
const soOriginalDst = 80

// ErrNotCaptured says that a connection was made to where it arrived.
var ErrNotCaptured = errors.New("the connection was not captured")

// OriginalDst is where the peer of conn, which was redirected here, wanted to go. It is
// ErrNotCaptured if that is here: whoever serves it would call himself.
func OriginalDst(conn *net.TCPConn) (netip.AddrPort, error) {
	local, ok := conn.LocalAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("ask for the original destination: %T is no address of TCP", conn.LocalAddr())
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("ask for the original destination: %w", err)
	}
	here := local.AddrPort()
	v4 := here.Addr().Unmap().Is4()
	var meant netip.AddrPort
	var asked error
	if err := raw.Control(func(fd uintptr) { meant, asked = originalDst(int(fd), v4) }); err != nil {
		asked = err
	}
	switch {
	case errors.Is(asked, unix.ENOENT), errors.Is(asked, unix.ENOPROTOOPT):
		return netip.AddrPort{}, ErrNotCaptured // nobody follows connections here, so nobody redirects any
	case asked != nil:
		return netip.AddrPort{}, fmt.Errorf("ask for the original destination: %w", asked)
	case meant == netip.AddrPortFrom(here.Addr().Unmap().WithZone(""), here.Port()):
		return netip.AddrPort{}, ErrNotCaptured
	}
	return meant, nil
}

func originalDst(fd int, v4 bool) (netip.AddrPort, error) {
	if v4 {
		// A sockaddr_in, in the first 16 bytes of what is long enough for one.
		got, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, soOriginalDst)
		if err != nil {
			return netip.AddrPort{}, err
		}
		b := got.Multiaddr
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4])), nil
	}
	// A sockaddr_in6, at the beginning of this.
	got, err := unix.GetsockoptIPv6MTUInfo(fd, unix.SOL_IPV6, soOriginalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var port [2]byte
	binary.NativeEndian.PutUint16(port[:], got.Addr.Port)
	return netip.AddrPortFrom(netip.AddrFrom16(got.Addr.Addr), binary.BigEndian.Uint16(port[:])), nil
}
