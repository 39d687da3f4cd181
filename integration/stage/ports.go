// Ports for processes that are started again at the same address. Tests of several
// packages run beside each other: each test process gives out those of blocks that it
// alone has, so that nobody takes the port of a process that is down for a moment.

package stage

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

// Ports are given from lowestPort on, in blocks. They lie below those that the kernel
// gives to outgoing connections (32768), which would take them before whoever they
// are for.
const (
	lowestPort = 10_240
	portBlocks = 176
	blockSize  = 128
)

var ports struct {
	sync.Mutex
	left []int      // of the blocks of this process, not given yet
	held []*os.File // their locks, which end with the process
}

// FreePort returns a loopback port that nobody has, and that no other test is given.
func FreePort(tb testing.TB) int {
	tb.Helper()
	ports.Lock()
	defer ports.Unlock()
	for {
		if len(ports.left) == 0 {
			if err := takeBlock(); err != nil {
				tb.Fatal(err)
			}
		}
		port := ports.left[0]
		ports.left = ports.left[1:]
		lis, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue // some other program has it
		}
		lis.Close()
		return port
	}
}

// takeBlock makes the ports of a block that no other process has those of this one.
// ports is held.
func takeBlock() error {
	dir := filepath.Join(os.TempDir(), "merlon-test-ports")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, block := range rand.Perm(portBlocks) {
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprint(block)), os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return err
		}
		if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
			f.Close() // another process has it, or this one
			continue
		}
		ports.held = append(ports.held, f)
		for i := range blockSize {
			ports.left = append(ports.left, lowestPort+block*blockSize+i)
		}
		return nil
	}
	return fmt.Errorf("each block of ports is in use by some test: %s", dir)
}
