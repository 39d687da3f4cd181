// Package stage starts the real binaries for tests and benchmarks: a CA and
// agents as separate processes, or `merlon dev`, each in a temporary folder, on
// free loopback ports, and ended with the test. It can kill and restart them.
package stage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// built is where the binaries are, nil before binDir.
var built atomic.Pointer[string]

// binDirEnv names the folder of a test process to one that it starts.
const binDirEnv = "MERLON_TEST_BINS"

// binDir makes the folder for what is built, once for the whole test process.
var binDir = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv(binDirEnv); dir != "" {
		return dir, nil
	}
	dir, err := os.MkdirTemp("", "merlon-bin")
	if err == nil {
		built.Store(&dir)
	}
	return dir, err
})

// build compiles the binaries once for the whole test process.
var build = sync.OnceValues(func() (string, error) {
	dir, err := binDir()
	if err != nil {
		return "", err
	}
	if exists(filepath.Join(dir, "merlon-ca")) {
		return dir, nil
	}
	root, err := repository()
	if err != nil {
		return "", err
	}
	overlay, err := profilerOverlay(root, dir)
	if err != nil {
		return "", err
	}
	args := append([]string{"build", "-C", root, "-o", dir + "/"}, overlay...)
	cmd := exec.Command("go", append(args, "./ca/cmd/...", "./agent/cmd/...", "./sdk/cmd/...")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the binaries: %w\n%s", err, out)
	}
	return dir, nil
})

// repository is the folder of the module merlon.dev, also for tests of other modules.
func repository() (string, error) {
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "merlon.dev").Output()
	if err != nil {
		return "", fmt.Errorf("find the repository: %w", err)
	}
	return strings.TrimSpace(string(root)), nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Bin returns the path of a binary: merlon, merlon-ca, merlon-agent or merlon-sidecar.
func Bin(tb testing.TB, name string) string {
	tb.Helper()
	dir, err := build()
	if err != nil {
		tb.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// Build compiles one more binary, called name, once for the whole test process:
// module is its folder in the repository, which may be a Go module of its own.
func Build(tb testing.TB, name, module, tags string) string {
	tb.Helper()
	dir, err := binDir()
	if err != nil {
		tb.Fatal(err)
	}
	bin := filepath.Join(dir, name)
	building.Lock()
	defer building.Unlock()
	if exists(bin) {
		return name
	}
	root, err := repository()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-C", filepath.Join(root, module), "-tags", tags, "-o", bin, ".")
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return name
}

var building sync.Mutex

// RemoveBins removes what was built, if anything; for TestMain.
func RemoveBins() {
	if dir := built.Load(); dir != nil {
		os.RemoveAll(*dir)
	}
}

// Dir is a temporary folder with a path short enough for a socket in it.
func Dir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "m") //nolint:usetesting // tb.TempDir is too long for a socket
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Process is a started binary. Its methods are for one goroutine, but Log.
type Process struct {
	Name string
	Args []string
	Env  []string
	// Space is the machine that it runs on; nil: the test's own.
	Space *Namespace
	group *Group // that it starts in; nil: the test's own
	tb    testing.TB
	cmd   *exec.Cmd
	log   Buffer
	out   Buffer
}

// Start runs the binary; the process ends with the test.
func Start(tb testing.TB, name string, env []string, args ...string) *Process {
	tb.Helper()
	return StartOn(tb, nil, name, env, args...)
}

// StartOn is Start on another machine.
func StartOn(tb testing.TB, space *Namespace, name string, env []string, args ...string) *Process {
	tb.Helper()
	p := &Process{Name: name, Args: args, Env: env, Space: space, tb: tb}
	p.start()
	tb.Cleanup(func() {
		p.Stop()
		if tb.Failed() {
			tb.Logf("log of %s:\n%s", name, p.Log())
		}
	})
	return p
}

func (p *Process) start() {
	p.tb.Helper()
	name, args := Bin(p.tb, p.Name), p.Args
	if p.group != nil {
		name, args = p.group.enter(name, args)
	}
	p.cmd = p.Space.command(name, args...)
	p.cmd.Env = append(os.Environ(), p.Env...)
	p.cmd.Stderr, p.cmd.Stdout = &p.log, &p.out
	if err := p.cmd.Start(); err != nil {
		p.tb.Fatal(err)
	}
}

// Log is everything that the process wrote to stderr so far.
func (p *Process) Log() string { return p.log.String() }

// Stdout is everything that the process wrote to stdout so far.
func (p *Process) Stdout() string { return p.out.String() }

// PID is that of the running process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Kill ends the process with SIGKILL and waits for it.
func (p *Process) Kill() { p.end(syscall.SIGKILL) }

// Stop ends the process with SIGTERM and waits for it; after 10 s with SIGQUIT, which
// fails the test, and has what it does by then in its log.
func (p *Process) Stop() { p.end(syscall.SIGTERM) }

func (p *Process) end(sig syscall.Signal) {
	if p.cmd == nil {
		return
	}
	endProfile(p.tb, p.Name, p.cmd.Process)
	p.cmd.Process.Signal(sig)
	late := time.AfterFunc(10*time.Second, func() {
		p.tb.Errorf("%s did not end within 10 s of %s", p.Name, sig)
		p.cmd.Process.Signal(syscall.SIGQUIT)
	})
	never := time.AfterFunc(15*time.Second, func() { p.cmd.Process.Kill() })
	p.cmd.Wait()
	late.Stop()
	never.Stop()
	p.cmd = nil
}

// Ended says whether the process has ended by itself, and by which signal, 0 for none.
func (p *Process) Ended() (by syscall.Signal, ended bool) {
	p.tb.Helper()
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, p.PID(), &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if err != nil && !errors.Is(err, unix.EINTR) {
		p.tb.Fatalf("ask for the end of %s: %v", p.Name, err)
	}
	if info.Signo == 0 {
		return 0, false
	}
	p.cmd.Wait()
	if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() {
		by = status.Signal()
	}
	p.cmd = nil
	return by, true
}

// Restart starts the process again with the same arguments.
func (p *Process) Restart() {
	p.tb.Helper()
	p.end(syscall.SIGTERM)
	p.start()
}

// Run executes a binary to its end and returns its output.
func Run(ctx context.Context, tb testing.TB, env []string, name string, args ...string) (stdout, stderr string, err error) {
	tb.Helper()
	cmd := exec.CommandContext(ctx, Bin(tb, name), args...)
	cmd.Env = append(os.Environ(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// Eventually calls check until it returns nil, for at most a minute.
func Eventually(tb testing.TB, what string, check func() error) {
	tb.Helper()
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		if err = check(); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	tb.Fatalf("%s: still %v after a minute", what, err)
}

// Buffer collects what a process writes while tests read it. It is safe for
// concurrent use.
type Buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// Decode reads the JSON that a command printed.
func Decode(tb testing.TB, text string, into any) {
	tb.Helper()
	if err := json.NewDecoder(strings.NewReader(text)).Decode(into); err != nil {
		tb.Fatalf("decode %q: %v", text, err)
	}
}

// Stderr is what a program that failed wrote there, from the error of its Output.
func Stderr(err error) string {
	if e, ok := err.(*exec.ExitError); ok { //nolint:errorlint // straight from Output
		return string(e.Stderr)
	}
	return ""
}
