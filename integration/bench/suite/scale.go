// The fleet: make scale has a folder for its results, and its figures are taken from
// there, whether it has run just now or some time ago.

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"merlon.dev/integration/measure"
)

// The sizes for which P3 and P4 are promised, and the smallest that make scale measures.
const (
	entries, agents       = 1_000_000, 10_000
	fewEntries, fewAgents = entries / 100, agents / 100
)

// scaled are the results of make scale, as far as the targets ask for them.
type scaled struct {
	Machine measure.Machine `json:"machine"`
	Cells   []scaledCell    `json:"cells"`
	Cut     scaledCost      `json:"herd_after_cut"`
	Killed  scaledCost      `json:"herd_after_kill"`
}

type scaledCost struct {
	N       float64 `json:"n"`
	Seconds float64 `json:"seconds"`
	CPU     float64 `json:"ca_cpu_seconds"`
}

type scaledCell struct {
	Entries     int        `json:"entries"`
	Agents      int        `json:"agents"`
	Start       scaledCost `json:"cold_start"`
	Change      scaledCost `json:"change"`
	IdlePercent float64    `json:"idle_percent_of_core"`
	IdleRSSMiB  float64    `json:"idle_rss_mib"`
}

// readScaled takes in what make scale has left in the repository, and says when and
// where that was.
func (f figures) readScaled(root string) (earlier string, err error) {
	path := filepath.Join(root, "integration", "scale", "results", "results.json")
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	var s scaled
	if err := json.Unmarshal(text, &s); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	all, err := s.figures()
	if err != nil {
		return "", fmt.Errorf("%s: %w: make scale measures it", path, err)
	}
	f["Fleet"] = all
	return fmt.Sprintf("make scale on %s at commit %s", s.Machine.At.Format("2 January 2006"), s.Machine.Commit), nil
}

func (s scaled) figures() (map[string][]float64, error) {
	full, err1 := s.at(entries, agents)
	lonely, err2 := s.at(entries, fewAgents)
	fewer, err3 := s.at(fewEntries, agents)
	least, err4 := s.at(fewEntries, fewAgents)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return nil, err
	}
	const kBPerMiB = (1 << 20) / 1000.0
	all := make(map[string][]float64)
	for unit, v := range map[string]float64{
		"idle-%core":           full.IdlePercent,
		"idle-MiB":             full.IdleRSSMiB,
		"entry-kB":             (lonely.IdleRSSMiB - least.IdleRSSMiB) * kBPerMiB / (entries - fewEntries),
		"agent-kB":             (full.IdleRSSMiB - lonely.IdleRSSMiB) * kBPerMiB / (agents - fewAgents),
		"start-s":              full.Start.Seconds,
		"change-cpu-µs":        1e6 * full.Change.CPU / full.Change.N,
		"change-of-few-cpu-µs": 1e6 * fewer.Change.CPU / fewer.Change.N,
		"cut-synced-s":         s.Cut.Seconds,
		"killed-synced-s":      s.Killed.Seconds,
	} {
		if v > 0 { // it did not come to it otherwise
			all[unit] = []float64{v}
		}
	}
	return all, nil
}

func (s scaled) at(entries, agents int) (scaledCell, error) {
	for _, c := range s.Cells {
		if c.Entries == entries && c.Agents == agents {
			return c, nil
		}
	}
	return scaledCell{}, fmt.Errorf("nothing is known of %d entries with %d agents", entries, agents)
}
