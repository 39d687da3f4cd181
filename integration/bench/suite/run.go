// Running: each source once for every round, so that what else the machine does
// meets all of them, and what they print into one file, which benchstat reads too.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"merlon.dev/integration/measure"
)

// key says whether two sources are the same.
func (s source) key() string { return s.pkg + " " + s.bench + " " + s.test }

// wanted are the sources of the targets that are asked for, each once.
func wanted(only map[string]bool) (all []source) {
	for _, t := range targets {
		if len(only) > 0 && !only[t.p] {
			continue
		}
		if !slices.ContainsFunc(all, func(s source) bool { return s.key() == t.source.key() }) {
			all = append(all, t.source)
		}
	}
	return all
}

// measureAll runs everything and writes the results.
func measureAll(ctx context.Context, o options) error {
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	file, err := os.Create(filepath.Join(o.out, "bench.txt"))
	if err != nil {
		return err
	}
	defer file.Close()
	r := results{Machine: measure.Here(o.root), Count: o.count}
	fmt.Fprintf(file, "commit: %s\nload: %s\n", r.Machine.Commit, r.Machine.Load)
	found := make(figures)
	failed := make(map[string]string)
	for round := range o.count {
		for _, s := range wanted(o.only) {
			if s.once && round > 0 || failed[s.key()] != "" {
				continue
			}
			fmt.Fprintf(os.Stderr, "%s round %d of %d: %s\n", time.Now().Format(time.TimeOnly), round+1, o.count, s.key())
			out, err := s.run(ctx, o.root)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				failed[s.key()] = err.Error()
				fmt.Fprintln(os.Stderr, err)
			}
			if _, err := file.Write(out); err != nil {
				return err
			}
			if err := found.read(bytes.NewReader(out)); err != nil {
				return err
			}
		}
	}
	r.Machine.Load = r.Machine.Load + " before, " + measure.Here(o.root).Load + " after"
	r.judge(found, failed, o.only)
	if err := r.write(o.out, found); err != nil {
		return err
	}
	fmt.Print(r.table())
	if len(failed) > 0 {
		return fmt.Errorf("%d of the runs failed; what they said is above", len(failed))
	}
	return nil
}

// args are those of go test, or of a test binary with the prefix "test.".
func (s source) args(prefix string) []string {
	if s.test != "" {
		return []string{"-" + prefix + "run", s.test, "-" + prefix + "count=1", "-" + prefix + "v", "-" + prefix + "timeout=3h"}
	}
	args := []string{"-" + prefix + "run", "^$", "-" + prefix + "bench", s.bench, "-" + prefix + "benchmem", "-" + prefix + "count=1", "-" + prefix + "timeout=3h"}
	if s.times != "" {
		args = append(args, "-"+prefix+"benchtime", s.times)
	}
	return args
}

// run gives what the run has printed, also if it failed.
func (s source) run(ctx context.Context, root string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", append(append([]string{"test"}, s.args("")...), "./"+s.pkg)...)
	cmd.Dir, cmd.Env = root, append(os.Environ(), s.env...)
	return s.output(cmd)
}

func (s source) output(cmd *exec.Cmd) ([]byte, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, io.MultiWriter(&out, os.Stderr)
	// Whoever interrupts this command interrupts what it runs by itself.
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	if err == nil && !strings.Contains(out.String(), "Benchmark") {
		err = errors.New("it printed no figures: is it skipped?")
	}
	if err != nil {
		err = fmt.Errorf("run %s: %w\n%s", s.key(), err, tail(out.String(), 2000))
	}
	return out.Bytes(), err
}

func tail(text string, n int) string { return text[max(0, len(text)-n):] }
