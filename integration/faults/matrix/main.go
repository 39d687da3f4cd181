// Command matrix prints the results of a run of the fault matrix, a folder of JSON
// files, as the table of README.md:
//
//	go run ./integration/faults/matrix FOLDER
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"merlon.dev/integration/faults"
)

// rows is how many rows the matrix has, with the soak.
const rows = 18

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "matrix: error:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("usage: matrix FOLDER")
	}
	files, err := filepath.Glob(filepath.Join(args[0], "R*.json"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("no results in %s", args[0])
	}
	var all []faults.Result
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var r faults.Result
		if err := json.Unmarshal(text, &r); err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b faults.Result) int { return number(a.Row) - number(b.Row) })
	machine := all[0].Machine
	fmt.Fprintf(out, "%s, %d cores, Linux %s, %s.\n\n", machine.CPU, machine.Cores, machine.Kernel, machine.Go)
	fmt.Fprintln(out, "| Row | Fault | Form | Operations: ok, failed, unknown | Calls: ok, failed | Figures | Slowest recovery | Commit, date, load, seed | Result |")
	fmt.Fprintln(out, "|---|---|---|---|---|---|---|---|---|")
	missing := slices.Collect(func(yield func(string) bool) {
		for n := 1; n <= rows; n++ {
			name := fmt.Sprint("R", n)
			if !slices.ContainsFunc(all, func(r faults.Result) bool { return r.Row == name }) && !yield(name) {
				return
			}
		}
	})
	for _, r := range all {
		fmt.Fprintln(out, line(r))
	}
	if len(missing) > 0 {
		fmt.Fprintf(out, "\nNot run: %s.\n", strings.Join(missing, ", "))
	}
	return nil
}

func number(row string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(row, "R"))
	return n
}

func line(r faults.Result) string {
	sum := func(outcome string, kinds ...string) (n int) {
		for _, k := range kinds {
			n += r.Operations[k+" "+outcome]
		}
		return n
	}
	changes, calls := []string{"create", "delete", "read", "push", "ban", "revoke", "join", "sign"}, []string{"connect", "call"}
	form, result := "short", "held"
	if r.Full {
		form = "full"
	}
	if !r.Passed {
		why := strings.Join(slices.Sorted(maps.Keys(r.Violations)), ", ")
		result = "**missed**: " + cmp.Or(why, "it failed beside the invariants, or did not come to its end: see its log")
	}
	return fmt.Sprintf("| %s | %s | %s, %.0f s, %d faults | %d, %d, %d | %d, %d | %s | %s | %s, %s, %s, %d | %s |",
		r.Row, r.Fault, form, r.Seconds, r.Faults, sum("ok", changes...), sum("failed", changes...), sum("unknown", changes...),
		sum("ok", calls...), sum("failed", calls...)+sum("unknown", calls...), pairs(r.Numbers), pairs(r.Slowest),
		r.Machine.Commit, r.Machine.At.UTC().Format("2006-01-02 15:04"), r.Machine.Load, r.Seed, result)
}

func pairs(m map[string]string) string {
	var all []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		all = append(all, k+": "+m[k])
	}
	return strings.Join(all, "; ")
}
