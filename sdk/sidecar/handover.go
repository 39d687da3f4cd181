// A sidecar that takes another one's place. The sockets themselves go from one process
// to the other, with the connections that wait in them, so that none is refused; what
// the old one has begun it finishes. Both find each other by the admin socket, whose
// directory nobody else can enter.

package sidecar

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// handoverSuffix makes of admin_socket the socket on which a successor asks.
	handoverSuffix = ".next"
	// handoverTimeout bounds each step; a successor may take it to get its identity.
	handoverTimeout = 30 * time.Second
	// Sockets of one message: the kernel takes 253.
	maxHandedOver     = 200
	maxHandoverBytes  = 64 << 10
	handoverIsServing = "s"
)

// errTooManySockets is for configurations beyond what one message carries.
var errTooManySockets = fmt.Errorf("more than %d sockets cannot be handed over", maxHandedOver)

// predecessor is the sidecar whose place this one takes. A nil predecessor is none.
type predecessor struct {
	conn    *net.UnixConn
	sockets map[string]net.Listener // by name, until they are taken
}

// askPredecessor asks the sidecar that has the admin socket, if there is one, for its
// sockets.
func askPredecessor(ctx context.Context, admin string) (*predecessor, error) {
	if admin == off {
		return nil, nil
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", admin+handoverSuffix)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ask the sidecar before for its sockets: %w", err)
	}
	p := &predecessor{conn: conn.(*net.UnixConn), sockets: make(map[string]net.Listener)}
	if err := p.receive(); err != nil {
		p.close()
		return nil, fmt.Errorf("take the sockets of the sidecar before over: %w", err)
	}
	return p, nil
}

func (p *predecessor) receive() error {
	if err := p.conn.SetDeadline(time.Now().Add(handoverTimeout)); err != nil {
		return err
	}
	text, rights := make([]byte, maxHandoverBytes), make([]byte, syscall.CmsgSpace(4*maxHandedOver))
	n, m, _, _, err := p.conn.ReadMsgUnix(text, rights)
	if err != nil {
		return err
	}
	messages, err := syscall.ParseSocketControlMessage(rights[:m])
	if err != nil || len(messages) != 1 {
		return errors.Join(errors.New("no sockets came"), err)
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	var names []string
	if err := json.Unmarshal(text[:n], &names); err != nil || len(names) != len(fds) || repeats(names) {
		closeFDs(fds)
		return errors.New("what came is not understood: is it a sidecar of another version?")
	}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), names[i])
		lis, err := net.FileListener(f)
		_ = f.Close() // the listener has its own
		if err != nil {
			closeFDs(fds[i+1:])
			return fmt.Errorf("%s: %w", names[i], err)
		}
		p.sockets[names[i]] = lis
	}
	return nil
}

// repeats says whether two of names are alike: who connects to the one that is forgotten
// would wait for nobody.
func repeats(names []string) bool {
	sorted := slices.Sorted(slices.Values(names))
	return len(slices.Compact(sorted)) != len(names)
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		_ = syscall.Close(fd) // nothing was done with it
	}
}

// take gives the socket of a name, if address is where it listens; nil for none.
func (p *predecessor) take(name, address string) net.Listener {
	if p == nil {
		return nil
	}
	lis := p.sockets[name]
	if lis == nil || !listensOn(lis, address) {
		return nil // closed with what else is not taken
	}
	delete(p.sockets, name)
	return lis
}

// listensOn says whether lis is what listenOn opens at address.
func listensOn(lis net.Listener, address string) bool {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		return lis.Addr().Network() == "unix" && lis.Addr().String() == path
	}
	have, ok := lis.Addr().(*net.TCPAddr)
	want, err := net.ResolveTCPAddr("tcp", address)
	if !ok || err != nil {
		return false
	}
	everywhere := func(a *net.TCPAddr) bool { return a.IP == nil || a.IP.IsUnspecified() } // 0.0.0.0 too is [::] to Listen
	return (want.Port == 0 || have.Port == want.Port) &&
		(have.IP.Equal(want.IP) || everywhere(have) && everywhere(want))
}

// serving tells the predecessor that it can end. What was not taken ends now: who
// connects there is to be refused, and not to wait for nobody.
func (p *predecessor) serving() {
	if p == nil {
		return
	}
	_, _ = io.WriteString(p.conn, handoverIsServing) // where it has ended, all is well too
	for _, lis := range p.sockets {
		if u, ok := lis.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(true)
		}
	}
	p.close()
}

// close closes what was not taken.
func (p *predecessor) close() {
	if p == nil {
		return
	}
	for _, lis := range p.sockets {
		_ = lis.Close() // nobody serves it
	}
	_ = p.conn.Close() // all is said
}

// serveSuccessor hands the sockets over to who asks for them, and ends s once that one
// serves.
func (s *Sidecar) serveSuccessor(lis net.Listener) {
	stop := context.AfterFunc(s.ctx, func() { _ = lis.Close() }) // Accept ends, which is all that is wanted
	defer stop()
	for {
		conn, err := lis.Accept()
		if err != nil {
			return
		}
		if err := s.handOver(conn.(*net.UnixConn)); err != nil {
			s.log.LogAttrs(s.ctx, slog.LevelError, "sockets not handed over; this sidecar goes on", slog.Any("err", err))
			continue
		}
		s.log.LogAttrs(s.ctx, slog.LevelInfo, "another sidecar serves in the place of this one")
		s.stop()
		return
	}
}

func (s *Sidecar) handOver(conn *net.UnixConn) error {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(handoverTimeout)); err != nil {
		return err
	}
	names, files, err := s.files()
	defer func() {
		for _, f := range files {
			_ = f.Close() // the successor has its own
		}
	}()
	if err != nil {
		return err
	}
	text, err := json.Marshal(names)
	if err != nil {
		return err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		// Not Fd, which would have the socket block, here too.
		raw, err := f.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { fds[i] = int(fd) })
		}
		if err != nil {
			return err
		}
	}
	if _, _, err := conn.WriteMsgUnix(text, syscall.UnixRights(fds...), nil); err != nil {
		return err
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return fmt.Errorf("the successor does not serve: %w", err)
	}
	s.ownPaths(false)
	return nil
}

// files are duplicates of the sockets, with their names.
func (s *Sidecar) files() (names []string, files []*os.File, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.next) > maxHandedOver {
		return nil, nil, errTooManySockets
	}
	for name, lis := range s.next {
		filer, ok := lis.(interface{ File() (*os.File, error) })
		if !ok {
			return names, files, fmt.Errorf("a listener of type %T has no file", lis)
		}
		f, err := filer.File()
		if err != nil {
			return names, files, err
		}
		names, files = append(names, name), append(files, f)
	}
	return names, files, nil
}

// ownPaths says whether the paths of Unix sockets end with this sidecar: not while they
// are a predecessor's, and not once they are a successor's.
func (s *Sidecar) ownPaths(own bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, lis := range s.next {
		if u, ok := lis.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(own)
		}
	}
}
