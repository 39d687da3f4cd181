package failpoint_test

// A process dies at the point that is armed, at its time, and at no other.

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"merlon.dev/integration/faults/failpoint"
)

const childEnv = "MERLON_FAILPOINT_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		for i := range 5 {
			failpoint.At("one")
			fmt.Println("one", i)
			failpoint.At("other")
		}
		return
	}
	m.Run()
}

func TestDiesAtItsPoint(t *testing.T) {
	for name, c := range map[string]struct {
		arm    string
		time   int
		output string
		killed bool
	}{
		"first":       {"one", 1, "", true},
		"third":       {"one", 3, "one 0\none 1\n", true},
		"other":       {"other", 2, "one 0\none 1\n", true},
		"not reached": {"one", 6, "one 0\none 1\none 2\none 3\none 4\n", false},
		"unknown":     {"two", 1, "one 0\none 1\none 2\none 3\none 4\n", false},
		"not armed":   {"", 0, "one 0\none 1\none 2\none 3\none 4\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "point")
			if c.arm != "" {
				if err := failpoint.Arm(path, c.arm, c.time); err != nil {
					t.Fatal(err)
				}
			}
			child := exec.Command(os.Args[0])
			child.Env = append(os.Environ(), childEnv+"=1", failpoint.Env+"="+path)
			out, err := child.Output()
			if string(out) != c.output {
				t.Errorf("it said %q; want %q", out, c.output)
			}
			exit, failed := errors.AsType[*exec.ExitError](err)
			if killed := failed && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL; killed != c.killed {
				t.Errorf("it ended by %v; want killed: %v", err, c.killed)
			}
			if died := failpoint.Died(path); (died != "") != c.killed || c.killed && died != c.arm {
				t.Errorf("Died = %q", died)
			}
		})
	}
}
