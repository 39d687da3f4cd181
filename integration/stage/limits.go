// What a process is denied by its machine: file descriptors, memory, processor time,
// any time at all. Cgroups of version 1 and 2.

package stage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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

// Group is a control group with one process in it.
type Group struct {
	tb      testing.TB
	process *Process
	two     bool // of cgroups' second version
	memory  string
	cpu     string // the same folder, in the second version
}

const cgroups = "/sys/fs/cgroup"

// Confine starts the process again, in a control group of its own which has that much
// memory and no swap. It is in the group before it is what it is: memory that a process
// has already stays with the group that it had it in. The error says what the machine
// lacks; the process is as it was then.
func (p *Process) Confine(memoryBytes int64) (*Group, error) {
	p.tb.Helper()
	name := fmt.Sprintf("merlon-test-%d", p.PID())
	g := &Group{tb: p.tb, process: p, two: exists(filepath.Join(cgroups, "cgroup.controllers"))}
	limit, swap := "memory.max", "memory.swap.max"
	swapBytes := int64(0)
	if g.memory = filepath.Join(cgroups, name); !g.two {
		g.memory = filepath.Join(cgroups, "memory", name)
		limit, swap = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes" // of both together
		swapBytes = memoryBytes
	}
	if g.cpu = g.memory; !g.two {
		g.cpu = filepath.Join(cgroups, "cpu", name)
	}
	for _, folder := range g.folders() {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			g.remove()
			return nil, fmt.Errorf("make a control group: %w", err)
		}
	}
	err := g.set(g.memory, limit, memoryBytes)
	if err == nil && exists(filepath.Join(g.memory, swap)) { // not where the kernel does not count it
		err = g.set(g.memory, swap, swapBytes)
	}
	if err != nil {
		g.remove()
		return nil, err
	}
	p.group = g
	p.tb.Cleanup(g.Leave)
	p.Restart()
	return g, nil
}

// Throttle leaves the process that share of a processor, in percent.
func (g *Group) Throttle(percent int) error {
	const period = 100_000
	if g.two {
		return g.set(g.cpu, "cpu.max", fmt.Sprintf("%d %d", percent*period/100, period))
	}
	return g.set(g.cpu, "cpu.cfs_quota_us", percent*period/100)
}

// Memory is how many bytes count for the group by now, and at most so far: what the
// process has for itself, and what the kernel keeps of files that it was the first to
// read or write.
func (g *Group) Memory() (now, peak int64) {
	g.tb.Helper()
	if g.two {
		return g.number("memory.current"), g.number("memory.peak")
	}
	return g.number("memory.usage_in_bytes"), g.number("memory.max_usage_in_bytes")
}

// Leave lets the process go on without limits.
func (g *Group) Leave() {
	g.tb.Helper()
	if g.process.group != g {
		return
	}
	g.process.group = nil
	for _, folder := range g.folders() {
		in, err := os.ReadFile(filepath.Join(folder, "cgroup.procs"))
		if err != nil {
			g.tb.Errorf("read who is in a control group: %v", err)
		}
		for pid := range strings.FieldsSeq(string(in)) {
			if err := g.set(filepath.Dir(folder), "cgroup.procs", pid); err != nil && !errors.Is(err, syscall.ESRCH) {
				g.tb.Errorf("take process %s out of its control group: %v", pid, err)
			}
		}
	}
	Eventually(g.tb, "the control group is removed", g.remove)
}

// enter is a command that enters the group and becomes the one that is given.
func (g *Group) enter(name string, args []string) (string, []string) {
	var script []string
	for _, folder := range g.folders() {
		script = append(script, "echo 0 > "+folder+"/cgroup.procs && ") // 0: who writes
	}
	return "sh", append([]string{"-c", strings.Join(script, "") + `exec "$@"`, "sh", name}, args...)
}

func (g *Group) folders() []string { return slices.Compact([]string{g.memory, g.cpu}) }

func (g *Group) remove() (err error) {
	for _, folder := range g.folders() {
		if failed := os.Remove(folder); !errors.Is(failed, fs.ErrNotExist) {
			err = errors.Join(err, failed)
		}
	}
	return err
}

func (g *Group) set(folder, file string, value any) error {
	if err := os.WriteFile(filepath.Join(folder, file), []byte(fmt.Sprint(value)), 0o600); err != nil {
		return fmt.Errorf("confine a process: %w", err)
	}
	return nil
}

func (g *Group) number(file string) int64 {
	g.tb.Helper()
	text, err := os.ReadFile(filepath.Join(g.memory, file))
	if err != nil {
		g.tb.Fatalf("read how much memory a process has: %v", err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		g.tb.Fatalf("%s: %v", file, err)
	}
	return n
}
