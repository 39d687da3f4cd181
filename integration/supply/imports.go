// Which packages of Merlon may start programs, walk around the type system, or open
// connections by themselves: a table with a reason for each (imports.txt).

package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// guarded are the packages that need a reason.
var guarded = []string{"net", "os/exec", "unsafe"}

// use is one package that imports a guarded one.
type use struct{ guarded, by string }

// readImports reads imports.txt: a guarded package, one that imports it, and why.
func readImports() (map[use]string, error) {
	dir, err := root()
	if err != nil {
		return nil, err
	}
	file, err := os.Open(filepath.Join(dir, "integration", "supply", "imports.txt"))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	why := map[use]string{}
	lines := bufio.NewScanner(file)
	for n := 1; lines.Scan(); n++ {
		field := strings.Fields(lines.Text())
		if len(field) < 5 { // a reason of one word or two is none
			return nil, fmt.Errorf("imports.txt:%d: want a package, one that imports it, and why", n)
		}
		why[use{field[0], field[1]}] = strings.Join(field[2:], " ")
	}
	return why, lines.Err()
}
