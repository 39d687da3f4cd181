// A disk that loses power, for one test: integration/lossyfs, a process of its own.

package stage

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// LossyDisk forgets what was not synced when its power is cut. Its methods are for one
// goroutine.
type LossyDisk struct {
	Path    string
	tb      testing.TB
	in      io.WriteCloser
	answers *bufio.Scanner
}

// NewLossyDisk mounts a disk, until the test ends; it needs root. Where it cannot be
// mounted the test fails with the reason.
func NewLossyDisk(tb testing.TB) *LossyDisk {
	tb.Helper()
	disk := &LossyDisk{Path: Dir(tb), tb: tb}
	// A disk does not wait for a processor.
	cmd := exec.Command("nice", "-n", "-15", Path(tb, Build(tb, "lossyfs", "integration/lossyfs", "")), disk.Path)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	var err error
	if disk.in, err = cmd.StdinPipe(); err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	disk.answers = bufio.NewScanner(out)
	tb.Cleanup(func() {
		disk.in.Close() // unmounts
		late := time.AfterFunc(20*time.Second, func() {
			tb.Errorf("lossyfs does not end, %s is in use", disk.Path)
			cmd.Process.Kill()
		})
		defer late.Stop()
		cmd.Wait()
	})
	disk.answer("mount")
	return disk
}

// Sync makes everything durable that was written so far.
func (d *LossyDisk) Sync() {
	d.tb.Helper()
	dir, err := os.Open(d.Path)
	if err != nil {
		d.tb.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil { // what is only in mappings
		d.tb.Fatal(err)
	}
	d.do("sync")
}

// Cut takes the power: from now on every operation fails, and what was not durable is
// gone. It says what that was.
func (d *LossyDisk) Cut() (lost string) {
	d.tb.Helper()
	return d.do("cut")
}

// CutSome is Cut, but some of what was not durable is there, by seed.
func (d *LossyDisk) CutSome(seed uint64) (lost string) {
	d.tb.Helper()
	return d.do(fmt.Sprint("cut ", seed))
}

// Mount gives the power back. Nobody may have a file open any more.
func (d *LossyDisk) Mount() {
	d.tb.Helper()
	d.do("mount")
}

func (d *LossyDisk) do(command string) string {
	d.tb.Helper()
	if _, err := fmt.Fprintln(d.in, command); err != nil {
		d.tb.Fatalf("lossyfs: %s: %v", command, err)
	}
	return d.answer(command)
}

func (d *LossyDisk) answer(command string) string {
	d.tb.Helper()
	if !d.answers.Scan() {
		d.tb.Fatalf("lossyfs: %s: it has ended: %v", command, d.answers.Err())
	}
	what, ok := strings.CutPrefix(d.answers.Text(), "ok")
	if !ok {
		d.tb.Fatalf("lossyfs: %s: %s", command, d.answers.Text())
	}
	return strings.TrimSpace(what)
}
