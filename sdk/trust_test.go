// A socket that somebody else put in the agent's place gets nothing
// (SECURITY.md T49).

package sdk_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"merlon.dev/sdk"
)

const somebody = 54321

// listenAs binds a socket as another user. The kernel notes who calls
// listen(2), so it is enough that one thread is that user meanwhile.
func listenAs(t *testing.T, uid uintptr, path string) net.Listener {
	t.Helper()
	var lis net.Listener
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		const same = ^uintptr(0)
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, same, uid, same); errno != 0 {
			err = errno
			return
		}
		lis, err = net.Listen("unix", path)
	}()
	<-done
	if err != nil {
		t.Fatal(err)
	}
	return lis
}

func TestForeignSocketIsNotTrusted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	dir, err := os.MkdirTemp("", "sdk") //nolint:usetesting // t.TempDir is too long for a socket path
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "api.sock")
	lis := listenAs(t, somebody, path)
	server := grpc.NewServer()
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(lis) }()
	defer func() { server.Stop(); <-done }()

	open := func(opts ...sdk.Option) sdk.NotReadyReason {
		_, err := sdk.Open(t.Context(), append(opts, sdk.WithAgentAddress("unix://"+path), sdk.WithStartupTimeout(300*time.Millisecond), quiet)...)
		var notReady *sdk.NotReadyError
		if !errors.As(err, &notReady) {
			t.Fatalf("Open = %v", err)
		}
		return notReady.Reason
	}
	if got := open(); got != sdk.AgentNotTrusted {
		t.Errorf("a socket of uid %d: %s; want AGENT_NOT_TRUSTED", somebody, got)
	}
	// Trusted, it is asked, and turns out to be no agent.
	if got := open(sdk.WithAgentUID(somebody)); got != sdk.BadAnswer {
		t.Errorf("the same, trusted: %s; want BAD_ANSWER", got)
	}
}
