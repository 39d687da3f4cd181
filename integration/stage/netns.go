// Network namespaces: machines of a test that can be cut off from each other.
// The test runs again in a process with a network of its own, with a bridge in
// it; each machine is a namespace at that bridge. None has a name: they go with
// the processes in them, however the test ends. Needs root and iproute2.

package stage

import (
	"errors"
	"fmt"
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

const inNamespace = "MERLON_TEST_NETNS"

// InNamespace runs the test that calls it once more, in a process that has a
// network of its own. It says true there; false means that the test is over:
//
//	if !stage.InNamespace(t) {
//		return
//	}
func InNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inNamespace) == t.Name() {
		ip(t, nil, "link", "set", "lo", "up")
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	for _, tool := range []string{"ip", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("network namespaces need %s: %v", tool, err)
		}
	}
	if _, err := buildEtcd(); err != nil { // there it could fetch no modules
		t.Fatal(err)
	}
	again(t, "in a network of its own", inNamespace, syscall.CLONE_NEWNET)
	return false
}

// again runs the test that calls it once more, in a process with namespaces of
// its own, where the variable marker has the test's name.
func again(t *testing.T, where, marker string, namespaces uintptr) {
	t.Helper()
	name := "^" + strings.ReplaceAll(t.Name(), "/", "$/^") + "$"
	args := []string{"-test.run", name, "-test.count=1"}
	if testing.Verbose() {
		args = append(args, "-test.v")
	}
	if deadline, ok := t.Deadline(); ok {
		args = append(args, "-test.timeout", time.Until(deadline).String())
	}
	cmd := exec.Command("/proc/self/exe", args...)
	dir, err := binDir()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(os.Environ(), marker+"="+t.Name(), binDirEnv+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", where, err, out)
	} else {
		t.Logf("%s:\n%s", where, out)
	}
}

// Network is a bridge with machines at it; the test itself is one, too. Its
// methods are for one goroutine.
type Network struct {
	tb       testing.TB
	machines []*Namespace
}

// Namespace is one machine.
type Namespace struct {
	Name string
	// IP is its address, which all others reach.
	IP string
	// pid is of a process that holds the namespace; 0: the test's own.
	pid int
	dev string
}

const bridge = "merlon0"

// nowhere is a link address that nobody has. What is sent to it is lost
// without a word, as on a network that is cut.
const nowhere = "02:00:00:00:00:01"

// NewNetwork makes the bridge, in a test for which InNamespace said true.
func NewNetwork(tb testing.TB) *Network {
	tb.Helper()
	if os.Getenv(inNamespace) == "" {
		tb.Fatal("NewNetwork outside of InNamespace")
	}
	n := &Network{tb: tb}
	self := &Namespace{Name: "test", IP: "10.77.0.254", dev: bridge}
	n.machines = append(n.machines, self)
	ip(tb, self, "link", "add", bridge, "type", "bridge")
	ip(tb, self, "addr", "add", self.IP+"/24", "dev", bridge)
	ip(tb, self, "link", "set", bridge, "up")
	return n
}

// Self is the test as a machine.
func (n *Network) Self() *Namespace { return n.machines[0] }

// Machine makes another machine. It ends with the test.
func (n *Network) Machine(name string) *Namespace {
	n.tb.Helper()
	i := len(n.machines)
	space := &Namespace{Name: name, IP: fmt.Sprintf("10.77.0.%d", i), dev: "eth0"}
	hold := exec.Command("cat") // until its input ends
	hold.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	stdin, err := hold.StdinPipe()
	if err == nil {
		err = hold.Start()
	}
	if err != nil {
		n.tb.Fatal(err)
	}
	n.tb.Cleanup(sync.OnceFunc(func() {
		stdin.Close()
		hold.Wait()
	}))
	space.pid = hold.Process.Pid
	port, peer := fmt.Sprintf("port%d", i), fmt.Sprintf("peer%d", i)
	ip(n.tb, n.Self(), "link", "add", port, "type", "veth", "peer", "name", peer)
	ip(n.tb, n.Self(), "link", "set", port, "master", bridge, "up")
	ip(n.tb, n.Self(), "link", "set", peer, "netns", fmt.Sprint(space.pid), "name", space.dev)
	ip(n.tb, space, "link", "set", "lo", "up")
	ip(n.tb, space, "addr", "add", space.IP+"/24", "dev", space.dev)
	ip(n.tb, space, "link", "set", space.dev, "up")
	n.machines = append(n.machines, space)
	return space
}

// Partition cuts a machine off from all others.
func (n *Network) Partition(space *Namespace) {
	n.tb.Helper()
	for _, other := range n.machines {
		if other != space {
			n.Cut(space, other)
		}
	}
}

