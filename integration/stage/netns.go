// Network namespaces: machines of a test that can be cut off from each other.

package stage

import "os/exec"

// Namespace is one machine's network.
type Namespace struct{ pid int }

func (n *Namespace) command(name string, args ...string) *exec.Cmd { return exec.Command(name, args...) }
