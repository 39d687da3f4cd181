// Callers that go away, or are cut off, while their requests are under way. A session
// reads nothing then, so the kernel is asked to tell: once for each connection, and
// nothing for a request. Of a socket that is closed on this side the kernel tells
// nothing; who closes it does.

package http1

import (
	"net"
	"os"
	"sync"
	"syscall"

	"merlon.dev/sdk/sidecar/internal/sock"
)

// watch learns of the ends of connections. It is safe for concurrent use; nil learns of
// none.
type watch struct {
	file *os.File // an epoll instance, which the runtime polls as it does sockets
	raw  syscall.RawConn
	done chan struct{}

	mu   sync.Mutex // guards the rest
	all  map[uint64]*session
	last uint64
}

// newWatch gives nil where the kernel has no room for it: callers that go away are
// noticed later then, when they are written to.
func newWatch() *watch {
	fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil
	}
	_ = syscall.SetNonblock(fd, true) // has os.NewFile poll it
	w := &watch{file: os.NewFile(uintptr(fd), "callers"), done: make(chan struct{}), all: make(map[uint64]*session)}
	if w.raw, err = w.file.SyscallConn(); err != nil {
		_ = w.file.Close() // nobody has used it
		return nil
	}
	go w.run()
	return w
}

// ended is what is waited for: the end of what the other side sends, or of everything.
// Each is told once.
const ended = syscall.EPOLLRDHUP | 1<<31 // EPOLLET

// add has s told when conn ends. The number is for remove.
func (w *watch) add(conn net.Conn, s *session) (number uint64) {
	raw := rawOf(conn)
	if w == nil || raw == nil {
		return 0
	}
	w.mu.Lock()
	w.last++
	number = w.last
	w.all[number] = s
	w.mu.Unlock()
	event := syscall.EpollEvent{Events: ended, Fd: int32(uint32(number)), Pad: int32(uint32(number >> 32))}
	_ = w.raw.Control(func(epoll uintptr) {
		_ = raw.Control(func(fd uintptr) { _ = syscall.EpollCtl(int(epoll), syscall.EPOLL_CTL_ADD, int(fd), &event) })
	}) // where it cannot be, its end is noticed later
	return number
}

// remove is before the connection is closed, which takes it out of what the kernel looks
// at.
func (w *watch) remove(number uint64) {
	if number == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.all, number)
}

// run tells sessions until the watch is closed.
func (w *watch) run() {
	defer close(w.done)
	var events [64]syscall.EpollEvent
	_ = w.raw.Read(func(epoll uintptr) bool {
		for {
			n, err := syscall.EpollWait(int(epoll), events[:], 0)
			if err == syscall.EINTR {
				continue
			}
			for _, e := range events[:max(n, 0)] {
				w.tell(uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32)
			}
			if n < len(events) {
				return false // until there are more
			}
		}
	})
}

func (w *watch) tell(number uint64) {
	w.mu.Lock()
	s := w.all[number] // nil: it was removed meanwhile
	w.mu.Unlock()
	if s != nil {
		s.callerLeft()
	}
}

func (w *watch) close() {
	if w != nil {
		_ = w.file.Close() // which ends run
		<-w.done
	}
}

// callerLeft ends the request under way, which nobody waits for any more.
func (s *session) callerLeft() {
	s.left.Store(true)
	if c := s.current.Load(); c != nil {
		c.abandon()
	}
}

// onClose has f called when conn, or what is below it, is closed on this side.
func onClose(conn net.Conn, f func()) {
	for {
		if accepted, ok := conn.(*sock.Conn); ok {
			accepted.OnClose(f)
			return
		}
		wrapped, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			return // not the door's: it is noticed when it is written to
		}
		conn = wrapped.NetConn()
	}
}

// closed is for the end on this side: an X509-SVID has ended or was revoked, or the
// process ends and does not wait any longer.
func (s *session) closed() {
	s.cut.Store(true)
	s.callerLeft()
}

// whyAbandoned is why nobody waits for the answer any more.
func (s *session) whyAbandoned() error {
	if s.cut.Load() {
		return errCut
	}
	return errAbandoned
}

// abandon ends c because its caller has gone away. A WebSocket ends by halves instead.
func (c *call) abandon() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over || c.tunnelled {
		return
	}
	c.abandoned = true
	if c.far != nil {
		hangUp(c.far.Conn) // who reads from it goes on with the end; nobody waits for a word to it
	}
}

// isAbandoned says whether the caller has gone away.
func (c *call) isAbandoned() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.abandoned
}
