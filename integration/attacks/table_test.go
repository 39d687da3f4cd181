// The table of README.md: each attack has a row, and each test that a row names is
// where it says.

package attacks_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// attacks and traps are how many rows there are, T1 to T54 and S1 to S16.
const (
	attacks = 54
	traps   = 16
)

var (
	rowOf  = regexp.MustCompile(`^\| ([TS]\d+) \|`)
	inFile = regexp.MustCompile("`([^`]+\\.go)` ((?:[A-Z]\\w+(?:, )?)+)")
	shape  = regexp.MustCompile(`^(Test|Fuzz)[A-Z0-9]\w*$`)
	result = regexp.MustCompile(`^(held|open)\b`)
)

func TestTableNamesTestsThatThereAre(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		m := rowOf.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		row := m[1]
		if seen[row] {
			t.Errorf("%s is there twice", row)
		}
		seen[row] = true
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(cells) != 4 {
			t.Errorf("%s has %d cells; want 4", row, len(cells))
			continue
		}
		tests := cells[2]
		if row[0] == 'S' {
			tests = cells[3]
		} else if !result.MatchString(strings.TrimSpace(cells[3])) {
			t.Errorf("%s: result %q; want held or open, and what else is to be said", row, cells[3])
		}
		n := 0
		for _, m := range inFile.FindAllStringSubmatch(tests, -1) {
			for name := range strings.SplitSeq(strings.Trim(m[2], ", "), ", ") {
				n++
				if err := has(m[1], name); err != nil {
					t.Errorf("%s: %v", row, err)
				}
			}
		}
		if n == 0 || n != len(strings.FieldsFunc(tests, func(r rune) bool { return strings.ContainsRune(" ,;|", r) }))-strings.Count(tests, "`")/2 {
			t.Errorf("%s: of %q %d tests are understood", row, tests, n)
		}
	}
	for prefix, last := range map[string]int{"T": attacks, "S": traps} {
		for n := 1; n <= last; n++ {
			if row := fmt.Sprint(prefix, n); !seen[row] {
				t.Errorf("%s is missing", row)
			}
		}
	}
	if len(seen) != attacks+traps {
		t.Errorf("%d rows; want %d", len(seen), attacks+traps)
	}
}

// has looks for a test in a file of the repository.
func has(file, name string) error {
	if !shape.MatchString(name) {
		return fmt.Errorf("%s is no test's name", name)
	}
	text, err := os.ReadFile(filepath.Join("..", "..", filepath.FromSlash(file)))
	if err != nil {
		return err
	}
	if !strings.Contains(string(text), "\nfunc "+name+"(") {
		return fmt.Errorf("%s has no %s", file, name)
	}
	return nil
}
