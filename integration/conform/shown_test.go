// README.md, Where each requirement is shown: it has each requirement about trust
// bundles, federation and WIT-SVIDs, and the tests that it names are there.

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// shownRows are the rows of the table: what each requirement, or the first to the last of
// some, is shown by.
func shownRows(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(text), "## Where each requirement is shown")
	table, _, ok2 := strings.Cut(table, "\n## ")
	if !ok || !ok2 {
		t.Fatal("README.md has no such part")
	}
	rows := make(map[string][]string)
	for _, m := range regexp.MustCompile(`(?m)^\| ([A-Z]+-?\d+)(?:–([A-Z]+-?)(\d+))? \| .* \| (.*) \|$`).FindAllStringSubmatch(table, -1) {
		tests := regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(m[4], -1)
		for _, id := range from(t, m[1], m[2], m[3]) {
			if rows[id] != nil {
				t.Errorf("%s is there twice", id)
			}
			for _, name := range tests {
				rows[id] = append(rows[id], name[1])
			}
		}
	}
	return rows
}

// from counts from first to kind+last; without last there is the first alone.
func from(t *testing.T, first, kind, last string) (ids []string) {
	t.Helper()
	if last == "" {
		return []string{first}
	}
	var low, high int
	if n, err := fmt.Sscan(strings.TrimPrefix(first, kind)+" "+last, &low, &high); n != 2 {
		t.Fatalf("%s–%s%s: %v", first, kind, last, err)
	}
	for i := low; i <= high; i++ {
		ids = append(ids, fmt.Sprint(kind, i))
	}
	return ids
}

func TestEachRequirementIsShown(t *testing.T) {
	rows := shownRows(t)
	for _, row := range checklist {
		if strings.ContainsAny(row.ID[:1], "BFW") && len(rows[row.ID]) == 0 {
			t.Errorf("README.md does not say what shows %s", row.ID)
		}
	}
	for id, tests := range rows {
		if partsOf(id) == nil && cannot[id] == "" && incubating(id) == "" {
			t.Errorf("the checklist has no %s", id)
		}
		for _, named := range tests {
			path, name, ok := strings.Cut(named, " ")
			if !ok || !declared(t, filepath.Join("..", "..", path), name) {
				t.Errorf("%s is shown by %s, which is not there", id, named)
			}
		}
	}
}

// declared says whether a test file, or one in a folder, has the test.
func declared(t *testing.T, path, name string) bool {
	t.Helper()
	files := []string{path}
	if !strings.HasSuffix(path, ".go") {
		var err error
		if files, err = filepath.Glob(filepath.Join(path, "*_test.go")); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
			continue
		}
		if strings.Contains(string(text), "\nfunc "+name+"(") {
			return true
		}
	}
	return false
}
