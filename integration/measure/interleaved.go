// Comparisons: the ways to do one thing run in turn, so that what else the machine
// does meets all of them alike.

package measure

import (
	"runtime"
	"slices"
	"testing"
	"time"
)

// Variant is one way to do the same thing.
type Variant struct {
	Name string
	// Run does it Ops times over (0: once).
	Run func() error
	Ops int
	// Processes are those that do it beside this one, by PID.
	Processes []int
}

// Interleaved runs the variants in turn, each times over before the next, for as long
// as the benchmark goes on, and reports for each the median over the rounds of
//
//	NAME-cpu-µs    CPU per operation, of this process and the variant's own
//	NAME-own-µs    of it, the variant's own processes, if it has any
//	NAME-own-ratio likewise to those of the first variant, if that has any, too
//	NAME-ratio     the first divided by that of the first variant in the same round
func Interleaved(b *testing.B, times int, variants ...Variant) {
	b.Helper()
	rounds := make([][]spent, len(variants))
	for i := range variants { // connections, caches, code
		variants[i].round(b, times)
	}
	runtime.GC()
	for n := 0; b.Loop(); n++ {
		for i := range variants {
			at := (i + n) % len(variants) // whoever goes first is another one each time
			rounds[at] = append(rounds[at], variants[at].round(b, times))
		}
	}
	b.ReportMetric(0, "ns/op") // of all of them together, which means nothing
	for i, v := range variants {
		var all, own, ratio, ownRatio []float64
		for n, s := range rounds[i] {
			all, own = append(all, float64(s.all.Nanoseconds())), append(own, float64(s.own.Nanoseconds()))
			first := rounds[0][n]
			ratio = append(ratio, v.per(s.all)/variants[0].per(first.all))
			ownRatio = append(ownRatio, v.per(s.own)/variants[0].per(first.own))
		}
		ops := 1000 * float64(times*max(v.Ops, 1))
		b.ReportMetric(Median(all)/ops, v.Name+"-cpu-µs")
		if len(v.Processes) > 0 {
			b.ReportMetric(Median(own)/ops, v.Name+"-own-µs")
		}
		if i > 0 {
			b.ReportMetric(Median(ratio), v.Name+"-ratio")
		}
		if i > 0 && len(v.Processes) > 0 && len(variants[0].Processes) > 0 {
			b.ReportMetric(Median(ownRatio), v.Name+"-own-ratio")
		}
	}
}

// spent is what one turn of a variant took: of all processes, and of its own.
type spent struct{ all, own time.Duration }

func (v Variant) per(d time.Duration) float64 { return float64(d) / float64(max(v.Ops, 1)) }

func (v Variant) round(b *testing.B, times int) spent {
	b.Helper()
	own := v.processes(b)
	here := CPU()
	for range times {
		if err := v.Run(); err != nil {
			b.Fatalf("%s: %v", v.Name, err)
		}
	}
	here = CPU() - here
	for i, after := range v.processes(b) {
		own[i] = after - own[i]
	}
	var s spent
	for d := range slices.Values(own) {
		s.own += d
	}
	s.all = here + s.own
	return s
}

func (v Variant) processes(b *testing.B) []time.Duration {
	b.Helper()
	used := make([]time.Duration, len(v.Processes))
	for i, pid := range v.Processes {
		used[i] = CPUOf(b, pid)
	}
	return used
}
