package main

import (
	"errors"
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
	for _, s := range wanted(everything()) {
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

// everything asks for each target by name.
func everything() map[string]bool {
	all := make(map[string]bool)
	for _, p := range names() {
		all[p] = true
	}
	return all
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
	t.Setenv("MERLON_BENCH_SPIRE_SERVER", "/bin/spire-server")
	t.Setenv("MERLON_BENCH_SPIRE_AGENT", "")
	r := results{Count: 1}
	r.judge(figures{}, map[string]string{sign.key(): "it broke"}, "", map[string]bool{"P1": true, "P6": true})
	table := r.table()
	for _, want := range []string{"failed: it broke", "not measured: MERLON_BENCH_OPA_ENVOY is not set", "not measured: MERLON_BENCH_SPIRE_AGENT is not set", "has no cpu-ns/op"} {
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

// A whole run's table takes the place of the one before in the README, and nothing else
// changes there.
func TestWholeRunsArePublished(t *testing.T) {
	r := results{Count: 1, Lines: []line{{P: "P2", What: "late", Target: "≤ 1 ms", Met: "**no**", Profile: "profiles/P2.txt"}}}
	readme := filepath.Join(t.TempDir(), "README.md")
	write := func(text string) {
		if err := os.WriteFile(readme, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("above\n" + beginTable + "old\n" + endTable + "below\n")
	for range 2 {
		if err := r.publish(readme); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	got := string(text)
	if !strings.HasPrefix(got, "above\n"+beginTable) || !strings.HasSuffix(got, endTable+"below\n") || strings.Contains(got, "old") {
		t.Errorf("the README is\n%s", got)
	}
	if strings.Count(got, "([why](results/profiles/P2.txt))") != 1 {
		t.Errorf("the link to the profile is not one from the README:\n%s", got)
	}
	write("no marks\n")
	if err := r.publish(readme); err == nil {
		t.Error("a README without a place for the table is taken")
	}
	root := t.TempDir()
	out := filepath.Join(root, "integration", "bench", "results")
	for name, o := range map[string]options{"some targets": {root: root, out: out, only: map[string]bool{"P1": true}}, "another folder": {root: root, out: root}} {
		if readmeOf(o) != "" {
			t.Errorf("%s: published", name)
		}
	}
	if readmeOf(options{root: root, out: out}) == "" {
		t.Error("a whole run is not published")
	}
}

// What fails once is in the table with what was measured before, and why it failed.
func TestFailuresAreInTheTable(t *testing.T) {
	found := figures{"Sign": {"ca-ratio": {0.7, 0.9}}}
	r := results{Count: 3}
	r.judge(found, map[string]string{sign.key(): "bench_test.go:1: no connection"}, "", map[string]bool{"P1": true})
	if want := "yes; a run failed: bench_test.go:1: no connection"; r.Lines[0].Met != want || *r.Lines[0].Measured != 0.8 {
		t.Errorf("%g is met: %q; want 0.8, %q", *r.Lines[0].Measured, r.Lines[0].Met, want)
	}
}

func TestReasonIsWhatTheTestSays(t *testing.T) {
	err := errors.New("exit status 1")
	for name, test := range map[string]struct{ out, want string }{
		"fatal":        {"goos: linux\n--- FAIL: BenchmarkA\n    a_test.go:7: no | connection\n    more\nFAIL\n", "a_test.go:7: no / connection"},
		"inner":        {"--- FAIL: BenchmarkA\n    --- FAIL: BenchmarkA/b\n        a_test.go:8: late\nFAIL\n", "a_test.go:8: late"},
		"inner alone":  {"BenchmarkA/b\n--- FAIL: BenchmarkA/b\n    a_test.go:9: gone\n--- FAIL: BenchmarkA\nFAIL\n", "a_test.go:9: gone"},
		"panic":        {"panic: nil map\n\ngoroutine 1", "panic: nil map"},
		"not compiled": {"# merlon.dev/x\n./x_test.go:3:1: undefined: y\nFAIL\n", "./x_test.go:3:1: undefined: y"},
		"log":          {"    a_test.go:1: only a log line\n", "exit status 1"},
		"silent":       {"", "exit status 1"},
	} {
		if got := reason([]byte(test.out), err); got != test.want {
			t.Errorf("%s: %q; want %q", name, got, test.want)
		}
	}
}

// One run that fails keeps nothing else from being measured, and is an error at the end;
// a target that is missed has a profile.
func TestOneFailureEndsNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles a module")
	}
	root := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":         "module broken.test\n\ngo 1.26\n",
		"ca/ca_test.go":  "package ca\n\nimport \"testing\"\n\nfunc BenchmarkSign(b *testing.B) { b.Fatal(\"no CA\") }\n",
		"sdk/s_test.go":  "package sdk\n\nimport (\n\t\"fmt\"\n\t\"testing\"\n)\n\nfunc TestTheSDKAddsLittleToAProgram(*testing.T) { fmt.Println(\"BenchmarkProgramSize 1 4e6 more-bytes\") }\n",
		"out/README.txt": "",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(root, "out")
	err := run(t.Context(), []string{"-C", root, "-out", out, "-count", "2", "-only", "P1,P11"})
	if err == nil || !strings.Contains(err.Error(), "1 of the runs failed") {
		t.Errorf("the suite ends with %v; want it to say that one run failed", err)
	}
	table, err := os.ReadFile(filepath.Join(out, "results.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| P1 |", "failed: ca_test.go:5: no CA |", "| P11 |", "| 4 MB | **no** ([why](profiles/P11.txt)) |"} {
		if !strings.Contains(string(table), want) {
			t.Errorf("the table lacks %q:\n%s", want, table)
		}
	}
	profile, err := os.ReadFile(filepath.Join(out, "profiles", "P11.txt"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"P11: ", "-- CPU\n", "Type: cpu", "Type: alloc_objects", "Type: inuse_space"} {
		if !strings.Contains(string(profile), want) {
			t.Errorf("the profile of the missed target lacks %q:\n%s", want, profile)
		}
	}
}

// What make scale left in the repository has all that P3 and P4 ask for.
func TestScaledFigures(t *testing.T) {
	root := filepath.Join("..", "..", "..")
	found := figures{}
	earlier, err := found.readScaled(root)
	if err != nil {
		t.Fatal(err)
	}
	r := results{Count: 1}
	r.judge(found, nil, earlier, map[string]bool{"P3": true, "P4": true})
	for i, l := range r.Lines {
		if r.targets[i].source.fleet && (l.Measured == nil || l.From != earlier) {
			t.Errorf("%s %s: %s, from %q; want a figure from %q", l.P, l.What, l.Met, l.From, earlier)
		}
	}
	if !regexp.MustCompile(`^make scale on \d+ \w+ \d{4} at commit [0-9a-f]+`).MatchString(earlier) {
		t.Errorf("it says %q; want date and commit", earlier)
	}
	if !slices.ContainsFunc(wanted(map[string]bool{"P3": true}), func(s source) bool { return s.fleet }) {
		t.Error("P3 is not run where it is asked for")
	}
	for _, s := range wanted(nil) {
		if s.fleet {
			t.Error("make scale is run without being asked for")
		}
	}
}

func TestScaledFiguresOfASmallerFleetAreRefused(t *testing.T) {
	s := scaled{Cells: []scaledCell{{Entries: entries, Agents: agents}, {Entries: entries, Agents: fewAgents}, {Entries: fewEntries, Agents: agents}}}
	if _, err := s.figures(); err == nil || !strings.Contains(err.Error(), "10000 entries with 100 agents") {
		t.Errorf("figures: %v; want it to name what is missing", err)
	}
	s.Cells = append(s.Cells, scaledCell{Entries: fewEntries, Agents: fewAgents, IdleRSSMiB: 1000})
	s.Cells[1].IdleRSSMiB = 2980.8 // 990 000 entries at 2 kB and a bit
	all, err := s.figures()
	if err != nil || len(all["entry-kB"]) != 1 || all["entry-kB"][0] < 2.09 || all["entry-kB"][0] > 2.1 {
		t.Errorf("figures: %v, %v; want entries of 2.1 kB", all, err)
	}
	if _, ok := all["start-s"]; ok {
		t.Error("a start that was not measured is 0 s")
	}
}

// What nothing was promised of is in the table, and neither met nor missed.
func TestOpenFiguresAreNotJudged(t *testing.T) {
	open := target{p: "P9", bench: "A", unit: "own-µs", over: "nginx-own-µs", shown: "×", open: true}
	found := figures{"A": {"own-µs": {30, 20}, "nginx-own-µs": {10, 10}}}
	if v, ok := found.of(open); !ok || v != 2.5 || open.met(v) != "–" || open.bound() != "–" {
		t.Errorf("%g, %t, %s of %s; want 2.5, and no judgement", v, ok, open.met(v), open.bound())
	}
	if got := found.sides(open); got != " (25 : 10 µs)" {
		t.Errorf("its sides are %q", got)
	}
}

func TestUnknownTargetsAreRefused(t *testing.T) {
	for args, want := range map[string]string{"-only P99": "P99", "-profile P98": "P98", "-count 0": "-count 0", "stray": "stray"} {
		if err := run(t.Context(), strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("suite %s: %v; want it to name %s", args, err, want)
		}
	}
}
