// What a figure must go with to say anything: the machine, its load, the commit.

package measure

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"
)

// Machine is where and on what figures were measured.
type Machine struct {
	CPU    string    `json:"cpu"`
	Cores  int       `json:"cores"`
	Kernel string    `json:"kernel"`
	Go     string    `json:"go"`
	Commit string    `json:"commit"` // with "+" for a work tree that differs
	Load   string    `json:"load"`   // the averages of 1, 5 and 15 minutes
	At     time.Time `json:"at"`
}

// Here is this machine now, and the commit of the folder dir.
func Here(dir string) Machine {
	m := Machine{CPU: "unknown", Cores: runtime.NumCPU(), Kernel: firstOf("/proc/sys/kernel/osrelease", 1), Go: runtime.Version(), At: time.Now().UTC().Truncate(time.Second)}
	m.Load = firstOf("/proc/loadavg", 3)
	info, _ := os.ReadFile("/proc/cpuinfo") // without it the CPU stays unknown
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	m.Commit = commit(dir)
	return m
}

// String is one line of prose.
func (m Machine) String() string {
	return fmt.Sprintf("%s, commit %s: %d × %s, Linux %s, %s, load %s",
		m.At.Format("2 January 2006 15:04 MST"), m.Commit, m.Cores, m.CPU, m.Kernel, m.Go, m.Load)
}

// firstOf are the first n fields of a file, "unknown" if it cannot be read.
func firstOf(path string, n int) string {
	content, err := os.ReadFile(path)
	if fields := strings.Fields(string(content)); err == nil && len(fields) >= n {
		return strings.Join(fields[:n], " ")
	}
	return "unknown"
}

func commit(dir string) string {
	out, err := exec.Command("git", "-C", dir, "describe", "--always", "--abbrev=9", "--dirty=+", "--exclude=*").Output()
	if err != nil {
		return "unknown" // no work tree: a release, or git is missing
	}
	return strings.TrimSpace(string(out))
}
