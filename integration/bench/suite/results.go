// Results: of each target what was measured and whether it is met, as a table, JSON,
// and a plot.

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"merlon.dev/integration/measure"
)

// results are those of one run of the suite.
type results struct {
	Machine measure.Machine `json:"machine"`
	Count   int             `json:"rounds"`
	Lines   []line          `json:"targets"`
	targets []target        // of the lines
}

// line is one target.
type line struct {
	P        string   `json:"p"`
	What     string   `json:"what"`
	Target   string   `json:"target"`
	Measured *float64 `json:"measured"` // null: not measured
	Unit     string   `json:"unit"`
	// Sides are the two figures of a ratio.
	Sides string `json:"sides,omitempty"`
	// From says which earlier run has measured it, if it was not this one.
	From string `json:"from,omitempty"`
	// Met is yes, no, or why it is not known; – where nothing was promised.
	Met string `json:"met"`
	// Profile says why a target is missed: a file, from the folder of the results.
	Profile string `json:"profile,omitempty"`
	// share is how much of what the target allows was used; above 1 it is missed.
	share float64
}

// judge makes the lines of the targets that were asked for: what failed says why its
// source gave no figures, and earlier where those of make scale are from.
func (r *results) judge(found figures, failed map[string]string, earlier string, only map[string]bool) {
	for _, t := range targets {
		if !t.asked(only) {
			continue
		}
		l := line{P: t.p, What: t.what, Target: t.bound(), Unit: t.shown}
		if v, ok := found.of(t); ok {
			l.Measured, l.Sides, l.Met, l.share = &v, found.sides(t), t.met(v), t.share(v)
			if why := failed[t.source.key()]; why != "" {
				l.Met += "; a run failed: " + why
			}
		} else {
			l.Met = t.unmeasured(failed[t.source.key()])
		}
		if t.source.fleet {
			l.From = earlier
		}
		r.Lines, r.targets = append(r.Lines, l), append(r.targets, t)
	}
}

func (t target) bound() string {
	if t.open {
		return "–"
	}
	text := "≤ " + short(t.most)
	if t.least > 0 {
		text = "≥ " + short(t.least)
	}
	if t.shown != "" {
		text += " " + t.shown
	}
	if t.stretch {
		text += " (stretch)"
	}
	return text
}

const missedMark = "**no**"

func (t target) met(v float64) string {
	if t.open {
		return "–"
	}
	if t.least > 0 && v < t.least || t.least == 0 && v > t.most {
		return missedMark
	}
	return "yes"
}

func (t target) share(v float64) float64 {
	switch {
	case t.least > 0 && v > 0:
		return t.least / v
	case t.most > 0:
		return v / t.most
	default: // nothing is allowed
		return v
	}
}

// unmeasured says why there is no figure.
func (t target) unmeasured(failure string) string {
	if failure != "" {
		return "failed: " + failure
	}
	for _, name := range append([]string{t.peer}, t.source.peers...) {
		if name != "" && os.Getenv(name) == "" {
			return "not measured: " + name + " is not set"
		}
	}
	return "not known: " + t.bench + " has no " + t.unit
}

// short has three digits that count.
func short(v float64) string {
	if v >= 1000 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}

// table is Markdown.
func (r *results) table() string {
	var s strings.Builder
	fmt.Fprintf(&s, "Measured %v; medians of %d rounds.\n\n| P | what | target | measured | met |\n|---|---|---|---|---|\n", r.Machine, r.Count)
	for _, l := range r.Lines {
		measured := "–"
		if l.Measured != nil {
			measured = strings.TrimSpace(short(*l.Measured)+" "+l.Unit) + l.Sides
		}
		if l.From != "" {
			measured += ", by " + l.From
		}
		met := l.Met
		if l.Profile != "" {
			met += " ([why](" + l.Profile + "))"
		}
		fmt.Fprintf(&s, "| %s | %s | %s | %s | %s |\n", l.P, l.What, l.Target, measured, met)
	}
	return s.String()
}

// write puts the results into a folder.
func (r *results) write(dir string, found figures) error {
	text, err := json.MarshalIndent(struct {
		*results
		Figures figures `json:"figures"`
	}{r, found}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "results.json"), append(text, '\n'), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "results.md"), []byte(r.table()), 0o644); err != nil {
		return err
	}
	svg, err := os.Create(filepath.Join(dir, "targets.svg"))
	if err != nil {
		return err
	}
	if err := r.bars().SVG(svg); err != nil {
		svg.Close()
		return err
	}
	return svg.Close()
}

// bars shows of each target how much of it is used.
func (r *results) bars() measure.Bars {
	bars := measure.Bars{Title: "Measured, as a share of what the target allows", Limit: 1}
	for _, l := range r.Lines {
		if l.Measured != nil && l.Target != (target{open: true}).bound() {
			bars.Bars = append(bars.Bars, measure.Bar{Name: l.P + " " + l.What, Value: l.share})
		}
	}
	return bars
}
