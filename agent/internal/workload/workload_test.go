// Real processes, real sockets: what is proved about them, and what is not.

package workload

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"merlon.dev/sdk/unixsock"
)

// This binary is also the workload: with MERLON_TEST_WORKLOAD it connects to a
// socket and then obeys lines on stdin.
func TestMain(m *testing.M) {
	if socket := os.Getenv("MERLON_TEST_WORKLOAD"); socket != "" {
		if err := actWorkload(socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func actWorkload(socket string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0) // not close-on-exec
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: socket})
	}
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		switch line := lines.Text(); {
		case strings.HasPrefix(line, "exec "):
			return syscall.Exec(strings.TrimPrefix(line, "exec "), []string{"other", "100"}, nil)
		case line == "drop user":
			_ = syscall.Setresuid(4242, 4242, 4242)
			fmt.Println("dropped")
		case line == "drop group":
			_ = syscall.Setresgid(4242, 4242, 4242)
			fmt.Println("dropped")
		default:
			return nil
		}
	}
	return lines.Err()
}

// peerProcess is a process that has connected.
type peerProcess struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
	peer  *unixsock.Peer
}

func startPeer(t *testing.T, program string) *peerProcess {
	t.Helper()
	dir, err := os.MkdirTemp("", "mw") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	lis, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	p := &peerProcess{cmd: exec.Command(program)}
	p.cmd.Env = append(os.Environ(), "MERLON_TEST_WORKLOAD="+lis.Addr().String())
	p.cmd.Stderr = os.Stderr
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if p.peer, err = unixsock.PeerOf(conn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		p.peer.Close()
		p.end()
	})
	return p
}

