// The results: JSON for programs, a table and plots for readers.

package scale_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"merlon.dev/integration/measure"
)

// results is everything that was measured.
type results struct {
	Machine measure.Machine `json:"machine"`
	Sizes   sizes           `json:"sizes"`
	// Attest is nodes that prove themselves by join tokens, Fill entries that are
	// registered by the admin API.
	Attest   cost     `json:"attest"`
	Fill     cost     `json:"fill"`
	Cells    []cell   `json:"cells"`
	Cut      herd     `json:"herd_after_cut"`
	Killed   herd     `json:"herd_after_kill"`
	Storm    storm    `json:"revocation_storm"`
	Rotation rotation `json:"root_rotation"`
}

// write puts everything into the folder for results.
func (r *results) write(t *testing.T) {
	t.Helper()
	if err := os.MkdirAll(r.Sizes.Out, 0o755); err != nil {
		t.Fatal(err)
	}
	file := func(name string, content []byte) {
		if err := os.WriteFile(filepath.Join(r.Sizes.Out, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	file("results.json", append(text, '\n'))
	file("results.md", []byte(r.table()))
	for name, plot := range r.plots() {
		var svg bytes.Buffer
		if err := plot.SVG(&svg); err != nil {
			t.Fatal(err)
		}
		file(name+".svg", svg.Bytes())
	}
}

// print says the figures in the form of benchmarks.
func (r *results) print() {
	for _, c := range r.Cells {
		measure.Print(fmt.Sprintf("Scale/entries=%d/agents=%d", c.Entries, c.Agents), map[string]float64{
			"start-s": c.Start.Seconds, "idle-%core": c.IdlePercent, "idle-MiB": c.IdleRSSMiB, "change-cpu-µs": c.Change.each(), "change-p50-ms": c.ChangeP50,
		})
	}
	for name, h := range map[string]herd{"cut": r.Cut, "killed": r.Killed} {
		measure.Print("ScaleHerd/"+name, map[string]float64{"synced-s": h.Seconds, "cpu-s": h.CPU, "attempts": float64(h.Attempts)})
	}
	measure.Print("ScaleStorm", map[string]float64{"heard-s": r.Storm.Heard, "ended-s": r.Storm.Ended, "cpu-s": r.Storm.CPU})
	measure.Print("ScaleRotation", map[string]float64{"activated-s": r.Rotation.Activated, "renewed-s": r.Rotation.Renewed, "cpu-s": r.Rotation.CPU})
}

// table is Markdown.
func (r *results) table() string {
	var s strings.Builder
	fmt.Fprintf(&s, "Measured %v.\n\n", r.Machine)
	s.WriteString("| entries | agents | start to serving | its CPU | all agents with empty caches | CPU of the CA for each | at rest | memory | to / from one agent at rest | one change: CPU | p50 / p99 | agents told |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, c := range r.Cells {
		fmt.Fprintf(&s, "| %d | %d | %.2f s | %.2f s | %.1f s | %.0f µs | %.2f %% of a core | %.0f MiB | %.0f / %.0f B/s | %.0f µs | %.1f / %.1f ms | %d of %d changes |\n",
			c.Entries, c.Agents, c.Start.Seconds, c.Start.CPU, c.Listing.Seconds, c.Listing.each(), c.IdlePercent, c.IdleRSSMiB, c.IdleDown, c.IdleUp,
			c.Change.each(), c.ChangeP50, c.ChangeP99, c.Told, c.Change.N)
	}
	fmt.Fprintf(&s, "\n| what | n | time | CPU of the CA | for each | memory then |\n|---|--:|--:|--:|--:|--:|\n")
	row := func(what string, c cost) {
		fmt.Fprintf(&s, "| %s | %d | %.1f s | %.1f s | %.0f µs | %.0f MiB |\n", what, c.N, c.Seconds, c.CPU, c.each(), c.RSSMiB)
	}
	row("nodes attested by join tokens", r.Attest)
	row("entries registered by the admin API", r.Fill)
	row(fmt.Sprintf("all streams cut → all in sync (%d attempts; %.0f B down, %.0f B up for each)", r.Cut.Attempts, r.Cut.Down, r.Cut.Up), r.Cut.cost)
	row(fmt.Sprintf("CA killed → all in sync (ready after %.1f s; %d attempts)", r.Killed.Ready, r.Killed.Attempts), r.Killed.cost)
	row(fmt.Sprintf("%d agents banned and %d SVIDs revoked → known to all (calls %.1f s, the banned cut off after %.1f s, all others know after %.1f s; %.0f B to each)",
		r.Storm.Banned, r.Storm.Revoked, r.Storm.Calls, r.Storm.Ended, r.Storm.Heard, r.Storm.Down), r.Storm.cost)
	row(fmt.Sprintf("root replaced (acknowledged by all after %.1f s, signs after %.1f s, of the old one nothing left %.1f s after it was tainted)",
		r.Rotation.Published, r.Rotation.Activated, r.Rotation.Renewed), r.Rotation.cost)
	row("of that, every agent's own SVID replaced, with a new connection", r.Rotation.Renewals)
	return s.String()
}

// plots are curves over entries, a line for each number of agents; and over time.
func (r *results) plots() map[string]measure.Plot {
	over := func(title, y string, limit float64, of func(cell) float64) measure.Plot {
		p := measure.Plot{Title: title, X: "registration entries", Y: y, LogX: true, Limit: limit}
		at := map[int]int{}
		for _, c := range r.Cells {
			i, ok := at[c.Agents]
			if !ok {
				i = len(p.Curves)
				at[c.Agents], p.Curves = i, append(p.Curves, measure.Curve{Name: fmt.Sprintf("%d agents", c.Agents)})
			}
			p.Curves[i].Points = append(p.Curves[i].Points, [2]float64{float64(c.Entries), of(c)})
		}
		return p
	}
	return map[string]measure.Plot{
		"memory": over("Memory of the CA at rest", "MiB resident", 2560, func(c cell) float64 { return c.IdleRSSMiB }),
		"idle":   over("CPU of the CA at rest", "% of a core", 2, func(c cell) float64 { return c.IdlePercent }),
		"change": over("One entry more, for one agent", "µs of CPU in the CA", 0, func(c cell) float64 { return c.Change.each() }),
		"start":  over("Start to serving", "s", 5, func(c cell) float64 { return c.Start.Seconds }),
		"herd": {
			Title: fmt.Sprintf("%d agents come back at once", r.Sizes.Agents), X: "seconds after the cut", Y: "agents in sync",
			Curves: []measure.Curve{{Name: "streams cut", Points: r.Cut.Curve}, {Name: "CA killed", Points: r.Killed.Curve}},
		},
	}
}
