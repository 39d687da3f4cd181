// Package measure is how benchmarks and tests say what something costs: CPU by the
// kernel's count, in turn with what it is compared with, since time says little on a
// machine that others use too. Figures leave as lines in the format of Go's
// benchmarks, whoever prints them, so that one reader knows them all (integration/bench).
package measure

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// CPU is what this process has used, all threads, in user and kernel mode.
func CPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(fmt.Sprintf("getrusage: %v", err)) // it takes no argument that could be wrong
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// PerOp reports the CPU that one operation of b takes: defer measure.PerOp(b)(),
// after everything that is not to be counted.
func PerOp(b *testing.B) func() {
	before := CPU()
	return func() { b.ReportMetric(float64(CPU()-before)/float64(b.N), "cpu-ns/op") }
}

// Median is the middle of values, of which there is at least one.
func Median(values []float64) float64 { return Quantile(values, 0.5) }

// Quantile is the value that a share q of values does not exceed; 1 is the highest.
func Quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	if q == 0.5 && len(sorted)%2 == 0 {
		return (sorted[int(at)] + sorted[int(at)+1]) / 2
	}
	return sorted[min(len(sorted)-1, int(at+0.5))]
}

// Print writes the figures of something that is no benchmark as if it were one, to
// the output of the test: what is the name without "Benchmark".
func Print(what string, figures map[string]float64) { Fprint(os.Stdout, what, figures) }

// Fprint is Print to w.
func Fprint(w io.Writer, what string, figures map[string]float64) {
	var line strings.Builder
	fmt.Fprintf(&line, "Benchmark%s 1", what)
	for _, unit := range slices.Sorted(maps.Keys(figures)) {
		fmt.Fprintf(&line, " %.6g %s", figures[unit], unit)
	}
	fmt.Fprintln(w, line.String())
}