func (p *peerProcess) end() {
	p.stdin.Close()
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func (p *peerProcess) tell(t *testing.T, line string) {
	t.Helper()
	if _, err := io.WriteString(p.stdin, line+"\n"); err != nil {
		t.Fatal(err)
	}
}

func newAttestor(t *testing.T) *Attestor {
	t.Helper()
	a, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// copyOf copies this binary to dir under name.
func copyOf(t *testing.T, dir, name string) string {
	t.Helper()
	content, err := os.ReadFile(self(t))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, content, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSelectorsOfAProcess(t *testing.T) {
	a, p := newAttestor(t), startPeer(t, self(t))
	got, err := a.Attest(t.Context(), p.peer, AllKinds)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(self(t))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	want := []string{
		fmt.Sprintf("unix:gid:%d", os.Getegid()), "unix:path:" + self(t),
		"unix:sha256:" + hex.EncodeToString(sum[:]), fmt.Sprintf("unix:uid:%d", os.Geteuid()),
	}
	if me, err := user.Current(); err == nil {
		want = append(want, "unix:user:"+me.Username)
	}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	for _, gid := range groups {
		want = append(want, fmt.Sprintf("unix:supplementary_gid:%d", gid))
		if g, err := user.LookupGroupId(strconv.Itoa(gid)); err == nil {
			want = append(want, "unix:supplementary_group:"+g.Name)
		}
	}
	if g, err := user.LookupGroupId(strconv.Itoa(os.Getegid())); err == nil {
		want = append(want, "unix:group:"+g.Name)
	}
	slices.Sort(want)
	s := slices.DeleteFunc(got.Selectors(), func(s string) bool { return !strings.HasPrefix(s, "unix:") }) // where this test runs is not known
	if !slices.Equal(s, want) {
		t.Errorf("Selectors() = %q; want %q", s, want)
	}
	if len(a.hashes.known) != 1 {
		t.Errorf("%d digests are kept; want 1", len(a.hashes.known))
	}
	without, err := newAttestor(t).Attest(t.Context(), p.peer, 0)
	if err != nil || without.SHA256 != "" {
		t.Errorf("Attest without digest = %q, %v; want none", without.SHA256, err)
	}
	explained, err := a.AttestPID(t.Context(), p.peer.PID)
	if err != nil || !explained.Same(got) || explained.SHA256 == "" {
		t.Errorf("AttestPID() = %+v, %v; want the same process, hashed", explained, err)
	}
}

func TestProcessThatEndedProvesNothing(t *testing.T) {
	a, p := newAttestor(t), startPeer(t, self(t))
	p.end()
	if got, err := a.Attest(t.Context(), p.peer, 0); !errors.Is(err, ErrGone) {
		t.Errorf("Attest() = %v, %v; want ErrGone", got, err)
	}
}

func TestProcessThatEndsWhileItIsReadProvesNothing(t *testing.T) {
	a, p := newAttestor(t), startPeer(t, self(t))
	a.afterRead = p.end
	if got, err := a.Attest(t.Context(), p.peer, 0); !errors.Is(err, ErrGone) {
		t.Errorf("Attest() = %v, %v; want ErrGone", got, err)
	}
}

// T2: the number of a process that ended is given to another. The kernel hands
// out the next number on request in ns_last_pid.
func TestReusedProcessIDProvesNothing(t *testing.T) {
	a := newAttestor(t)
	for range 20 {
		p := startPeer(t, self(t))
		pid := p.cmd.Process.Pid
		p.end()
		victim := startWithPID(t, pid)
		if victim == nil {
			t.Skip("process IDs cannot be chosen here")
		}
		got, err := a.Attest(t.Context(), p.peer, 0)
		_ = victim.Process.Kill()
		_ = victim.Wait()
		if !errors.Is(err, ErrGone) {
			t.Fatalf("Attest() = %v, %v after process %d became another; want ErrGone", got, err, pid)
		}
	}
}

// startWithPID starts a process with this number, nil if that fails.
func startWithPID(t *testing.T, pid int) *exec.Cmd {
	t.Helper()
	for range 50 {
		if os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(fmt.Sprint(pid-1)), 0o600) != nil {
			return nil
		}
		cmd := exec.Command("/bin/sleep", "100")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if cmd.Process.Pid == pid {
			return cmd
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	return nil
}

// T3: another program in the same process is another workload, and the connection
// is not its.
func TestExecAfterConnectIsSeen(t *testing.T) {
	a, p := newAttestor(t), startPeer(t, self(t))
	before, err := a.Attest(t.Context(), p.peer, 0)
	if err != nil {
		t.Fatal(err)
	}
	other, err := filepath.EvalSymlinks("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	p.tell(t, "exec "+other)
	for deadline := time.Now().Add(10 * time.Second); ; {
		after, err := a.Attest(t.Context(), p.peer, 0)
		if errors.Is(err, ErrChanged) {
			return
		}
		if err == nil && !after.Same(before) {
			t.Fatalf("Selectors() = %q on the connection of %s", after.Selectors(), before.Path)
		}
		if time.Now().After(deadline) {
			t.Fatalf("Attest() = %v, %v; want ErrChanged", after, err)
		}
	}
}

// T3: nor is it where the process became another before its first call.
func TestExecBeforeTheFirstCallIsSeen(t *testing.T) {
	a, p := newAttestor(t), startPeer(t, self(t))
	a.Meet(p.peer)
	other, err := filepath.EvalSymlinks("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	p.tell(t, "exec "+other)
	link := fmt.Sprintf("/proc/%d/exe", p.peer.PID)
	for deadline := time.Now().Add(30 * time.Second); ; {
		if path, err := os.Readlink(link); err == nil && path == other {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not run %s", other)
		}
	}
	if got, err := a.Attest(t.Context(), p.peer, 0); !errors.Is(err, ErrChanged) {
		t.Errorf("Attest() = %v, %v; want ErrChanged", got, err)
	}
}

func TestChangeOfUserAfterConnectIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, what := range []string{"user", "group"} {
		a, p := newAttestor(t), startPeer(t, self(t))
		p.tell(t, "drop "+what)
		if _, err := p.out.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		if got, err := a.Attest(t.Context(), p.peer, 0); !errors.Is(err, ErrChanged) {
			t.Errorf("Attest() = %v, %v after a change of the %s; want ErrChanged", got, err, what)
		}
	}
}

func TestPathIsOnlyProvedByTheFileThatLiesThere(t *testing.T) {
	tests := map[string]func(t *testing.T, path string){
		"deleted": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
		"replaced": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			copyOf(t, filepath.Dir(path), filepath.Base(path))
		},
		"deleted, and another is called that": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			copyOf(t, filepath.Dir(path), filepath.Base(path)+" (deleted)")
		},
		"a link lies there": func(t *testing.T, path string) {
			if err := os.Rename(path, path+".old"); err != nil {
				t.Fatal(err)
			}
			// The kernel follows the rename; nothing is at the old path but this.
			if err := os.Symlink(path+".old", path); err != nil {
				t.Fatal(err)
			}
		},
	}
	for name, disturb := range tests {
		t.Run(name, func(t *testing.T) {
			path := copyOf(t, t.TempDir(), "web")
			a, p := newAttestor(t), startPeer(t, path)
			before, err := a.Attest(t.Context(), p.peer, 0)
			if err != nil || before.Path != path {
				t.Fatalf("Attest() = %+v, %v; want path %s", before, err, path)
			}
			disturb(t, path)
			after, err := a.Attest(t.Context(), p.peer, AllKinds)
			if err != nil {
				t.Fatal(err)
			}
			if name == "a link lies there" {
				if after.Path != path+".old" {
					t.Errorf("Path = %q; want where the program is now", after.Path)
				}
				return
			}
			if after.Path != "" || len(after.Notes) == 0 {
				t.Errorf("Path = %q, notes %q; want no path and a note", after.Path, after.Notes)
			}
			if after.SHA256 == "" {
				t.Errorf("no digest of the program that runs; notes %q", after.Notes)
			}
		})
	}
}

// T5: a process can put any file at any path in a mount namespace of its own.
func TestPathInAnotherMountNamespaceIsNotProved(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	victim, forged := copyOf(t, dir, "victim"), copyOf(t, dir, "forged")
	script := filepath.Join(dir, "run")
	content := fmt.Sprintf("#!/bin/sh\nexec unshare -m sh -c 'mount --bind %s %s && exec %s'\n", forged, victim, victim)
	if err := os.WriteFile(script, []byte(content), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command("unshare", "-m", "true").Run(); err != nil {
		t.Skip("mount namespaces cannot be made here")
	}
	a, p := newAttestor(t), startPeer(t, script)
	got, err := a.Attest(t.Context(), p.peer, 0)
	if err != nil {
		t.Fatal(err)
	}
	if got.Path == victim {
		t.Errorf("Path = %s: the file there is not the program that runs", got.Path)
	}
}

func TestPeerOfAnotherPIDNamespaceProvesNothing(t *testing.T) {
	if got, err := newAttestor(t).Attest(t.Context(), &unixsock.Peer{PID: 0}, 0); !errors.Is(err, ErrForeign) {
		t.Errorf("Attest() = %v, %v; want ErrForeign", got, err)
	}
}

// What is not asked for is not read.
func TestOnlyWantedKindsAreRead(t *testing.T) {
	a, p := newAttestor(t), startPeer(t, self(t))
	a.users.path, a.groups.path = writeNames(t, "me:x:%d:", os.Geteuid()), writeNames(t, "mine:x:%d:", os.Getegid())
	for wanted := range AllKinds + 1 {
		got, err := a.Attest(t.Context(), p.peer, wanted)
		if err != nil || got.Read != wanted {
			t.Fatalf("Attest() = %+v, %v; want kinds %b read", got, err, wanted)
		}
		var proved Kinds
		for _, s := range got.Selectors() {
			proved |= KindOf(s)
		}
		if proved &= Digest | Names; proved != wanted&(Digest|Names) { // in no container, and under no systemd, for all that is known
			t.Errorf("kinds %b proved where %b are wanted", proved, wanted)
		}
	}
}

func writeNames(t *testing.T, format string, id int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "names")
	if err := os.WriteFile(path, fmt.Appendf(nil, format+"\n", id), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func BenchmarkAttest(b *testing.B) {
	a, err := New()
	if err != nil {
		b.Fatal(err)
	}
	defer a.Close()
	server, client := socketPair(b)
	defer server.Close()
	defer client.Close()
	peer, err := unixsock.PeerOf(server)
	if err != nil {
		b.Fatal(err)
	}
	defer peer.Close()
	for name, wanted := range map[string]Kinds{"plain": 0, "digest": Digest, "names": Names, "groups": ControlGroups, "all": AllKinds} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := a.Attest(context.Background(), peer, wanted); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func socketPair(b *testing.B) (server, client net.Conn) {
	b.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	conns := make([]net.Conn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if conns[i], err = net.FileConn(f); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
	return conns[0], conns[1]
}

func TestWithoutPidfdTheStartTimeIsCompared(t *testing.T) {
	a := newAttestor(t)
	peer := &unixsock.Peer{PID: int32(os.Getpid()), UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
	first, err := a.Attest(t.Context(), peer, 0)
	if err != nil || first.startTicks == 0 {
		t.Fatalf("Attest() = %+v, %v; want a start time", first, err)
	}
	other := *first
	other.startTicks++
	if first.Same(&other) {
		t.Error("a process that started at another time passes for the same")
	}
}

func TestBothLooksMustFindTheProcessAlive(t *testing.T) {
	a := newAttestor(t)
	for _, dead := range []int{1, 2} {
		looks := 0
		alive := func() bool { looks++; return looks != dead }
		if got, err := a.read(t.Context(), &Process{PID: int32(os.Getpid())}, false, alive); !errors.Is(err, ErrGone) {
			t.Errorf("read() = %v, %v where look %d finds it dead; want ErrGone", got, err, dead)
		}
	}
}

func TestExecWhileTheProcessIsReadProvesNothing(t *testing.T) {
	other, err := filepath.EvalSymlinks("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	a, p := newAttestor(t), startPeer(t, self(t))
	a.afterRead = func() {
		p.tell(t, "exec "+other)
		link := fmt.Sprintf("/proc/%d/exe", p.peer.PID)
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
			if path, err := os.Readlink(link); err == nil && path == other {
				return
			}
		}
	}
	if got, err := a.Attest(t.Context(), p.peer, 0); !errors.Is(err, ErrGone) {
		t.Errorf("Attest() = %v, %v; want ErrGone", got, err)
	}
}
