package measure_test

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/measure"
)

func TestQuantile(t *testing.T) {
	for _, test := range []struct {
		values  []float64
		q, want float64
	}{
		{[]float64{3}, 0.5, 3},
		{[]float64{3, 1, 2}, 0.5, 2},
		{[]float64{4, 1, 2, 3}, 0.5, 2.5},
		{[]float64{4, 1, 2, 3}, 0, 1},
		{[]float64{4, 1, 2, 3}, 1, 4},
	} {
		if got := measure.Quantile(test.values, test.q); got != test.want {
			t.Errorf("Quantile(%v, %g) = %g; want %g", test.values, test.q, got, test.want)
		}
	}
}

// spin works until this process has used so much CPU.
func spin(d time.Duration) {
	for until := measure.CPU() + d; measure.CPU() < until; {
	}
}

func TestInterleavedTellsVariantsApart(t *testing.T) {
	result := testing.Benchmark(func(b *testing.B) {
		measure.Interleaved(b, 2,
			measure.Variant{Name: "one", Run: func() error { spin(time.Millisecond); return nil }, Processes: []int{os.Getpid()}},
			measure.Variant{Name: "ten", Run: func() error { spin(10 * time.Millisecond); return nil }, Ops: 2, Processes: []int{os.Getpid()}},
		)
	})
	one, ten, own, ratio := result.Extra["one-cpu-µs"], result.Extra["ten-cpu-µs"], result.Extra["ten-own-µs"], result.Extra["ten-ratio"]
	if one < 1000 || own < 5000 || ten < own+5000 {
		t.Errorf("one %g µs, ten %g µs of which %g µs of its own; want at least 1000, 10 000 and 5000: its own process is counted beside this one", one, ten, own)
	}
	if ownRatio := result.Extra["ten-own-ratio"]; ratio < 1 || ownRatio < 1 {
		t.Errorf("ratio %g, and %g of the own processes; want ten to cost more than one", ratio, ownRatio)
	}
}

func TestInterleavedFailsWithItsVariant(t *testing.T) {
	ran := 0
	result := testing.Benchmark(func(b *testing.B) {
		measure.Interleaved(b, 1, measure.Variant{Name: "broken", Run: func() error { ran++; return errors.New("broken") }})
	})
	if result.N != 0 || ran != 1 {
		t.Errorf("%d rounds after %d runs; want it to end with the first", result.N, ran)
	}
}

func TestProcessesByThePID(t *testing.T) {
	spin(time.Millisecond)
	if used := measure.CPUOf(t, os.Getpid()); used < time.Millisecond {
		t.Errorf("CPUOf this process = %v; want a millisecond at least", used)
	}
	if now, peak := measure.MemoryOf(t, os.Getpid()); now < 1<<20 || peak < now {
		t.Errorf("MemoryOf this process = %d, %d; want a megabyte at least", now, peak)
	}
}

func TestProcessThatIsNoneFails(t *testing.T) {
	const nobody = 1 << 22 // above every pid_max
	for what, ask := range map[string]func(testing.TB){
		"CPUOf":    func(tb testing.TB) { measure.CPUOf(tb, nobody) },
		"MemoryOf": func(tb testing.TB) { measure.MemoryOf(tb, nobody) },
	} {
		answered := false
		testing.Benchmark(func(b *testing.B) { ask(b); answered = true })
		if answered {
			t.Errorf("%s a process that is none gave an answer", what)
		}
	}
}

func TestFprintIsALineOfABenchmark(t *testing.T) {
	var out strings.Builder
	measure.Fprint(&out, "Cutoff/streams=10", map[string]float64{"p99-ms": 161.5, "cpu-s": 0.1})
	if want := "BenchmarkCutoff/streams=10 1 0.1 cpu-s 161.5 p99-ms\n"; out.String() != want {
		t.Errorf("printed %q; want %q", out.String(), want)
	}
}

func TestHereNamesTheCommit(t *testing.T) {
	m := measure.Here(".")
	if m.Cores < 1 || m.Kernel == "unknown" || m.Load == "unknown" || m.Commit == "" {
		t.Errorf("Here = %+v; want cores, kernel, load and commit", m)
	}
	if text := m.String(); !strings.Contains(text, m.Commit) || !strings.Contains(text, "load "+m.Load) {
		t.Errorf("%q names no commit or load", text)
	}
	if m := measure.Here(t.TempDir()); m.Commit != "unknown" {
		t.Errorf("the commit of a folder outside git is %q; want unknown", m.Commit)
	}
}
