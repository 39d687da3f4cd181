// What a process is denied by its machine: file descriptors, memory, processor time,
// any time at all. Cgroups of version 1 and 2.

package stage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Pause halts the process with SIGSTOP: its connections stay, nothing answers.
func (p *Process) Pause() { p.tell(syscall.SIGSTOP) }

// Resume lets it go on.
func (p *Process) Resume() { p.tell(syscall.SIGCONT) }

func (p *Process) tell(sig syscall.Signal) {
	p.tb.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.tb.Fatalf("send %s to %s: %v", sig, p.Name, err)
	}
}

// Limit sets the soft limit of a resource (unix.RLIMIT_NOFILE, …) of a running
// process, until the returned function is called.
func Limit(tb testing.TB, pid, resource int, to uint64) (undo func()) {
	tb.Helper()
	var was unix.Rlimit
	if err := unix.Prlimit(pid, resource, nil, &was); err != nil {
		tb.Fatalf("read a limit of process %d: %v", pid, err)
	}
	if err := unix.Prlimit(pid, resource, &unix.Rlimit{Cur: to, Max: was.Max}, nil); err != nil {
		tb.Fatalf("limit process %d: %v", pid, err)
	}
	return func() {
		if err := unix.Prlimit(pid, resource, &was, nil); err != nil && !errors.Is(err, syscall.ESRCH) {
			tb.Errorf("undo the limit of process %d: %v", pid, err)
		}
	}
}

// Confine puts a process into a control group of its own, with that much memory and
// that share of a processor, in percent (0: no limit). The error says what the
// machine lacks. undo moves the process back.
func Confine(tb testing.TB, pid int, memoryBytes int64, cpuPercent int) (undo func(), err error) {
	tb.Helper()
	const root, period = "/sys/fs/cgroup", 100_000
	type setting struct{ controller, file, value string }
	var settings []setting
	two := exists(filepath.Join(root, "cgroup.controllers"))
	switch {
	case two && memoryBytes > 0:
		settings = append(settings, setting{"", "memory.max", fmt.Sprint(memoryBytes)})
	case memoryBytes > 0:
		settings = append(settings, setting{"memory", "memory.limit_in_bytes", fmt.Sprint(memoryBytes)})
	}
	switch {
	case two && cpuPercent > 0:
		settings = append(settings, setting{"", "cpu.max", fmt.Sprintf("%d %d", cpuPercent*period/100, period)})
	case cpuPercent > 0:
		settings = append(settings, setting{"cpu", "cpu.cfs_quota_us", fmt.Sprint(cpuPercent * period / 100)})
	}
	groups := make(map[string]bool)
	undo = func() {
		for group := range groups {
			if exists(fmt.Sprintf("/proc/%d", pid)) {
				err := os.WriteFile(filepath.Join(filepath.Dir(group), "cgroup.procs"), []byte(fmt.Sprint(pid)), 0o600)
				if err != nil && !errors.Is(err, syscall.ESRCH) {
					tb.Errorf("take process %d out of its control group: %v", pid, err)
				}
			}
			Eventually(tb, "the control group is removed", func() error { return os.Remove(group) })
		}
		clear(groups)
	}
	for _, s := range settings {
		group := filepath.Join(root, s.controller, fmt.Sprintf("merlon-test-%d", pid))
		if err := os.MkdirAll(group, 0o755); err != nil {
			return nil, fmt.Errorf("make a control group: %w", err)
		}
		groups[group] = true
		for file, value := range map[string]string{s.file: s.value, "cgroup.procs": fmt.Sprint(pid)} {
			if err := os.WriteFile(filepath.Join(group, file), []byte(value), 0o600); err != nil {
				undo()
				return nil, fmt.Errorf("confine a process by %s: %w", strings.TrimPrefix(file, group), err)
			}
		}
	}
	return undo, nil
}
