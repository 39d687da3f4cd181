package engine

import (
	"syscall"
	"testing"
	"time"
)

// cpu reports the CPU that one operation of b takes, all threads: on a machine
// that others use too, time says little. Use: defer cpu(b)().
func cpu(b *testing.B) func() {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	return func() { b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op") }
}