// Heal undoes every cut of a machine.
func (n *Network) Heal(space *Namespace) {
	n.tb.Helper()
	for _, other := range n.machines {
		if other != space {
			n.Join(space, other)
		}
	}
}

// Cut makes what two machines send to each other vanish; connections stay as
// they are.
func (n *Network) Cut(a, b *Namespace) {
	n.tb.Helper()
	ip(n.tb, a, "neigh", "replace", b.IP, "lladdr", nowhere, "dev", a.dev, "nud", "permanent")
	ip(n.tb, b, "neigh", "replace", a.IP, "lladdr", nowhere, "dev", b.dev, "nud", "permanent")
}

// Join undoes Cut.
func (n *Network) Join(a, b *Namespace) {
	n.tb.Helper()
	for _, pair := range [][2]*Namespace{{a, b}, {b, a}} {
		// Fails where there was no cut.
		_ = pair[0].command("ip", "neigh", "del", pair[1].IP, "dev", pair[0].dev).Run()
	}
}

// Drop lets the share of packets that from sends to to be lost, in that direction
// only (1: all of them), until the returned function is called. It needs iptables.
func (n *Network) Drop(from, to *Namespace, share float64) (undo func()) {
	n.tb.Helper()
	rule := []string{"OUTPUT", "-d", to.IP}
	if share < 1 {
		rule = append(rule, "-m", "statistic", "--mode", "random", "--probability", fmt.Sprintf("%.3f", share))
	}
	rule = append(rule, "-j", "DROP")
	from.Run(n.tb, "iptables", append([]string{"-w", "-A"}, rule...)...)
	return sync.OnceFunc(func() { from.Run(n.tb, "iptables", append([]string{"-w", "-D"}, rule...)...) })
}

// StartEtcd starts a cluster with each member on a machine of its own.
func (n *Network) StartEtcd(members int, flags ...string) *Etcd {
	n.tb.Helper()
	e := newEtcd(n.tb, flags)
	for i := range members {
		space := n.Machine(fmt.Sprintf("etcd%d", i))
		e.add(i, space.IP, space)
	}
	e.start()
	return e
}

// command makes a command that runs on the machine; nil: the test's own.
func (s *Namespace) command(name string, args ...string) *exec.Cmd {
	if s == nil || s.pid == 0 {
		return exec.Command(name, args...)
	}
	return exec.Command("nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", s.pid), "--", name}, args...)...)
}

// Start starts a program on the machine, as a user of it; it ends with the test. A
// program that ends before that has its output in the log of a test that failed.
func (s *Namespace) Start(tb testing.TB, uid int, env []string, name string, args ...string) (stop func()) {
	tb.Helper()
	cmd := s.command("setpriv", append([]string{fmt.Sprintf("--reuid=%d", uid), "--clear-groups", "--", name}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	var out Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if tb.Failed() {
			tb.Logf("%s on %s printed:\n%s", name, s.Name, out.String())
		}
	})
	tb.Cleanup(stop)
	return stop
}

// Run runs a program on the machine, as root, and fails the test if it fails.
func (s *Namespace) Run(tb testing.TB, name string, args ...string) {
	tb.Helper()
	if out, err := s.command(name, args...).CombinedOutput(); err != nil {
		tb.Fatalf("%s %s on %s: %v: %s", name, strings.Join(args, " "), s.Name, err, out)
	}
}

// Do does something on the machine, as a user: sockets that it opens are there.
func (s *Namespace) Do(tb testing.TB, uid int, do func() error) error {
	tb.Helper()
	pid := s.pid
	if pid == 0 {
		pid = os.Getpid()
	}
	var ns [2]int // the machine's, and that of the thread
	for i, path := range []string{fmt.Sprintf("/proc/%d/ns/net", pid), "/proc/self/ns/net"} {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			tb.Fatalf("open %s: %v", path, err)
		}
		defer unix.Close(fd)
		ns[i] = fd
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setns(ns[0], unix.CLONE_NEWNET); err != nil {
		tb.Fatal(err)
	}
	// The thread must not end: what it has started would.
	defer func() {
		if err := errors.Join(unix.Setfsuid(0), unix.Setns(ns[1], unix.CLONE_NEWNET)); err != nil {
			panic(fmt.Sprintf("stage: a thread stays on another machine: %v", err))
		}
	}()
	if err := unix.Setfsuid(uid); err != nil {
		tb.Fatal(err)
	}
	return do()
}

// ip configures a machine's network.
func ip(tb testing.TB, space *Namespace, args ...string) {
	tb.Helper()
	cmd := space.command("ip", args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}
