// Package failpoint ends a process at a named point of its code, as SIGKILL does.
// Nothing of the product knows it: the fault matrix builds a CA into which calls of
// At are inserted (integration/faults/points_test.go).
package failpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// Env names the file that arms a point. It says where to die, and the how manyth time
// that is passed: "head: synced|3". Arm writes it, also while the process runs.
const Env = "MERLON_FAILPOINT"

const diedSuffix = ".died"

// Arm makes the process whose Env is path die as it passes name for the time-th time
// from now on.
func Arm(path, name string, time int) error {
	if err := os.Remove(path + diedSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// In one step: the process may be reading.
	if err := os.WriteFile(path+".new", fmt.Appendf(nil, "%s|%d", name, time), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Disarm lets the process live.
func Disarm(path string) error { return os.Remove(path) }

// Died is the point at which a process has died since Arm; empty: at none.
func Died(path string) string {
	name, _ := os.ReadFile(path + diedSuffix)
	return string(name)
}

// passes counts those of the point that is armed.
var passes struct {
	sync.Mutex
	armed string // what the file says
	count int
}

// At is a point. It does not return if it is the one that is armed, and its time has
// come.
func At(name string) {
	path := os.Getenv(Env)
	if path == "" {
		return
	}
	armed, err := os.ReadFile(path)
	if err != nil {
		return // no point is armed
	}
	point, times, _ := strings.Cut(string(armed), "|")
	if point != name {
		return
	}
	passes.Lock()
	defer passes.Unlock()
	if passes.armed != string(armed) {
		passes.armed, passes.count = string(armed), 0
	}
	passes.count++
	if n, err := strconv.Atoi(times); err == nil && passes.count != n {
		return
	}
	// What cannot be said is not done: the harness waits for both.
	if os.WriteFile(path+diedSuffix, []byte(name), 0o600) == nil {
		syscall.Kill(os.Getpid(), syscall.SIGKILL) //nolint:errcheck // if it fails the harness sees a process that lives
		select {}
	}
}
