// Plaintext beside TLS on one port, until a date. The first byte tells which of the
// two a client speaks, and what begins as TLS is never served as anything else.

package sdk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"syscall"
	"time"

	"merlon.dev/sdk/svid"
)

// errPlaintextOver refuses a plaintext connection.
var errPlaintextOver = errors.New("the date until which plaintext is accepted has passed")

// Plaintext gives the connection of a client that speaks plaintext, where the
// Identity was opened with [WithPlaintextUntil] and that date lies ahead. nil
// without an error means that the client is to do a TLS handshake: see
// [Identity.ServerHandshake]. On error, which a plaintext client gets after the
// date, raw is closed.
//
// It waits for the first byte, for at most the 5 s of a handshake, and leaves it to
// be read. The connection ends at the date at the latest. Nobody has an identity on
// it: its calls are put to [Identity.Decide] without a TLS state. It is for
// protocols that handshake themselves, as gRPC does; others use
// [Identity.ServerListener] or [Identity.Listener].
func (id *Identity) Plaintext(ctx context.Context, raw net.Conn) (net.Conn, error) {
	if id.audit.plaintext.IsZero() {
		return nil, nil
	}
	first, err := firstByte(ctx, raw)
	if err == nil && isTLS(first) {
		return nil, nil
	}
	now := time.Now()
	if err == nil && !id.audit.letsPlaintext(now) {
		id.audit.sawPlaintext(addrString(raw.RemoteAddr()), false, now)
		err = errPlaintextOver
	}
	if err != nil {
		_ = raw.Close() // the refusal is what counts
		id.refusals.log(ctx, id.log, "connection refused before TLS", slog.String("remote", addrString(raw.RemoteAddr())), slog.Any("err", err))
		return nil, err
	}
	life, cancel := context.WithDeadline(id.life, id.audit.plaintext)
	context.AfterFunc(life, func() { hangUp(raw) })
	return &plaintextConn{raw, cancel}, nil
}

// isTLS says whether a byte is the content type of a TLS record (RFC 8446 section
// 5.1, RFC 6520). No plaintext protocol that we know begins with these.
func isTLS(first byte) bool { return first >= 20 && first <= 24 }

// firstByte waits for the first byte that the client sends and leaves it where it is.
func firstByte(ctx context.Context, conn net.Conn) (byte, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("a connection of type %T does not show its first byte: serve on one of the net package", conn)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	if err := conn.SetReadDeadline(time.Now().Add(svid.HandshakeTimeout)); err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) }) // it may be closed
	var first [1]byte
	var n int
	var peekErr error
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, _, peekErr = syscall.Recvfrom(int(fd), first[:], syscall.MSG_PEEK)
			if !errors.Is(peekErr, syscall.EINTR) {
				break
			}
		}
		return !errors.Is(peekErr, syscall.EAGAIN)
	})
	if !stop() && err == nil {
		err = ctx.Err()
	}
	switch {
	case err != nil:
		return 0, err
	case peekErr != nil:
		return 0, peekErr
	case n == 0:
		return 0, io.EOF
	}
	return first[0], conn.SetReadDeadline(time.Time{})
}

// plaintextConn ends at the date, and with the Identity.
type plaintextConn struct {
	net.Conn
	cancel context.CancelFunc
}

// Close implements net.Conn.
func (c *plaintextConn) Close() error {
	defer c.cancel() // which would end it with a reset
	return c.Conn.Close()
}
