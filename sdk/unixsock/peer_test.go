// Kernels that name no process at a socket.

package unixsock

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// noSuchOption is how SO_PEERPIDFD looks before Linux 6.5.
const noSuchOption = 9999

// Without SO_PEERPIDFD a process is held from when its connection is accepted:
// whoever gets its number later is not taken for it (SECURITY.md T2).
func TestPeerIsHeldFromAcceptingOnOlderKernels(t *testing.T) {
	if os.Getenv("UNIXSOCK_CONNECT_ONLY") != "" {
		connectAndRead()
		return
	}
	dir, err := os.MkdirTemp("", "us") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	lis, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestPeerIsHeldFromAcceptingOnOlderKernels$")
	child.Env = append(os.Environ(), "UNIXSOCK_CONNECT_ONLY="+lis.Addr().String())
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer, err := peerOf(conn, noSuchOption)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if !peer.Pinned() || !peer.Alive() || int(peer.PID) != child.Process.Pid {
		t.Errorf("peer %+v: pinned %t, alive %t; want process %d held", peer, peer.Pinned(), peer.Alive(), child.Process.Pid)
	}
	_ = child.Process.Kill()
	_ = child.Wait()
	if other := takeNumber(t, child.Process.Pid); other != nil {
		defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	} else {
		t.Log("process IDs cannot be chosen here: only the end of the process was shown")
	}
	if peer.Alive() {
		t.Error("a process that ended is alive, by another that may have its number")
	}
}

// connectAndRead is the child's part.
func connectAndRead() {
	conn, err := net.Dial("unix", os.Getenv("UNIXSOCK_CONNECT_ONLY"))
	if err != nil {
		panic(err)
	}
	_, _ = conn.Read(make([]byte, 1))
}

func TestThisKernelSaysWhetherItIsExact(t *testing.T) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	if want := major > 6 || major == 6 && minor >= 5; Exact() != want {
		t.Errorf("Exact() = %t on Linux %d.%d; want %t", Exact(), major, minor, want)
	}
}

// takeNumber starts a process with this number, nil if that fails.
func takeNumber(t *testing.T, pid int) *exec.Cmd {
	t.Helper()
	for range 50 {
		if os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0o600) != nil {
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
