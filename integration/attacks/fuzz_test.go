// The table of FUZZING.md: each fuzz target of the repository has a place there, and
// each test that it names is where it says.

package attacks_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	fuzzTarget = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(`)
	aTest      = regexp.MustCompile(`\b(Test|Fuzz)[A-Z]`)
)

// fuzzTargets are those of the repository, as "FILE NAME".
func fuzzTargets(t *testing.T) map[string]bool {
	t.Helper()
	targets, root := map[string]bool{}, filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		file, err := filepath.Rel(root, path)
		for _, m := range fuzzTarget.FindAllStringSubmatch(string(text), -1) {
			targets[filepath.ToSlash(file)+" "+m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return targets
}

func TestTableOfFuzzTargets(t *testing.T) {
	text, err := os.ReadFile("FUZZING.md")
	if err != nil {
		t.Fatal(err)
	}
	missing := fuzzTargets(t)
	if len(missing) < 100 {
		t.Fatalf("%d targets found; there are more", len(missing))
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) != 4 || cells[1] == " bytes " || strings.HasPrefix(cells[1], "-") {
			continue
		}
		n := 0
		for _, m := range inFile.FindAllStringSubmatch(cells[2], -1) {
			for name := range strings.SplitSeq(strings.Trim(m[2], ", "), ", ") {
				n++
				if err := has(m[1], name); err != nil {
					t.Errorf("%s: %v", cells[1], err)
				}
				at := m[1] + " " + name
				if strings.HasPrefix(name, "Fuzz") && seen[at] {
					t.Errorf("%s is there twice", at)
				}
				seen[at] = true
				delete(missing, at)
			}
		}
		if n == 0 || n != len(aTest.FindAllString(cells[2], -1)) {
			t.Errorf("%s: of %q %d tests are understood", cells[1], cells[2], n)
		}
	}
	for at := range missing {
		t.Errorf("%s has no place in FUZZING.md", at)
	}
}
