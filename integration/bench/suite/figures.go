// Figures: the lines that benchmarks print, and the middle of what several runs say.

package main

import (
	"bufio"
	"io"
	"strconv"
	"strings"

	"merlon.dev/integration/measure"
)

// figures are what was measured: benchmark → unit → one value for each run.
type figures map[string]map[string][]float64

// read takes in what a run has printed.
func (f figures) read(output io.Reader) error {
	lines := bufio.NewScanner(output)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		f.line(lines.Text())
	}
	return lines.Err()
}

// line takes in one line, if it is a benchmark's: its name, how often it ran, and
// pairs of a value and a unit.
func (f figures) line(text string) {
	fields := strings.Fields(text)
	if len(fields) < 4 || len(fields)%2 != 0 {
		return
	}
	name, ok := strings.CutPrefix(fields[0], "Benchmark")
	if _, err := strconv.ParseUint(fields[1], 10, 64); !ok || err != nil {
		return
	}
	name = withoutProcessors(name)
	units := make(map[string]float64)
	for i := 2; i < len(fields); i += 2 {
		value, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return
		}
		units[fields[i+1]] = value
	}
	if f[name] == nil {
		f[name] = make(map[string][]float64)
	}
	for unit, value := range units {
		f[name][unit] = append(f[name][unit], value)
	}
}

// withoutProcessors takes GOMAXPROCS from the name, which Go's benchmarks end in.
func withoutProcessors(name string) string {
	if i := strings.LastIndexByte(name, '-'); i > 0 {
		if _, err := strconv.ParseUint(name[i+1:], 10, 32); err == nil {
			return name[:i]
		}
	}
	return name
}

// of is the figure of a target; false: it was not measured.
func (f figures) of(t target) (float64, bool) {
	values, over := f[t.bench][t.unit], f[t.bench][t.over]
	if len(values) == 0 || t.over != "" && len(over) != len(values) {
		return 0, false
	}
	all := make([]float64, len(values))
	for i, v := range values {
		if all[i] = v * t.factor(); t.over != "" {
			all[i] /= over[i]
		}
	}
	return measure.Median(all), true
}

// sides are what the two figures of a ratio are, in the middle of the runs: it says
// more with them beside it.
func (f figures) sides(t target) string {
	if t.over == "" {
		return ""
	}
	_, unit, _ := strings.Cut(t.unit[strings.LastIndexByte(t.unit, '-'):], "-")
	return " (" + short(measure.Median(f[t.bench][t.unit])) + " : " + short(measure.Median(f[t.bench][t.over])) + " " + unit + ")"
}

func (t target) factor() float64 {
	if t.scale == 0 {
		return 1
	}
	return t.scale
}
