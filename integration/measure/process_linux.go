// What the kernel says of other processes.

package measure

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// CPUOf is what a process has used, all threads.
func CPUOf(tb testing.TB, pid int) time.Duration {
	tb.Helper()
	const scheduled = 2 // of the whole process, by the scheduler (clock_getcpuclockid(3))
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|scheduled), &ts); err != nil {
		tb.Fatalf("read the CPU clock of process %d: %v", pid, err)
	}
	return time.Duration(ts.Nano())
}

// MemoryOf is the resident memory of a process in bytes, now and at most so far.
func MemoryOf(tb testing.TB, pid int) (now, peak int64) {
	tb.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		tb.Fatalf("read the memory of process %d: %v", pid, err)
	}
	for line := range strings.Lines(string(content)) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[0] != "VmRSS:" && fields[0] != "VmHWM:" {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			tb.Fatalf("read the memory of process %d: %q: %v", pid, line, err)
		}
		if fields[0] == "VmRSS:" {
			now = kib << 10
		} else {
			peak = kib << 10
		}
	}
	if now == 0 {
		tb.Fatalf("process %d has no memory: it has ended", pid)
	}
	return now, peak
}
