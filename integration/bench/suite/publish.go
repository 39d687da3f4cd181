// The table in README.md: that of the last whole run, put between two marks, so that
// nobody copies it by hand.

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const (
	beginTable = "<!-- what the last whole run of make bench found; it is put here by it -->\n"
	endTable   = "<!-- to here -->\n"
)

// publish puts the table into the README beside the folder of the results.
func (r *results) publish(readme string) error {
	text, err := os.ReadFile(readme)
	if err != nil {
		return err
	}
	before, rest, begun := strings.Cut(string(text), beginTable)
	_, after, ended := strings.Cut(rest, endTable)
	if !begun || !ended {
		return fmt.Errorf("%s has no place for the table: put it between %q and %q", readme, beginTable, endTable)
	}
	links := strings.NewReplacer("](profiles/", "](results/profiles/", "](../../", "](../")
	whole := before + beginTable + links.Replace(r.table()) + endTable + after
	return os.WriteFile(readme, []byte(whole), 0o644)
}

// readmeOf is the README for results in the folder of the repository; empty for another
// folder, whose results are nobody's to publish.
func readmeOf(o options) string {
	if len(o.only) > 0 || filepath.Clean(o.out) != filepath.Join(o.root, "integration", "bench", "results") {
		return ""
	}
	return filepath.Join(o.root, "integration", "bench", "README.md")
}
