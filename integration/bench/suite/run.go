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
		if !t.asked(only) || t.source.fleet && !only[t.p] {
			continue
		}
		if !slices.ContainsFunc(all, func(s source) bool { return s.key() == t.source.key() }) {
			all = append(all, t.source)
		}
	}
	return all
}

// measureAll runs everything and writes the results. What fails is in them with the
// reason, and keeps nothing else from being measured.
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
	failed, err := found.measure(ctx, o, file)
	if err != nil {
		return err
	}
	earlier := ""
	if slices.ContainsFunc(targets, func(t target) bool { return t.source.fleet && t.asked(o.only) }) {
		if earlier, err = found.readScaled(o.root); err != nil {
			failed[fleet.key()] = oneLine(err.Error())
		}
	}
	r.Machine.Load = r.Machine.Load + " before, " + measure.Here(o.root).Load + " after"
	r.judge(found, failed, earlier, o.only)
	if o.missed {
		if err := r.profileMissed(ctx, o); err != nil {
			failed["profiles"] = err.Error()
			fmt.Fprintln(os.Stderr, err)
		}
	}
	if err := r.write(o.out, found); err != nil {
		return err
	}
	if readme := readmeOf(o); readme != "" {
		if err := r.publish(readme); err != nil {
			return err
		}
	}
	fmt.Print(r.table())
	if len(failed) > 0 {
		return fmt.Errorf("%d of the runs failed; what they said is above", len(failed))
	}
	return nil
}

// measure runs the sources in rounds, and says why those failed that did. Whatever
// they print goes to file, too. An error is one that ends everything.
func (f figures) measure(ctx context.Context, o options, file io.Writer) (failed map[string]string, err error) {
	failed = make(map[string]string)
	all := wanted(o.only)
	for round := range o.count {
		for i, s := range all {
			if s.once && round > 0 || failed[s.key()] != "" {
				continue
			}
			at := fmt.Sprintf("%s round %d of %d, %d of %d: %s", time.Now().Format(time.TimeOnly), round+1, o.count, i+1, len(all), s.key())
			if name := s.missing(); name != "" {
				fmt.Fprintf(os.Stderr, "%s: left out, %s is not set\n", at, name)
				continue
			}
			fmt.Fprintln(os.Stderr, at)
			out, err := s.run(ctx, o.root)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err != nil {
				failed[s.key()] = reason(out, err)
				fmt.Fprintf(os.Stderr, "run %s: %v\n%s\n", s.key(), err, tail(string(out), 2000))
			}
			if _, err := file.Write(out); err != nil {
				return nil, err
			}
			if err := f.read(bytes.NewReader(out)); err != nil {
				return nil, err
			}
		}
	}
	return failed, nil
}

// missing is the first variable without which the source cannot run.
func (s source) missing() string {
	for _, name := range s.peers {
		if os.Getenv(name) == "" {
			return name
		}
	}
	return ""
}

// reason is what a run that failed says itself, in one line: what follows the name of
// the test, or, of a package that does not compile, the first error.
func reason(out []byte, err error) string {
	lines := strings.Split(string(out), "\n")
	for i, line := range lines {
		text := strings.TrimSpace(line)
		if strings.HasPrefix(text, "--- FAIL") && i+1 < len(lines) && strings.TrimSpace(lines[i+1]) != "" {
			text = strings.TrimSpace(lines[i+1])
			if !strings.HasPrefix(text, "--- FAIL") {
				return oneLine(text)
			}
		}
		if strings.HasPrefix(text, "panic: ") || strings.Contains(text, ".go:") && strings.HasPrefix(line, text) {
			return oneLine(text)
		}
	}
	return oneLine(err.Error())
}

// oneLine is text as a cell of a table has room for it.
func oneLine(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	text = strings.ReplaceAll(text, "|", "/")
	if runes := []rune(text); len(runes) > 200 {
		text = string(runes[:200]) + "…"
	}
	return text
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
func (s source) run(ctx context.Context, root string, more ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", append(append([]string{"test"}, s.args("")...), more...)...)
	// In the folder itself, which may be a Go module of its own.
	cmd.Dir, cmd.Env = filepath.Join(root, s.pkg), append(os.Environ(), s.env...)
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
	return out.Bytes(), err
}

func tail(text string, n int) string { return text[max(0, len(text)-n):] }
