// Two machines for a test: its own and another, each a network namespace that the test
// makes and that ends with it. Both have IPv4 and IPv6. Needs root and iproute2.

package capture

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const inNamespace = "MERLON_TEST_CAPTURE"

// inside runs the test that calls it once more in a process with a network of its own,
// and says true there; false means that the test is over.
func inside(t *testing.T, tools ...string) bool {
	t.Helper()
	if os.Getenv(inNamespace) == t.Name() {
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	for _, needed := range append([]string{"ip:iproute2"}, tools...) {
		name, pkg, _ := strings.Cut(needed, ":")
		if _, err := findTool(name, pkg); err != nil {
			t.Skipf("capture is not tested without it: %v", err)
		}
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.count=1", "-test.v")
	cmd.Env = append(os.Environ(), inNamespace+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("in a network of its own: %v\n%s", err, out)
	}
	return false
}

// machine is a network namespace.
type machine struct {
	t      *testing.T
	v4, v6 string
	// ns is its namespace, home that of the test.
	ns, home int
}

// machines makes the test's own, where everything is captured, and another.
func machines(t *testing.T) (here, there *machine) {
	t.Helper()
	hold := exec.Command("cat") // until its input ends
	hold.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	stdin, err := hold.StdinPipe()
	if err == nil {
		err = hold.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); hold.Wait() })
	home := namespace(t, "/proc/self/ns/net")
	here = &machine{t: t, v4: "10.99.0.1", v6: "fd99::1", ns: home, home: home}
	there = &machine{t: t, v4: "10.99.0.2", v6: "fd99::2", home: home, ns: namespace(t, fmt.Sprintf("/proc/%d/ns/net", hold.Process.Pid))}
	ip(t, "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
	ip(t, "link", "set", "veth1", "netns", fmt.Sprint(hold.Process.Pid))
	here.up("veth0")
	there.as(0, func() error { there.up("veth1"); return nil })
	return here, there
}

func (m *machine) up(dev string) {
	m.t.Helper()
	ip(m.t, "link", "set", "lo", "up")
	ip(m.t, "addr", "add", m.v4+"/24", "dev", dev)
	ip(m.t, "addr", "add", m.v6+"/64", "dev", dev, "nodad")
	ip(m.t, "link", "set", dev, "up")
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

func namespace(t *testing.T, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// as does something on the machine as a user: sockets that it opens are there.
func (m *machine) as(uid int, do func() error) error {
	m.t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setns(m.ns, unix.CLONE_NEWNET); err != nil {
		m.t.Fatal(err)
	}
	// The thread must not end: what it has started would.
	defer func() {
		if err := errors.Join(unix.Setfsuid(0), unix.Setns(m.home, unix.CLONE_NEWNET)); err != nil {
			panic(fmt.Sprintf("a thread stays on another machine: %v", err))
		}
	}()
	if err := unix.Setfsuid(uid); err != nil {
		m.t.Fatal(err)
	}
	return do()
}

// serve answers each connection to the machine's port, by IPv4 and IPv6, with what says
// says of it, and then what it is sent. Stop ends it.
func (m *machine) serve(host string, port int, says func(*net.TCPConn) string) (stop func()) {
	m.t.Helper()
	var lis net.Listener
	err := m.as(0, func() (err error) {
		lis, err = net.Listen("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	var going sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	going.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			going.Go(func() {
				fmt.Fprintln(conn, says(conn.(*net.TCPConn)))
				io.Copy(conn, conn)
				conn.Close()
			})
		}
	})
	stop = sync.OnceFunc(func() {
		lis.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		going.Wait()
	})
	m.t.Cleanup(stop)
	return stop
}

func always(text string) func(*net.TCPConn) string {
	return func(*net.TCPConn) string { return text }
}

// refused and silent are what dial says of connections that nobody takes.
const refused, silent = "refused", "silent"

// dial connects from the machine as a user, and returns the first line that it reads.
func (m *machine) dial(uid int, host string, port int) (line string) {
	m.t.Helper()
	conn := m.open(uid, host, port)
	if conn == nil {
		return refused
	}
	defer conn.Close()
	return readLine(conn, 5*time.Second)
}

// open is nil where the connection is refused.
func (m *machine) open(uid int, host string, port int) (conn net.Conn) {
	m.t.Helper()
	err := m.as(uid, func() (err error) {
		conn, err = net.DialTimeout("tcp", net.JoinHostPort(host, fmt.Sprint(port)), 5*time.Second)
		return err
	})
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil
	}
	if err != nil {
		m.t.Fatalf("connect to %s port %d as user %d: %v", host, port, uid, err)
	}
	return conn
}

func readLine(conn net.Conn, wait time.Duration) string {
	conn.SetReadDeadline(time.Now().Add(wait))
	line, err := bufio.NewReader(conn).ReadString('\n')
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return silent
	}
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(line)
}
