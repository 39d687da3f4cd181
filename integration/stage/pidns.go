// PID namespaces: a machine as far as numbers of processes go. Needs root.

package stage

import (
	"os"
	"syscall"
	"testing"
)

const inPIDNamespace = "MERLON_TEST_PIDNS"

// InPIDNamespace runs the test that calls it once more, as the first process of
// a PID namespace of its own, with a /proc to it. It says true there; false
// means that the test is over, as with InNamespace.
func InPIDNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inPIDNamespace) == t.Name() {
		if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
			t.Fatalf("keep mounts to this namespace: %v", err)
		}
		if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
			t.Fatalf("mount /proc: %v", err)
		}
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("PID namespaces need root")
	}
	Bin(t, "merlon")
	again(t, "in a PID namespace of its own", inPIDNamespace, syscall.CLONE_NEWPID|syscall.CLONE_NEWNS)
	return false
}
