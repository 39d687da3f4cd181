// What is said over a real socket, and which sockets are taken from a real
// parent.

package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// This binary is also the daemon to which sockets are passed.
func TestMain(m *testing.M) {
	switch os.Getenv("SYSTEMD_TEST_DAEMON") {
	case "":
		goleak.VerifyTestMain(m)
		return
	case "ours":
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	}
	sockets, err := TakeSockets()
	var paths []string
	for path := range sockets {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	fmt.Printf("%q %v left=%q", paths, err, os.Getenv("LISTEN_FDS")+os.Getenv("LISTEN_PID")+os.Getenv("LISTEN_FDNAMES"))
	sockets.Close()
}

func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "m") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// hear is the service manager's end.
func hear(t *testing.T) (next func() string) {
	t.Helper()
	path := filepath.Join(folder(t), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return func() string {
		t.Helper()
		if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		n, err := conn.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
}

func TestManagerIsTold(t *testing.T) {
	next := hear(t)
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	m, err := Open(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if left := os.Getenv("WATCHDOG_USEC") + os.Getenv("WATCHDOG_PID"); left != "" {
		t.Errorf("left in the environment: %q", left)
	}
	for _, tt := range []struct {
		say  func()
		want string
	}{
		{func() { m.Status("waiting") }, "STATUS=waiting"},
		{func() { m.Ready("serving") }, "READY=1\nSTATUS=serving"},
		{m.Stopping, "STOPPING=1\nSTATUS=stopping"},
	} {
		tt.say()
		if got := next(); got != tt.want {
			t.Errorf("said %q; want %q", got, tt.want)
		}
	}
	monotonic := func() int64 {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
			t.Fatal(err)
		}
		return now.Nano() / 1000
	}
	before := monotonic()
	m.Reloading()
	var at int64
	if said := next(); !strings.HasPrefix(said, "RELOADING=1\n") {
		t.Errorf("said %q of a reload", said)
	} else if _, err := fmt.Sscanf(said, "RELOADING=1\nMONOTONIC_USEC=%d\nSTATUS=reading settings", &at); err != nil || at < before || at > monotonic() {
		t.Errorf("said %q, %v; want a time from %d on", said, err, before)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var dead atomic.Bool
	done := make(chan struct{})
	asked := make(chan struct{}, 100)
	go func() {
		defer close(done)
		m.Watch(ctx, func(context.Context) error {
			asked <- struct{}{}
			if dead.Load() {
				return errors.New("dead")
			}
			return nil
		})
	}()
	for range 3 {
		if got := next(); got != "WATCHDOG=1" {
			t.Errorf("said %q; want WATCHDOG=1", got)
		}
	}
	dead.Store(true)
	for range 10 { // it is asked on and on
		<-asked
	}
	cancel()
	<-done
	m.Status("end")
	// What was under way when it died, and nothing more.
	said := 0
	for next() != "STATUS=end" {
		said++
	}
	if said > 8 {
		t.Errorf("the watchdog was told %d times more", said)
	}
}

func TestNoManagerIsNotTold(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	var none *Manager
	none.Ready("x")
	none.Status("x")
	none.Stopping()
	none.Reloading()
	none.Watch(t.Context(), func(context.Context) error { return nil })
	t.Setenv("WATCHDOG_USEC", "none")
	if _, err := Open(slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a watchdog of no time was accepted")
	}
	t.Setenv("WATCHDOG_USEC", "1000")
	t.Setenv("WATCHDOG_PID", "1")
	m, err := Open(slog.New(slog.DiscardHandler))
	if err != nil || m.watchdog != 0 {
		t.Errorf("another's watchdog: %+v, %v", m, err)
	}
	m.Ready("nobody listens")
}

func TestSocketsAreTaken(t *testing.T) {
	dir := folder(t)
	listen := func(network, address string) *os.File {
		lis, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { lis.Close() })
		f, err := lis.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	fa, fb, tcp := listen("unix", a), listen("unix", b), listen("tcp", "127.0.0.1:0")
	file, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for name, tt := range map[string]struct {
		files []*os.File
		whose string
		want  string
	}{
		"none":      {nil, "ours", `[] <nil> left=""`},
		"two":       {[]*os.File{fa, fb}, "ours", fmt.Sprintf(`["%s" "%s"] <nil> left=""`, a, b)},
		"another's": {[]*os.File{fa}, "theirs", `[] <nil> left=""`},
		"twice":     {[]*os.File{fa, fa}, "ours", "was passed twice"},
		"TCP":       {[]*os.File{fa, tcp}, "ours", "only Unix sockets are served"},
		"a file":    {[]*os.File{file}, "ours", "not a socket that listens"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0])
			cmd.ExtraFiles = tt.files
			cmd.Env = append(os.Environ(), "SYSTEMD_TEST_DAEMON="+tt.whose, "LISTEN_PID=1", "LISTEN_FDS="+strconv.Itoa(len(tt.files)), "LISTEN_FDNAMES=x:y")
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), tt.want) {
				t.Errorf("the daemon says %q, %v; want %q", out, err, tt.want)
			}
			if _, err := os.Stat(a); err != nil {
				t.Errorf("the socket went with the daemon: %v", err)
			}
		})
	}
}
