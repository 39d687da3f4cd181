package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"merlon.dev/integration/measure"
)

// The table has P1 to P14, but for those that nothing here measures.
func TestEveryTargetIsInTheTable(t *testing.T) {
	var want []string
	for i := range 14 {
		want = append(want, "P"+strconv.Itoa(i+1))
	}
	if got := names(); !slices.Equal(got, want) {
		t.Errorf("the table has %v; want %v", got, want)
	}
}

// What a line of the table runs is there: the function of that name, in that package.
func TestSourcesExist(t *testing.T) {
	for _, s := range wanted(nil) {
		pattern := s.bench + s.test
		var all strings.Builder
		files, err := filepath.Glob(filepath.Join("..", "..", "..", s.pkg, "*_test.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s has no tests: %v", s.pkg, err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			all.Write(text)
		}
		function, _, _ := strings.Cut(pattern, "/")
		matcher := regexp.MustCompile(function)
		found := false
		for _, m := range regexp.MustCompile(`(?m)^func ((?:Test|Benchmark)\w*)\(`).FindAllStringSubmatch(all.String(), -1) {
			found = found || matcher.MatchString(m[1])
		}
		if !found {
			t.Errorf("%s has no %s", s.pkg, pattern)
		}
	}
}

func TestTargetsAreWhole(t *testing.T) {
	for _, target := range targets {
		if target.what == "" || target.bench == "" || target.unit == "" || target.source.pkg == "" || target.source.bench == "" == (target.source.test == "") {
			t.Errorf("%s %q lacks something", target.p, target.what)
		}
		if target.least != 0 && target.most != 0 {
			t.Errorf("%s %q has two bounds", target.p, target.what)
		}
	}
}

func TestFiguresOfABenchmark(t *testing.T) {
	f := figures{}
	err := f.read(strings.NewReader(`goos: linux
BenchmarkSign-2   	      20	        96.53 ca-cpu-µs	         0.7512 ca-ratio
BenchmarkSign-2   	      20	        90 ca-cpu-µs	         0.8 ca-ratio
BenchmarkTxn/writes-per-entry-64 	 1	 5 txn/s
    x_test.go:1: Benchmark of 3 things
BenchmarkBroken 1 a b
Benchmark 1 2
PASS
`))
	if err != nil {
		t.Fatal(err)
	}
	if got := f["Sign"]["ca-ratio"]; !slices.Equal(got, []float64{0.7512, 0.8}) {
		t.Errorf("Sign has %v", got)
	}
	if got := f["Txn/writes-per-entry"]["txn/s"]; !slices.Equal(got, []float64{5}) {
		t.Errorf("Txn has %v", got)
	}
	if len(f) != 2 {
		t.Errorf("figures of %d benchmarks; want 2: %v", len(f), f)
	}
}

// What is printed as a benchmark is read again as it was.
func TestFiguresReadWhatMeasurePrints(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringMatching(`[A-Z][a-z]{0,5}(/[a-z]+=[0-9]{1,4})?`).Draw(t, "name")
		want := rapid.MapOf(rapid.StringMatching(`[a-z%µ]{1,5}(/op)?`), rapid.Map(rapid.IntRange(0, 99999), func(n int) float64 { return float64(n) / 8 })).Draw(t, "figures")
		var line strings.Builder
		measure.Fprint(&line, name, want)
		f := figures{}
		if err := f.read(strings.NewReader(line.String())); err != nil {
			t.Fatal(err)
		}
		for unit, value := range want {
			got := f[name][unit]
			if len(got) != 1 || got[0]-value > 1e-5*value || value-got[0] > 1e-5*value {
				t.Fatalf("%q gives %v for %s; want %g", line.String(), got, unit, value)
			}
		}
	})
}

func FuzzFigures(f *testing.F) {
	f.Add("BenchmarkSign-2 20 96.53 ca-cpu-µs 0.75 ca-ratio")
	f.Add("Benchmark 1 NaN x")
	f.Fuzz(func(t *testing.T, text string) {
		found := figures{}
		found.line(text)
		for name, units := range found {
			if len(units) == 0 {
				t.Errorf("%q: %q has no figures", text, name)
			}
		}
	})
}

func TestJudgement(t *testing.T) {
	ratio := target{p: "P1", bench: "A", unit: "a", over: "b", shown: "×", most: 1.2}
	rate := target{p: "P2", bench: "A", unit: "c", scale: 1e-3, least: 4}
	none := target{p: "P3", bench: "A", unit: "zero", most: 0}
	found := figures{"A": {"a": {10, 30, 22}, "b": {10, 20, 20}, "c": {3000, 5000}, "zero": {0, 1, 1}}}
	for _, test := range []struct {
		target target
		value  float64
		bound  string
		met    string
	}{
		{ratio, 1.1, "≤ 1.2 ×", "yes"},
		{rate, 4, "≥ 4", "yes"},
		{none, 1, "≤ 0", "**no**"},
	} {
		v, ok := found.of(test.target)
		if !ok || v < test.value-1e-9 || v > test.value+1e-9 {
			t.Errorf("%s is %g, %t; want %g", test.target.p, v, ok, test.value)
		}
		if got := test.target.met(v); got != test.met || test.target.bound() != test.bound {
			t.Errorf("%s: %s for %s; want %s for %s", test.target.p, got, test.target.bound(), test.met, test.bound)
		}
		if (test.target.share(v) > 1) != (test.met != "yes" && v > 1) && test.target.p != "P3" {
			t.Errorf("%s uses %g of its target, and is met: %s", test.target.p, test.target.share(v), test.met)
		}
	}
	for _, missing := range []target{{bench: "B", unit: "a"}, {bench: "A", unit: "d"}, {bench: "A", unit: "a", over: "c"}} {
		if v, ok := found.of(missing); ok {
			t.Errorf("%+v gives %g; want nothing", missing, v)
		}
	}
}

// A target without a figure is in the table, with the reason.
func TestWhatWasNotMeasuredSaysWhy(t *testing.T) {
	t.Setenv("MERLON_BENCH_OPA_ENVOY", "")
	r := results{Count: 1}
	r.judge(figures{}, map[string]string{sign.key(): "it broke"}, map[string]bool{"P1": true, "P6": true})
	table := r.table()
	for _, want := range []string{"the run failed", "MERLON_BENCH_OPA_ENVOY is not set", "has no cpu-ns/op"} {
		if !strings.Contains(table, want) {
			t.Errorf("the table lacks %q:\n%s", want, table)
		}
	}
	dir := t.TempDir()
	if err := r.write(dir, figures{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"results.json", "results.md", "targets.svg"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUnknownTargetsAreRefused(t *testing.T) {
	for args, want := range map[string]string{"-only P99": "P99", "-count 0": "-count 0", "stray": "stray"} {
		if err := run(t.Context(), strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("suite %s: %v; want it to name %s", args, err, want)
		}
	}
}
