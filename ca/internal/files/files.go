// Package files keeps file descriptors back for what the CA itself opens. Badger ends
// the process when it cannot open its next table, so whoever connects must not get the
// last one: connections beyond are closed as they come.
package files

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"
)

const (
	// Kept is how many are kept from connections to ports, of which the admin socket may
	// have half.
	Kept = 64
	// pause bounds what refusing costs, and logEvery how often it is said.
	pause    = 10 * time.Millisecond
	logEvery = time.Minute
)

// Keep gives lis without the connections that would leave fewer than keep descriptors
// of those that the process may have at the time.
func Keep(lis net.Listener, keep int, log *slog.Logger) net.Listener {
	return &keeping{Listener: lis, keep: uint64(keep), log: log}
}

type keeping struct {
	net.Listener
	keep uint64
	log  *slog.Logger

	mu     sync.Mutex
	logged time.Time // guarded by mu
}

// Accept implements net.Listener.
func (k *keeping) Accept() (net.Conn, error) {
	for {
		conn, err := k.Listener.Accept()
		if err != nil {
			return nil, err
		}
		limit, scarce := k.scarce(conn)
		if !scarce {
			return conn, nil
		}
		_ = conn.Close() // nothing was said on it
		k.say(conn, limit)
		time.Sleep(pause)
	}
}

// scarce says whether too few descriptors are left beside that of conn: the kernel gives
// the lowest number that is free, so all below it are in use.
func (k *keeping) scarce(conn net.Conn) (limit uint64, scarce bool) {
	var now syscall.Rlimit
	socket, ok := conn.(syscall.Conn)
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &now); err != nil || !ok {
		return 0, false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return 0, false
	}
	var number uint64
	if err := raw.Control(func(fd uintptr) { number = uint64(fd) }); err != nil {
		return 0, false
	}
	return now.Cur, number+k.keep >= now.Cur
}

func (k *keeping) say(conn net.Conn, limit uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	if now.Sub(k.logged) < logEvery {
		return
	}
	k.logged = now
	k.log.LogAttrs(context.Background(), slog.LevelWarn, "connections are closed: the file descriptors that are left are for the store",
		slog.String("address", k.Addr().String()), slog.String("from", conn.RemoteAddr().String()), slog.Uint64("limit", limit),
		slog.String("hint", "see who connects so often, or allow the CA more: LimitNOFILE= of its unit, ulimit -n"))
}
